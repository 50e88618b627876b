"""What the CUDA driver offers and PyTorch does not: memory that processes share, and how GPUs are linked.

PyTorch's symmetric memory, up to 2.14, numbers what ranks share by process instead of by group. If a process shares
memory in a group of two ranks, and then in one of four, PyTorch waits until a time-out.
"""

from __future__ import annotations

import ctypes
import functools

import torch


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    error = getattr(_driver(), name)(*arguments)
    if error:
        raise RuntimeError(f"{name} of the CUDA driver failed with error {error}")


class _Handle(ctypes.Structure):  # CUipcMemHandle
    _fields_ = [("reserved", ctypes.c_byte * 64)]


def new_shared_memory(size: int) -> tuple[int, bytes]:
    """Allocates zeros on the current GPU. Returns the address and a handle, which :func:`map_shared_memory` takes.

    Memory in use must not be freed: other processes may have mapped it, and CUDA graphs may contain its address.
    """
    address, handle = ctypes.c_uint64(), _Handle()
    allocate = functools.partial(_call, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
    try:
        allocate()
    except RuntimeError:
        torch.cuda.empty_cache()  # PyTorch may have reserved all memory
        allocate()
    try:
        _call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        torch.cuda.synchronize()  # before others write
        _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    except RuntimeError:
        free_shared_memory(address.value)
        raise
    return address.value, bytes(handle)


def free_shared_memory(address: int) -> None:
    """Frees memory of :func:`new_shared_memory` that no other process maps."""
    _call("cuMemFree_v2", ctypes.c_uint64(address))


def map_shared_memory(handle: bytes) -> int:
    """Returns the address by which the current GPU reaches memory that another process on this host allocated."""
    address, peer_access = ctypes.c_uint64(), 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), ctypes.c_uint(peer_access))
    return address.value


def unmap_shared_memory(address: int) -> None:
    """Ends :func:`map_shared_memory`."""
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


def has_atomics(device: int, other: int) -> bool:
    """Whether a GPU reaches the memory of another one with atomic operations, as over NVLink."""
    handles = [ctypes.c_int(), ctypes.c_int()]
    for handle, index in zip(handles, (device, other), strict=True):
        _call("cuDeviceGet", ctypes.byref(handle), index)
    value, native_atomics = ctypes.c_int(), 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    _call("cuDeviceGetP2PAttribute", ctypes.byref(value), native_atomics, *handles)
    return value.value == 1

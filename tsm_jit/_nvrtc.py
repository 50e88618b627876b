"""Compiles a CUDA source with NVRTC, in a process of its own: ``python -I _nvrtc.py LIBRARY`` tells what it can,
``... LIBRARY SOURCE ARCHITECTURE -o IMAGE OPTION...`` makes a cubin (``sm_90``) or PTX (``compute_75``).

Uses Python's standard library alone, so that it starts at once. The build puts its images together by :func:`assembly`.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# NVRTC has no standard headers, and takes one of ours for each that the sources include.
_HEADERS = (b"algorithm", b"cstdint", b"cstdlib", b"cstring", b"type_traits")


class _Nvrtc:
    """The library; a call that fails ends the process."""

    def __init__(self, path: str):
        # NVRTC finds them by name once they are loaded.
        for builtins in Path(path).parent.glob("libnvrtc-builtins*.so*"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            sys.exit(f"error: {error}")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def __call__(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, f"nvrtc{function}")(*arguments)
        if code != 0:
            sys.exit(f"error: nvrtc{function}: {self._library.nvrtcGetErrorString(code).decode()}")

    def get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self(f"Get{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self(f"Get{what}", program, data)
        return data.raw

    def tell(self) -> None:
        """In nvcc's words."""
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self("Version", ctypes.byref(major), ctypes.byref(minor))
        sys.stdout.write(f"NVRTC, release {major.value}.{minor.value}\n")
        self("GetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self("GetSupportedArchs", known)
        sys.stdout.writelines(f"compute_{architecture}\n" for architecture in known)

    def compile(self, source: Path, architecture: str, options: list[str]) -> bytes:
        program = ctypes.c_void_p()
        standard = (ctypes.c_char_p * len(_HEADERS))(*[b'#include "nvrtc_std.h"\n'] * len(_HEADERS))
        names = (ctypes.c_char_p * len(_HEADERS))(*_HEADERS)
        text, name = source.read_bytes(), str(source).encode()
        self("CreateProgram", ctypes.byref(program), text, name, len(_HEADERS), standard, names)
        encoded = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
        flags = (ctypes.c_char_p * len(encoded))(*encoded)
        code = self._library.nvrtcCompileProgram(program, len(encoded), flags)
        sys.stderr.buffer.write(self.get("ProgramLog", program).rstrip(b"\0"))
        if code != 0:
            sys.exit(f"error: {source} for {architecture}: {self._library.nvrtcGetErrorString(code).decode()}")
        return self.get("CUBIN" if architecture.startswith("sm_") else "PTX", program)


def assembly(folder: Path, sources: Sequence[str], architectures: Sequence[str]) -> str:
    """What defines the kernels, for ``kernels/driver.h``, out of the images ``folder/SOURCE.ARCHITECTURE``."""
    lines = ['.section .note.GNU-stack,"",%progbits']
    portable = next(name for name in architectures if name.startswith("compute_"))
    for source in sources:
        lines += images(source, architectures)
        for kernel in re.findall(r"\.entry\s+(\w+)", (folder / f"{source}.{portable}").read_text(errors="replace")):
            lines += [f".Lname_{kernel}:", f'.asciz "{kernel}"', ".balign 8"]
            lines += [f".globl {kernel}", f".hidden {kernel}", f".type {kernel}, %object", f"{kernel}:"]
            lines += [f".quad .Lname_{kernel}, .Limages_{source}, {len(architectures)}, .Lhandles_{kernel}"]
            lines += [f".Lhandles_{kernel}:", f".fill {len(architectures)}, 8, 0"]
    return "\n".join([*lines, ""])


def images(source: str, architectures: Sequence[str]) -> list[str]:
    """Their table, of which a GPU takes the first that it runs: the newest machine code, else the newest PTX."""
    best_first = sorted(architectures, key=lambda name: (name.startswith("sm_"), *_preference(name)), reverse=True)
    lines = [".section .rodata"]
    for name in best_first:
        lines += [".balign 64", f".L{name}_{source}:", f'.incbin "{source}.{name}"']
    lines += [".data", ".balign 8", f".Limages_{source}:"]
    for name in best_first:
        lowest, highest = _runs_on(name)
        lines += [f".quad .L{name}_{source}", f".long {lowest}, {highest}", ".quad 0"]
    return lines


def _runs_on(architecture: str) -> tuple[int, int]:
    """The lowest and the highest compute capability that an image is right for: machine code for that of its generation
    from there on, PTX for all; with an a for none but its own, with an f for its generation."""
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", architecture).groups()
    lowest = int(number)
    if suffix == "a":
        return lowest, lowest
    if kind == "sm" or suffix:
        return lowest, lowest // 10 * 10 + 9
    return lowest, 10**6


def _preference(architecture: str) -> tuple[int, int]:
    lowest, highest = _runs_on(architecture)
    return lowest, -highest


def main(library: str, *arguments: str) -> None:
    nvrtc = _Nvrtc(library)
    if not arguments:
        nvrtc.tell()
    else:
        source, architecture, _, image, *options = arguments
        Path(image).write_bytes(nvrtc.compile(Path(source), architecture, options))


if __name__ == "__main__":
    main(*sys.argv[1:])

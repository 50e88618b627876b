"""A 1x1 convolution or a linear layer of shifted frames, without a shifted copy.

Both are one matrix product, whose loads can read shifted rows: see :mod:`tsm_jit.ops.shift_gemm`. This module decides
where its kernels serve, chooses their tiles, and gives the product a backward. Where they do not serve, a layer of
shifted frames is the shift, then PyTorch's convolution or linear layer. That holds for compilers, exporters,
``torch.func``, fake tensors and the CPU. :func:`shifted_layer` chooses for all convolutions and linear layers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tsm_jit.ops.compat import (
    current_device,
    current_stream_handle,
    direct_apply,
    eager,
    unwrap_if_dead,
)
from tsm_jit.ops.recomputing_layer import (
    Layer,
    compute_dtype,
    is_plain_gradient,
    recomputing_layer,
    save_inputs,
    saved_inputs,
    split_clips,
)
from tsm_jit.ops.temporal_shift import shift_tokens, temporal_shift
from tsm_jit.plans import decode


def shift_conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None, shift: str, stride: int = 1) -> Tensor:
    """``conv2d(temporal_shift(x), weight, bias, stride)`` for frames ``[N*T, C, H, W]`` and a 1x1 convolution."""
    layer = Layer.conv1x1(shift, stride)
    z = shifted_layer(x, weight, bias, layer) if eager() else None
    return F.conv2d(temporal_shift(x, shift), weight, bias, stride) if z is None else z


def shift_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shift: str, num_prefix_tokens: int = 0) -> Tensor:
    """``linear(temporal_shift(x), weight, bias)`` for tokens ``[N*T, L, C]``. The first tokens do not move."""
    z = shifted_layer(x, weight, bias, Layer(shift, num_prefix_tokens)) if eager() else None
    return F.linear(shift_tokens(x, shift, num_prefix_tokens), weight, bias) if z is None else z


# --- the choice ------------------------------------------------------------------------------------------------------


def shifted_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, recomputes: bool = False, relu: bool = False
) -> Tensor | None:
    """In eager mode, returns ``layer`` of the shifted ``x``, or None where a separate shift is faster or required.

    A product makes no shifted copy. If no product serves and ``recomputes`` is true, the copy is computed again in the
    backward: see :func:`recomputing_layer`. ``relu`` applies a ReLU to a product, without gradients. If ranks share
    the frames, only a product serves.
    """
    may_be_product = x.is_cuda and layer.convolution in _PRODUCTS
    recomputes = recomputes and layer.shard is None
    if not (may_be_product or recomputes):
        return None
    x = unwrap_if_dead(x)
    dtype = compute_dtype(x, weight, bias)
    if dtype is None:
        return None
    if layer.shard is not None and x.dtype is not dtype:  # a rank that shifts separately sends frames without the cast
        return None
    if may_be_product and (product := _served(x, weight, bias, layer, dtype)) is not None:
        return product(x if x.dtype is dtype else x.to(dtype), weight, bias, relu)
    return recomputing_layer(x, weight, bias, layer, dtype) if recomputes else None


def _served(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, dtype: torch.dtype) -> Product | None:
    """Returns the product if the kernels serve these tensors, else None."""
    is_linear = layer.convolution is None
    if dtype not in _HALF and not (dtype is torch.float32 and _tf32_is_allowed(is_linear)):
        return None
    if not x.is_contiguous(memory_format=torch.contiguous_format if is_linear else torch.channels_last):
        return None
    serves = (
        _is_aligned(x)
        and weight.device == x.device
        and weight.is_contiguous()
        and _is_aligned(weight)
        and (bias is None or _is_bias(bias, weight))
        and not torch.are_deterministic_algorithms_enabled()
        # The backward reads x. Of a slice it would keep the whole storage, of which a shifted copy is a part.
        and not (torch.is_grad_enabled() and weight.requires_grad and x.untyped_storage().nbytes() > x.nbytes)
    )
    return _product(x.shape, weight.shape, layer, dtype, x.device) if serves else None


def _is_aligned(x: Tensor) -> bool:
    """Whether ``x`` begins at a multiple of 16 bytes. Triton compiles other kernels for other addresses."""
    return x.data_ptr() % 16 == 0


def _is_bias(bias: Tensor, weight: Tensor) -> bool:
    return (
        bias.device == weight.device and bias.shape == weight.shape[:1] and bias.is_contiguous() and _is_aligned(bias)
    )


_HALF = (torch.float16, torch.bfloat16)

# What Layer.convolution is for a product: None for a linear layer, or a 1x1 kernel with stride 1 or 2.
_PRODUCTS = (None, Layer.conv1x1("", 1).convolution, Layer.conv1x1("", 2).convolution)


def _tf32_is_allowed(is_linear: bool) -> bool:
    backends: Any = torch.backends
    return (backends.cuda.matmul if is_linear else backends.cudnn.conv).fp32_precision == "tf32"


@functools.lru_cache(maxsize=4096)
def _product(
    shape: torch.Size, weight_shape: torch.Size, layer: Layer, dtype: torch.dtype, device: torch.device
) -> Product | None:
    """Returns the product for such an ``x`` and weight, or None where a separate shift is faster or required.

    The columns must move in groups of 8, which a thread loads at once. A long sum in few tiles leaves processors idle:
    PyTorch's own product splits the sum.
    """
    plan = decode(layer.shift)
    is_linear = layer.convolution is None
    channel_dim = 2 if is_linear else 1
    if len(shape) != (3 if is_linear else 4) or plan.channel_dim != channel_dim or 0 in shape or not plan.plan:
        return None
    channels = shape[channel_dim]
    if weight_shape[1:] != ((channels,) if is_linear else (channels, 1, 1)):
        return None
    if any(width % 8 for width in (channels, weight_shape[0], *(width for width, _ in plan.plan))):
        return None
    if weight_shape[0] == 0 or not _has_triton(device):
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    product = Product(shape, weight_shape[0], layer, dtype, device, processors)
    return product if not product.is_small or product.k <= 1024 else None


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton can be imported, and the GPU has tensor cores and the shared memory that the tiles take."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.cuda is None or properties.major < 8 or properties.shared_memory_per_block_optin < 160 * 1024:
        return False
    try:
        from tsm_jit.ops import shift_gemm  # imports Triton, which takes a second

        with torch.cuda.device(device):
            shift_gemm.probe[(1,)](torch.empty(1, device=device))
    except Exception:  # Triton is not installed, or finds no C compiler for the code that launches its kernels
        return False
    return True


# --- the product -----------------------------------------------------------------------------------------------------


class _Kernel:
    """A Triton kernel with all its arguments but the tensors, which come first.

    Triton looks up the compiled kernel from the types and values of all arguments, in 20 us. Here they are the same in
    each call, so only the first call looks it up.
    """

    def __init__(
        self,
        name: str,
        grid: tuple[int, int, int],
        sizes: tuple,
        constants: dict,
        warps: int,
        stages: int,
        device: torch.device,
    ):
        from tsm_jit.ops import shift_gemm

        self._kernel = getattr(shift_gemm, name)
        self._grid, self._device = grid, device
        self._sizes, self._constants = sizes, constants
        self._options = {"num_warps": warps, "num_stages": stages}
        self._compiled: Any = None
        self._arguments = (*sizes, *constants.values())

    def __call__(self, *tensors: Tensor | None) -> None:
        compiled = self._compiled
        if compiled is None:  # always so in Triton's interpreter
            self._compiled = self._kernel[self._grid](*tensors, *self._sizes, **self._constants, **self._options)
            return
        stream = current_stream_handle(self._device)
        no_hooks = (None, None, None)  # of Triton's own profiler
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *tensors, *self._arguments
        )


class Product:
    """The product of shifted rows ``[M, K]`` with a weight ``[N, K]``, for one shape of ``x``."""

    def __init__(
        self,
        shape: torch.Size,
        out_channels: int,
        layer: Layer,
        dtype: torch.dtype,
        device: torch.device,
        processors: int,
    ):
        shift, reach, halo_channels = decode(layer.shift), 0, 0
        if layer.shard is not None:
            exchange = layer.shard.exchange(layer.shift)
            shift, (reach, _, halo_channels) = decode(exchange.local), exchange.halo
        frames, self.k, self.n = shape[0], shape[shift.channel_dim], out_channels
        stride = 1 if layer.convolution is None else layer.convolution[0][0]
        height, width = (shape[2], shape[3]) if len(shape) == 4 else (shape[1], 1)
        out_height, out_width = [(size - 1) // stride + 1 for size in (height, width)]
        positions = out_height * out_width
        self.layer, self.padding = layer, shift.padding
        self.shape, self.stride, self.dtype, self.device = shape, stride, dtype, device
        if len(shape) == 4:  # in channels_last
            self.out_shape: tuple[int, ...] = (frames, out_channels, out_height, out_width)
            self.out_strides: tuple[int, ...] = (positions * self.n, 1, out_width * self.n, self.n)
        else:
            self.out_shape, self.out_strides = (*shape[:2], self.n), (positions * self.n, self.n, 1)
        self.weight_shape = (self.n, self.k, 1, 1) if len(shape) == 4 else (self.n, self.k)
        self.rows = frames * positions
        self.processors = processors
        # Tiles, warps and stages as measured: two or three programs per processor hide the latency of the loads.
        self.block_n = 64 if self.n <= 64 else 128
        tiles = _ceil_div(self.rows, 128) * _ceil_div(self.n, self.block_n)
        self.is_small = tiles < processors
        self.block_m = 64 if tiles < 2 * processors else 128
        if tiles < processors // 4:
            self.block_n = 64
        self.depth = 128 // dtype.itemsize  # the block of the dimension that is summed, in rows of 128 bytes
        ends, plan = 0, []
        for group, offset in shift.plan or ((self.k, 0),):  # a rank may hold no frame that moves
            ends += group
            plan += [ends // 8, offset]
        self.sizes = (
            *(tuple(plan), self.rows, self.n // 8, self.k // 8, height * width, shift.n_segment),
            *(shift.n_segment_shifted, layer.num_prefix_tokens, width, positions, out_width),
            *(reach, halo_channels // 8),
        )
        self.forward_kernels: dict[tuple[torch.dtype | None, bool], _Kernel] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
        if current_device() != self.device.index:  # all kernels run on the current one
            with torch.cuda.device(self.device):
                return self(x, weight, bias, relu)
        if weight.dtype is not self.dtype:  # by autocast
            weight = weight.to(self.dtype)
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            bias = None if bias is None else unwrap_if_dead(bias)
            return _apply(x, unwrap_if_dead(weight), bias, self)
        return self.forward(x, self.halo(x, needs_gradient=False)[0], weight, bias, relu)

    def halo(self, x: Tensor, *, needs_gradient: bool) -> tuple[Tensor | None, Any]:
        """Exchanges frames if other ranks share the clips. Returns the fields of a ``Halo``, else twice None."""
        layer = self.layer
        if layer.shard is None:
            return None, None
        return split_clips().halo(x, layer.shift, layer.shard, layer.num_prefix_tokens, needs_gradient)

    def _kernel(
        self, name: str, tiles: int, parts: int, blocks: tuple[int, int, int], warps: int, **more: Any
    ) -> _Kernel:
        import triton.language as tl

        constants: dict[str, Any] = {
            "PADDING": self.padding,
            "STRIDE": self.stride,
            "HAS_PREFIX": self.layer.num_prefix_tokens > 0,
            "INDEX": tl.int64 if max(self.shape.numel(), self.rows * self.n) >= 2**31 else tl.int32,
            **more,
            **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)),
        }
        return _Kernel(name, (tiles, parts, 1), self.sizes, constants, warps, 3, self.device)

    def forward(
        self, x: Tensor, halo: Tensor | None, weight: Tensor, bias: Tensor | None, relu: bool = False
    ) -> Tensor:
        z = x.new_empty_strided(self.out_shape, self.out_strides)  # 1 us faster than empty in channels_last
        key = (None if bias is None else bias.dtype, relu)
        kernel = self.forward_kernels.get(key)
        if kernel is None:
            tiles = _ceil_div(self.rows, self.block_m) * _ceil_div(self.n, self.block_n)
            warps = 8 if self.block_m == self.block_n == 128 else 4
            kernel = self._kernel("forward", tiles, 1, (self.block_m, self.block_n, self.depth), warps, RELU=relu)
            self.forward_kernels[key] = kernel
        kernel(x, halo, weight, bias, z)
        return z

    def input_grad(self, dz: Tensor, weight: Tensor) -> Tensor:
        # PyTorch's product, then the adjoint of the shift in place: stores to shifted rows were slower.
        rows = _rows(dz) @ weight.view(self.n, self.k)
        if dz.dim() == 3:
            dx = rows.view(self.shape)
        else:
            frames, _, height, width = dz.shape
            dx = rows.view(frames, height, width, self.k).permute(0, 3, 1, 2)
        if self.stride == 1 or self.layer.shard is None:
            self.layer.shift_backward_(dx)
        if self.stride == 1:
            return dx
        full = torch.empty(self.shape, dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last).zero_()
        full[:, :, :: self.stride, :: self.stride] = dx
        if self.layer.shard is not None:  # a rank that shifts separately exchanges gradients of this size
            self.layer.shift_backward_(full)
        return full

    @functools.cached_property
    def _weight_grad(self) -> tuple[_Kernel, int]:
        # One program per processor: it sums a part of the rows, and its tile covers as much of dw as registers can.
        block_n = 64 if self.n <= 64 else 128 if self.n <= 128 else 256
        block_k = 256 if block_n < 256 else 128
        tiles = _ceil_div(self.n, block_n) * _ceil_div(self.k, block_k)
        parts = max(1, min(_ceil_div(self.rows, 256), self.processors // tiles))
        return self._kernel("weight_grad", tiles, parts, (self.depth, block_n, block_k), warps=8), parts

    def weight_grad(self, dz: Tensor, x: Tensor, halo: Tensor | None) -> Tensor:
        kernel, parts = self._weight_grad
        dw = torch.empty(parts, self.n, self.k, dtype=torch.float32, device=x.device)
        kernel(dz, x, halo, dw)
        dw = dw.sum(0) if parts > 1 else dw[0]
        return dw.to(dz.dtype).view(self.weight_shape)


class _DifferentiableProduct(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, product):
        ctx.product = product
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        halo, ctx.call = product.halo(x, needs_gradient=ctx.needs_input_grad[0])
        save_inputs(ctx, x, weight, product.layer, halo)
        return product.forward(x, halo, weight, bias)

    @staticmethod
    def backward(ctx, dz):
        if dz is None:
            return None, None, None, None
        product = ctx.product
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        channels = 1 if dz.dim() == 4 else 2
        db = dz.sum([i for i in range(dz.dim()) if i != channels], dtype=ctx.bias_dtype) if needs_bias else None
        if product.is_small or torch.is_grad_enabled() or not is_plain_gradient(dz):
            dx, dw, _ = product.layer.backward(ctx, dz, needs_bias=False)
            return dx, dw, db, None
        dz = _dense(dz)
        x, weight, halo = saved_inputs(ctx, product.layer)
        with torch.cuda.device(product.device):
            dx = product.input_grad(dz, weight) if needs_x else None
            dw = product.weight_grad(dz, _dense(x), halo if halo is None else _dense(halo)) if needs_weight else None
        return dx, dw, db, None


_apply = direct_apply(_DifferentiableProduct)


def _dense(x: Tensor) -> Tensor:
    """Returns frames in channels_last, or contiguous tokens, at an address for 16 bytes at once: ``x`` or a copy."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    return x if _is_aligned(x) else x.clone(memory_format=layout)


def _rows(z: Tensor) -> Tensor:
    """A view ``[M, N]`` of frames in channels_last or of contiguous tokens."""
    return (z.permute(0, 2, 3, 1) if z.dim() == 4 else z).flatten(0, -2)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

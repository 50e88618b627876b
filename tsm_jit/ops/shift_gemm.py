"""Triton kernels of a matrix product whose loads read shifted rows.

A 1x1 convolution in channels_last and a linear layer are products ``z[M, N] = a[M, K] @ w[N, K].T``. The ``M`` rows are
the positions of all frames, the ``K`` columns are channels. With a temporal shift, a column reads another frame::

    a[m, k] = x[row of the same position, offset(k) frames later, k]      0 if there is no such frame (zero padding)

So the kernels read ``x`` at other rows, and no shifted copy exists:

- ``forward``: ``z = a @ w.T``, with a bias and a ReLU if asked for.
- ``weight_grad``: ``dw = dz.T @ a``.

Sizes: ``x`` has frames of ``P`` positions and clips of ``T`` frames. The first ``S`` frames of a clip are shifted, but
not their first ``PREFIX`` positions. With ``STRIDE`` 2, a line of ``x`` has ``W`` positions. A frame of ``z`` has
``OUT_P``, in lines of ``OUT_W``. ``M = frames * OUT_P``, ``N = 8 * N8`` and ``K = 8 * K8``. ``plan`` has the end of
each column group, in units of 8, and its offset. So a thread loads 8 columns of one row at once.

If other ranks hold frames of the clips, ``halo`` has the frames outside of ``x`` that the first and last ``REACH``
frames of each clip read: ``[clips, min(2*REACH, S), P, 8*HALO_K8]``. See :class:`tsm_jit.ops.sharded_shift.Halo`.
Otherwise it is None.

All tensors are dense, with rows of ``K`` or ``N`` elements. The result shares no memory with the inputs. As many bytes
move as in the product without a shift. Sums are in float32 and rounded once.
"""

import triton
import triton.language as tl
from triton.language import constexpr

# Not specialized, so that few compilations serve all sizes.
_SIZES = ["plan", "M", "N8", "K8", "P", "T", "S", "PREFIX", "W", "OUT_P", "OUT_W", "REACH", "HALO_K8"]


@triton.jit
def _input_row(m, P, OUT_P, OUT_W, W, STRIDE: constexpr):
    """The row of ``x`` at the position of the output row ``m``. ``P`` positions form a frame of ``x``."""
    if STRIDE == 1:
        row = m
    else:
        position = m % OUT_P
        row = m // OUT_P * P + (position // OUT_W * W + position % OUT_W) * STRIDE
    return row


@triton.jit
def _offset_of(column, plan):
    """The offset of each column. ``plan`` has the end, in units of 8 columns, and the offset of each group."""
    offset = column * 0
    for i in tl.static_range(len(plan) // 2 - 1, -1, -1):
        offset = tl.where(column < plan[2 * i] * 8, plan[2 * i + 1], offset)
    return offset


@triton.jit
def _load_shifted(
    x, halo, row, column, rows, plan, K, P, T, S, PREFIX, REACH, HALO_K8, PADDING: constexpr, HAS_PREFIX: constexpr
):  # fmt: skip
    """Loads ``a[row, column]`` from the source rows, and 0 where ``rows`` is false.

    A source row that ``x`` does not have is one of ``halo``. Without a halo its values are 0.
    """
    here = (row % (T * P))[:, None]  # the row within its clip
    there = here + _offset_of(column, plan)[None, :] * P
    moves = here < S * P
    if HAS_PREFIX:
        moves = moves & (here % P >= PREFIX)
    if PADDING == "keep":
        there = tl.where((there >= 0) & (there < S * P), there, here)
    elif PADDING == "replicate":
        there = tl.minimum(tl.maximum(there, here % P), (S - 1) * P + here % P)
    elif PADDING == "circular":
        there = (there + S * P) % (S * P)
    exists = ((there >= 0) & (there < S * P)) | (moves == 0)
    source = row[:, None] + tl.where(moves, there - here, 0)
    begin = x + source * K
    if halo is not None:  # it is 0 where no frame exists
        middle = tl.maximum(S - 2 * REACH, 0) * P  # rows of a clip that lack nothing
        halo_row = (row // (T * P))[:, None] * (tl.minimum(2 * REACH, S) * P)
        halo_row += here - tl.where(here >= REACH * P, middle, 0)
        begin = tl.where(exists, begin, halo + halo_row * (HALO_K8 * 8))
        begin = tl.max_constancy(tl.multiple_of(begin, [1, 16]), [1, 8])  # which the compiler does not see
    mask = rows[:, None] & (column < K)[None, :]
    if halo is None:
        mask = mask & exists
    return tl.load(begin + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    x, halo, w, bias, z, plan, M, N8, K8, P, T, S, PREFIX, W, OUT_P, OUT_W, REACH, HALO_K8,
    PADDING: constexpr, STRIDE: constexpr, HAS_PREFIX: constexpr, INDEX: constexpr,
    RELU: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """``z`` is ``[M, N]``. A program computes ``BLOCK_M`` rows of ``BLOCK_N`` columns."""
    N = N8 * 8
    K = K8 * 8
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = m < M
    row = _input_row(m.to(INDEX), P, OUT_P, OUT_W, W, STRIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        a = _load_shifted(
            x, halo, row, column, rows, plan, K, P, T, S, PREFIX, REACH, HALO_K8, PADDING, HAS_PREFIX
        )  # fmt: skip
        b = tl.load(w + n[None, :] * K + column[:, None], mask=(column < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = z + m.to(INDEX)[:, None] * N + n[None, :]
    tl.store(out, acc.to(z.dtype.element_ty), mask=rows[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def weight_grad(
    dz, x, halo, dw, plan, M, N8, K8, P, T, S, PREFIX, W, OUT_P, OUT_W, REACH, HALO_K8,
    PADDING: constexpr, STRIDE: constexpr, HAS_PREFIX: constexpr, INDEX: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """``dw`` is ``[parts, N, K]``: a program sums over one part of the rows."""
    N = N8 * 8
    K = K8 * 8
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    length = tl.cdiv(tl.cdiv(M, tl.num_programs(1)), BLOCK_M) * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(part * length, tl.minimum(M, (part + 1) * length), BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(INDEX)
        rows = m < M
        row = _input_row(m, P, OUT_P, OUT_W, W, STRIDE)
        g = tl.load(dz + m[:, None] * N + n[None, :], mask=rows[:, None] & (n < N)[None, :], other=0.0)
        a = _load_shifted(
            x, halo, row, column, rows, plan, K, P, T, S, PREFIX, REACH, HALO_K8, PADDING, HAS_PREFIX
        )  # fmt: skip
        acc = tl.dot(tl.trans(g), a, acc)
    out = dw + (part.to(tl.int64) * N + n)[:, None] * K + column[None, :]
    tl.store(out, acc, mask=(n < N)[:, None] & (column < K)[None, :])


@triton.jit
def probe(x):
    """Stores 1. Whether this compiles and runs tells whether Triton works here."""
    tl.store(x, 1)

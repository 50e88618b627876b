"""Times whole networks: without shift, with TSM's or TSAM's own shift, with tsm_jit's modules, and fused.

There are two tables: ResNets in several modes (:func:`cases`), and one or two networks of every architecture
(:func:`family_cases`).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tsm_jit import residual, tsam
from tsm_jit.bench import peers, timing
from tsm_jit.bench.rows import Mismatch, Row, mebibytes
from tsm_jit.convert.architectures import stages_of
from tsm_jit.convert.tsm import make_temporal_shift
from tsm_jit.modules.base import ShiftedModule
from tsm_jit.modules.tsm import TokenShift
from tsm_jit.plans import Padding, Plan, Shift, temporal

CLASSES = 400  # of Kinetics-400
OUT_OF_PLACE = "drop-in, out of place"
FAMILIES = (
    *("resnet18", "resnet50", "resnext50_32x4d", "regnet_y_400mf", "regnet_y_3_2gf", "convnext_tiny"),
    *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "timm/vit_small_patch16_224", "timm/regnety_008"),
)


class Case(NamedTuple):
    """A network and its input: ``batch`` clips of 8 frames, for TSAM with a ninth segment of audio."""

    network: str  # of torchvision, or timm/name
    method: str  # TSM or TSAM
    batch: int
    training: bool
    compiled: bool
    size: int = 224
    graph: bool = False  # whether it runs as a CUDA graph, which leaves out the time of the CPU

    @property
    def segments(self) -> int:
        return 9 if self.method == "TSAM" else 8


class Protocol(NamedTuple):
    """How the cases of a table are timed."""

    variants: tuple[str, ...]  # besides the network without shift; "folded", without norms, is for inference
    seconds: float  # about the longest time that one variant is measured
    cudnn_benchmark: bool  # whether cuDNN chooses its algorithms by timing them, as PyTorch's flag of that name


RESNETS = Protocol(("stock", "drop-in", "fused", "folded"), 6.0, False)
EVERY_FAMILY = Protocol(("stock", OUT_OF_PLACE, "drop-in", "fused"), 1.0, True)


def cases(cuda: bool, quick: bool) -> list[Case]:
    """Returns all cases, or a few small ones if ``quick`` or on a CPU, where networks take long."""
    if quick or not cuda:
        return [
            Case("resnet18", method, 1, training, False, 64, cuda and not training)
            for method in CONVERSIONS
            for training in (True, False)
        ]
    selected = []
    for compiled in (False, True):
        for training in (False, True):  # the longest compilations come last
            sizes = [("resnet50", "TSM", 32), ("resnet50", "TSM", 8)]
            if not compiled:
                sizes += [("resnet101", "TSM", 32), ("resnet50", "TSAM", 32)]
            selected += [Case(*size, training, compiled, graph=not training) for size in sizes]
    return selected


def family_cases(cuda: bool, quick: bool, names: Sequence[str]) -> list[Case]:
    """Returns the cases of these networks: training, its GPU time alone, inference. Small ones as in :func:`cases`."""
    batch, size = (1, 64) if quick or not cuda else (24, 224)
    modes = [(True, False), (True, True), (False, True)] if cuda else [(True, False), (False, False)]
    return [Case(name, "TSM", batch, training, False, size, graph) for name in names for training, graph in modes]


def named_families(text: str) -> tuple[str, ...]:
    """Parses ``NAME,NAME``. Raises ValueError for a name that is not in ``FAMILIES``."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"a network must be one of {', '.join(FAMILIES)}, got {unknown[0]!r}")
    return names


def missing_package(name: str) -> str | None:
    """Returns the package that this network needs and that is not installed, if any."""
    package = name.rpartition("/")[0]
    return package if package and importlib.util.find_spec(package) is None else None


def _convert_tsm(net: nn.Module, inplace: bool) -> None:
    make_temporal_shift(net, 8, inplace=inplace)


def _convert_tsam(net: nn.Module, inplace: bool) -> None:
    tsam.make_Shift(net, 9, 8, f_div=8, shift_depth=4, n_insert=1, m_insert=0, inplace=inplace)


CONVERSIONS: dict[str, Callable[[nn.Module, bool], None]] = {"TSM": _convert_tsm, "TSAM": _convert_tsam}


class _Stock(ShiftedModule):
    """A shift module with TSM's or TSAM's own implementation of the shift."""

    fold_div: int  # of TSM
    f_div: int  # of TSAM
    shift_depth: int

    def forward(self, x: Tensor) -> Tensor:
        n_segment, n_shifted = self.n_segment, getattr(self, "n_segment_shifted", self.n_segment)
        plan: Plan
        padding: Padding
        if n_shifted < n_segment:
            plan, padding = temporal(x.shape[1], self.f_div, self.shift_depth), "keep"
        else:
            plan, padding = temporal(x.shape[1], self.fold_div), "zeros"
        return self.shifted_module()(peers.eager(x, Shift(n_segment, n_shifted, 1, padding, plan)))


class _StockTokens(_Stock):
    """TSM's own implementation for tokens ``[N*T, L, C]``."""

    num_prefix_tokens: int

    def forward(self, x: Tensor) -> Tensor:
        prefix, channels = self.num_prefix_tokens, x.shape[-1]
        shift = Shift(self.n_segment, self.n_segment, 1, "zeros", temporal(channels, self.fold_div))
        shifted = peers.eager(x[:, prefix:].transpose(1, 2), shift).transpose(1, 2)
        return self.shifted_module()(torch.cat([x[:, :prefix], shifted], 1))


def _image_network(name: str) -> nn.Module:
    package, _, short = name.rpartition("/")
    if package != "timm":
        return torchvision.models.get_model(name, num_classes=CLASSES)
    import timm

    options: dict[str, Any] = {"dynamic_img_size": True} if "vit" in short else {}  # others take any size
    return timm.create_model(short, num_classes=CLASSES, **options)


def networks(case: Case, device: torch.device, variants: Sequence[str] = RESNETS.variants) -> dict[str, nn.Module]:
    """Returns the variants of a network, with the same weights, in channels_last. Not every network can be fused."""
    with device:
        plain = _image_network(case.network)
    plain = plain.to(device).to(memory_format=torch.channels_last)
    left_out = set() if stages_of(plain)[0].fusable_blocks else {"fused", "folded"}
    if case.training:
        left_out.add("folded")
    nets = {"no shift": plain}
    for name in variants:
        if name in left_out:
            continue
        net = nets[name] = copy.deepcopy(plain)
        CONVERSIONS[case.method](net, name not in ("stock", OUT_OF_PLACE))
        if name == "stock":
            for module in net.modules():
                if isinstance(module, ShiftedModule):
                    stock = _StockTokens if isinstance(module, TokenShift) else _Stock
                    module.__class__ = type("Stock", (stock, type(module)), {})
        if name == "fused":
            residual.fuse(net)
        if name == "folded":
            residual.fuse(net.eval(), fold_norms=True)
    return nets


def check(nets: dict[str, nn.Module], case: Case, device: torch.device) -> None:
    """Raises Mismatch unless all variants have the outputs of stock, in training also the gradients, in float64."""
    frames = torch.randn(2 * case.segments, 3, 32, 32, dtype=torch.float64, device=device)
    frames = frames.contiguous(memory_format=torch.channels_last)
    results = {}
    for name, net in nets.items():
        if name == "no shift":
            continue
        in_float64 = copy.deepcopy(net).double().train(case.training)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout and stochastic depth
            scores = in_float64(frames)
        parameters = list(in_float64.parameters()) if case.training else []
        results[name] = [scores, *(torch.autograd.grad(scores.square().mean(), parameters) if parameters else ())]
    for name, values in results.items():
        tolerance = 1e-5 if name == "folded" else 1e-8  # weights times norms are rounded to float32
        for ours, theirs in zip(values, results["stock"], strict=True):
            if not (ours - theirs).norm() <= tolerance * theirs.norm():
                raise Mismatch(f"{name}: {case} does not have the outputs and gradients of stock")


def rows(
    device: torch.device, selected: Sequence[Case], repeats: int = 50, protocol: Protocol = RESNETS
) -> Iterator[list[Row]]:
    """Yields, for each case, time and peak memory (with weights and input) of all variants."""
    checked = set()
    for case in selected:
        unchecked = (key := (case.network, case.method, case.training)) not in checked
        checked.add(key)
        yield _rows(case, device, repeats, protocol, unchecked)
        gc.collect()  # frees the networks before the next are built
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(case: Case, device: torch.device, repeats: int, protocol: Protocol, unchecked: bool) -> list[Row]:
    nets = networks(case, device, protocol.variants)
    if unchecked:
        check(nets, case, device)
    torch._dynamo.reset()
    calls, peaks = {}, {}
    # The graphs share their memory, tens of GB: they run one by one, and their results are not read.
    pool = torch.cuda.graph_pool_handle() if case.graph else None
    with _cudnn_benchmark(protocol.cudnn_benchmark):
        for name, net in nets.items():
            calls[name], peaks[name] = _prepared(net, case, device, pool)
        times = timing.medians(calls, device, lambda: None, repeats, protocol.seconds)
    return [
        {
            **case._asdict(),
            "who": name,
            "milliseconds": times[name] * 1e3,
            "of_no_shift": times[name] / times["no shift"],
            "peak_mebibytes": mebibytes(peaks[name]),
            "of_no_shift_memory": _ratio(peaks[name], peaks["no shift"]),
        }
        for name in nets
    ]


@contextlib.contextmanager
def _cudnn_benchmark(enabled: bool) -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _ratio(a: int | None, b: int | None) -> float | None:
    return None if not a or not b else a / b


def _prepared(net: nn.Module, case: Case, device: torch.device, pool: Any) -> tuple[timing.Call, int | None]:
    """Returns the function to time, and its peak memory in bytes, measured without a CUDA graph."""
    frames = torch.randn(case.batch * case.segments, 3, case.size, case.size, device=device)
    frames = frames.contiguous(memory_format=torch.channels_last)
    call = torch.compile(net, dynamic=False, fullgraph=True) if case.compiled else net
    if case.training:
        step = _step(net.train(), call, frames, case)
        step()
        held = 3 * _bytes(net.parameters()) + _bytes(net.buffers()) + _bytes([frames])  # weights, gradients, momentum
        peak = timing.peak_bytes(step, device)
        return timing.captured(step, pool) if case.graph else step, None if peak is None else peak + held
    net.eval()
    if device.type == "cuda":
        net.bfloat16()
        frames = frames.bfloat16()

    def infer() -> Tensor:
        with torch.inference_mode():
            return call(frames)

    peak = timing.peak_bytes(infer, device)
    held = _bytes(net.parameters()) + _bytes(net.buffers()) + _bytes([frames])
    return timing.captured(infer, pool) if case.graph else infer, None if peak is None else peak + held


def _step(net: nn.Module, call: Callable[[Tensor], Tensor], frames: Tensor, case: Case) -> timing.Call:
    """Returns a function that runs one step of SGD under autocast."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.randint(CLASSES, (case.batch,), device=frames.device)
    autocast = torch.autocast("cuda", torch.bfloat16) if frames.is_cuda else contextlib.nullcontext()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            scores = call(frames).unflatten(0, (case.batch, -1)).mean(1)
            loss = F.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()

    return step


def _bytes(tensors) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)

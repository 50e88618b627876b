"""Times whole networks: without shift, with TSM's or TSAM's own shift, with tsm_jit's modules, and fused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tsm_jit import residual, tsam
from tsm_jit.bench import Mismatch, Row, mebibytes, peers, timing
from tsm_jit.convert.tsm import make_temporal_shift
from tsm_jit.modules.base import ShiftedModule
from tsm_jit.plans import Padding, Plan, Shift, temporal

CLASSES = 400  # of Kinetics-400


class Case(NamedTuple):
    """A network and its input: ``batch`` clips of 8 frames, for TSAM with a ninth segment of audio."""

    network: str
    family: str
    batch: int
    training: bool
    compiled: bool
    size: int = 224

    @property
    def segments(self) -> int:
        return 9 if self.family == "TSAM" else 8


def cases(cuda: bool, quick: bool) -> list[Case]:
    """Returns all cases, or a few small ones if ``quick`` or on a CPU, where networks take long."""
    if quick or not cuda:
        return [Case("resnet18", family, 1, training, False, 64) for family in FAMILIES for training in (True, False)]
    selected = []
    for compiled in (False, True):
        for training in (False, True):  # the longest compilations come last
            selected += [Case("resnet50", "TSM", batch, training, compiled) for batch in (32, 8)]
            if not compiled:
                selected += [
                    Case("resnet101", "TSM", 32, training, compiled),
                    Case("resnet50", "TSAM", 32, training, compiled),
                ]
    return selected


def _convert_tsm(net: nn.Module, inplace: bool) -> None:
    make_temporal_shift(net, 8, inplace=inplace)


def _convert_tsam(net: nn.Module, inplace: bool) -> None:
    tsam.make_Shift(net, 9, 8, f_div=8, shift_depth=4, n_insert=1, m_insert=0, inplace=inplace)


FAMILIES: dict[str, Callable[[nn.Module, bool], None]] = {"TSM": _convert_tsm, "TSAM": _convert_tsam}


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


def networks(case: Case, device: torch.device) -> dict[str, nn.Module]:
    """Returns the variants of a network, with the same weights, in channels_last."""
    plain = getattr(torchvision.models, case.network)(num_classes=CLASSES)
    plain.to(device, memory_format=torch.channels_last)
    nets = {"no shift": plain}
    for name in ("stock", "drop-in", "fused"):
        net = nets[name] = copy.deepcopy(plain)
        FAMILIES[case.family](net, name != "stock")
        if name == "stock":
            for module in net.modules():
                if isinstance(module, ShiftedModule):
                    module.__class__ = type("Stock", (_Stock, type(module)), {})
        if name == "fused":
            residual.fuse(net)
    return nets


def check(nets: dict[str, nn.Module], case: Case, device: torch.device) -> None:
    """Raises Mismatch unless all variants have the outputs and gradients of stock, in float64."""
    frames = torch.randn(2 * case.segments, 3, 32, 32, dtype=torch.float64, device=device)
    frames = frames.contiguous(memory_format=torch.channels_last)
    results = {}
    for name, net in nets.items():
        if name == "no shift":
            continue
        twin = copy.deepcopy(net).double().train(case.training)
        scores = twin(frames)
        results[name] = [scores, *torch.autograd.grad(scores.square().mean(), list(twin.parameters()))]
    for name, values in results.items():
        for ours, theirs in zip(values, results["stock"], strict=True):
            if not (ours - theirs).norm() <= 1e-8 * theirs.norm():
                raise Mismatch(f"{name}: {case} does not have the outputs and gradients of stock")


def rows(device: torch.device, selected: list[Case], repeats: int = 50) -> Iterator[list[Row]]:
    """Yields, for each case, time and peak memory (with weights and input) of all variants."""
    checked = set()
    for case in selected:
        nets = networks(case, device)
        if (key := (case.network, case.family, case.training)) not in checked:
            check(nets, case, device)
            checked.add(key)
        torch._dynamo.reset()
        calls, peaks = {}, {}
        for name, net in nets.items():
            calls[name], peaks[name] = _prepared(net, case, device)
        times = timing.medians(calls, device, lambda: None, repeats, seconds=6.0)
        yield [
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


def _ratio(a: int | None, b: int | None) -> float | None:
    return None if not a or not b else a / b


def _prepared(net: nn.Module, case: Case, device: torch.device) -> tuple[timing.Call, int | None]:
    """Returns the function to time, and its peak memory in bytes."""
    frames = torch.randn(case.batch * case.segments, 3, case.size, case.size, device=device)
    frames = frames.contiguous(memory_format=torch.channels_last)
    call = torch.compile(net, dynamic=False, fullgraph=True) if case.compiled else net
    if case.training:
        step = _step(net.train(), call, frames, case)
        step()
        held = 3 * _bytes(net.parameters()) + _bytes(net.buffers()) + _bytes([frames])  # weights, gradients, momentum
        peak = timing.peak_bytes(step, device)
        return step, None if peak is None else peak + held
    net.eval()
    if device.type == "cuda":
        net.bfloat16()
        frames = frames.bfloat16()

    def infer() -> Tensor:
        with torch.inference_mode():
            return call(frames)

    peak = timing.peak_bytes(infer, device)
    held = _bytes(net.parameters()) + _bytes(net.buffers()) + _bytes([frames])
    return timing.captured(infer) if device.type == "cuda" else infer, None if peak is None else peak + held


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

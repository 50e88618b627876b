"""Shared parts of the training examples: processes, precision, checkpoints, logs and the command line. Not a script."""

import argparse
import csv
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class WrongInputError(Exception):
    """The program cannot run with these arguments or files. The message gives the reason in one line."""


class Processes:
    """The processes that ``torchrun`` started, or this process alone. They communicate by NCCL on GPUs, else by gloo.

    Use it as a context manager, which ends the communication.

    Args:
        group_of_one: whether a process alone forms a process group, too, as a ``DeviceMesh`` needs.
    """

    def __init__(self, group_of_one: bool = False):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.count > 1 else 0
        self.on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.count > 1 else 1
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        backend = "nccl" if cuda else "gloo"
        self.grouped = self.count > 1 or group_of_one
        if self.count > 1:
            dist.init_process_group(backend)
        elif group_of_one:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.grouped and (self.count == 1 or error is None):  # after an error, others may be waiting for this one
            dist.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """Replaces ``x`` by its sum over all processes."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the values of the first one, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """Autocast to bfloat16, which needs no loss scale. ``auto`` uses it on GPUs that compute in bfloat16."""
    if precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_bfloat16 else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint. An interrupted write leaves the previous file as it was."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load(path: Path, run: dict) -> dict:
    """Reads a checkpoint of :func:`save`, if its entry ``run`` has the same values as the argument.

    Raises:
        WrongInputError: the file is missing, no checkpoint, or one of a run with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["run"])
    except FileNotFoundError:
        raise WrongInputError(f"{path} does not exist: nothing to resume") from None
    except Exception:  # of another file, any
        raise WrongInputError(f"{path} is no checkpoint of this example") from None
    for key, value in run.items():
        if saved.get(key) != value:
            raise WrongInputError(f"{path} is of another run: its {key} is {saved.get(key)}, not {value}")
    return state


def write_csv(rows: Sequence[dict], path: Path) -> None:
    """Writes rows with the same keys, which are the first line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of a command-line option that is a finite number from ``least`` to ``most``."""
    bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"

    def read(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    read.__name__ = kind.__name__  # for the message of argparse about a text that is no number
    return read


positive = number(int, 1)


def exit_code(run: Callable[[], None], *wrong: type[Exception]) -> int:
    """Calls ``run``. Returns 0, or 2 with one line on stderr if it raises WrongInputError, OSError or ``wrong``."""
    try:
        run()
    except (WrongInputError, *wrong) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.filename or 'the output'}: {error.strerror or error}\n")
        return 2
    return 0

"""Which GPU code to compile: machine code for chosen GPUs, and PTX that the drivers of all other GPUs can compile.

The kernels use nothing newer than sm_80, so machine code for any newer GPU is compiled from the same intermediate code
as the PTX for 8.0. This halves the time: most of it goes into intermediate code.
"""

from __future__ import annotations

import itertools
import re

OLDEST, NEWER = "75", "80"  # what the PTX is for: every supported GPU, or those from 8.0 on
# PyTorch's names for TORCH_CUDA_ARCH_LIST.
_NAMES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;10.3;12.0;12.1",
}


def choose(requested: str, known: list[str], present: list[str], portable: bool) -> tuple[list[str], list[str]]:
    """What to compile for, as ``["sm_90", "compute_80"]``, and the words of ``requested`` that were skipped.

    Args:
        requested: ``"native"``, ``"all"`` or a list as in ``TORCH_CUDA_ARCH_LIST``, such as ``"8.0;9.0+PTX"``. The
            ``+PTX`` changes nothing: there is always PTX for all newer GPUs.
        known: the architectures that the compiler knows, as ``["75", "80", ...]``.
        present: the compute capabilities of this machine's GPUs.
        portable: whether the result must run on every supported GPU.

    Raises:
        ValueError: if the compiler knows none of the requested architectures.
    """
    skipped = []
    if requested == "native":
        native = {arch for arch in present if arch in known}
    elif requested == "all":  # code for the first GPU of a generation runs on the others
        native = set({arch[:-1]: arch for arch in sorted(known, key=int, reverse=True)}.values())
    else:
        native = set()
        for name, meaning in _NAMES.items():
            requested = requested.replace(name, meaning)
        for word in filter(None, re.split(r"[;,\s]+", requested)):
            match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", word)
            if match and match[1] + match[2] in known:
                native.add("".join(match.group(1, 2, 3)))
            else:
                skipped.append(word)
        if not native:
            knows = " ".join(f"{arch[:-1]}.{arch[-1]}" for arch in known)
            raise ValueError(
                "TORCH_CUDA_ARCH_LIST and --arch must list GPU architectures that the compiler knows, such as "
                f"'8.0;9.0+PTX' (it knows {knows}), got {requested!r}"
            )
    all_newer = bool(native) and all(_number(arch) >= int(NEWER) for arch in {*native, *present})
    virtual = NEWER if all_newer and not portable and NEWER in known else OLDEST if OLDEST in known else known[0]
    return [*(f"sm_{arch}" for arch in sorted(native, key=_number)), f"compute_{virtual}"], skipped


def gencode(codes: list[str]) -> list[str]:
    """nvcc's flags for what :func:`choose` returns."""
    ptx = codes[-1].removeprefix("compute_")
    shared = [code for code in codes[:-1] if ptx == NEWER and code.removeprefix("sm_").isdecimal()]
    flags = [f"arch=compute_{ptx},code=[{','.join([*shared, codes[-1]])}]"]
    flags += [f"arch=compute_{code.removeprefix('sm_')},code={code}" for code in codes[:-1] if code not in shared]
    return [f"-gencode={flag}" for flag in flags]


def capabilities(code: str) -> tuple[int, int]:
    """The first and the last compute capability that runs ``code``, such as ``(90, 99)`` for ``"sm_90"``."""
    match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", code)
    assert match is not None, code
    kind, number, suffix = match.groups()
    first = int(number)
    if suffix == "a":
        return first, first
    return (first, first // 10 * 10 + 9) if kind == "sm" or suffix else (first, 10**6)


def _number(architecture: str) -> int:
    return int("".join(itertools.takewhile(str.isdigit, architecture)))

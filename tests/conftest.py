"""Fixtures of every test: the devices, and random numbers whose seed is printed when a test fails."""

import os
import random

import mmaction2_package  # noqa: F401 (before tests that import tsm_jit.mmaction2, which imports mmaction2)
import pytest
import torch

DEVICES = ("cpu", "cuda")


def pytest_configure(config):
    # Processes of tests, and those that they start, share the cores: threads that wait for each other take most of the
    # time. With more threads the operators run without pytest-xdist, as in .ci/sanitize.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    config.addinivalue_line(
        "markers", "feature(name, column=..., text='yes'): the cell of README's table that this tests"
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m leave tests out
def pytest_collection_modifyitems(config, items):
    config.features, config.collected = {}, {item.path.name for item in items}
    for item in items:
        device = getattr(item, "callspec", None) and item.callspec.params.get("device")
        column = "CUDA" if device == "cuda" or "cuda" in item.fixturenames else "CPU"
        if column == "CUDA":
            item.add_marker("gpu")
        for mark in item.iter_markers("feature"):
            cell = mark.args[0], mark.kwargs.get("column", column)
            config.features.setdefault(cell, set()).add(mark.kwargs.get("text", "yes"))


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Every test that takes it runs on the CPU and on a GPU."""
    return available(request.param)


@pytest.fixture
def cuda() -> torch.device:
    return available("cuda")


def available(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(name)


@pytest.fixture
def without_gpu(monkeypatch):
    """The same everywhere: bits can be compared, and no GPU is needed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for every test, or the one in TSM_JIT_TEST_SEED to see a failure again."""
    value = int(os.environ.get("TSM_JIT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    random.seed(value)
    torch.manual_seed(value)
    print(f"TSM_JIT_TEST_SEED={value}")  # pytest shows it with a failure
    return value

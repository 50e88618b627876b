"""One clip over several processes, which run the cases of ``time_parallel``: four on a CPU or a GPU, or one per GPU."""

import multiprocessing
import signal
import time

import pytest
import torch
from processes import start
from time_parallel import runner
from time_parallel.cases import ON_GPUS


@pytest.fixture(params=ON_GPUS)
def transport(request, cuda) -> str:
    if "one GPU" not in request.param and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    if request.param == "peer memory" and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the GPUs do not reach each other's memory")
    return request.param


def test_clips_split_over_processes(seed, tmp_path):
    start(runner.run, (4, tmp_path, seed, "gloo"), 4)


def test_clips_split_over_gpus(seed, tmp_path, transport):
    world = 4 if "one GPU" in transport else min(4, torch.cuda.device_count())
    start(runner.run, (world, tmp_path, seed, transport), world, forked=False)


def test_a_gpu_whose_process_dies(tmp_path, transport):
    """The other one ends with an error, or PyTorch ends it, some time after the time-out of five seconds."""
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, tmp_path, transport) for rank in range(2)]
    processes = [context.Process(target=runner.run_with_a_rank_that_dies, args=each) for each in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 90
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    survivor, dead = [process.exitcode for process in processes]
    assert dead == 0
    assert (tmp_path / "waits").exists()
    assert survivor in (runner.GETS_AN_ERROR, -signal.SIGABRT)

"""One clip over several processes, which run the cases of ``time_parallel.py``: four on a CPU, or one for each GPU."""

import multiprocessing
import time

import pytest
import time_parallel
import torch

needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
links = pytest.mark.parametrize("has_links", [True, False], ids=["peer memory", "NCCL"])


def run_cases(world, folder, seed, device, has_links, start_method) -> None:
    arguments = time_parallel.run, (world, folder, seed, device, has_links)
    failures = []
    try:
        torch.multiprocessing.start_processes(*arguments, nprocs=world, start_method=start_method)
    except torch.multiprocessing.ProcessException as error:
        cases = {path.stem: path.read_text() for path in folder.glob("*.case")}
        failures.append(f"{error}. The last cases of the ranks: {cases}")
    for path in folder.glob("*.pt"):
        failures += [f"{name}, rank {path.stem}: {text}" for name, text in torch.load(path).items()]
    assert not failures, "\n".join(failures)


def test_clips_split_over_processes(seed, tmp_path):
    # One process imports what takes seconds, and the four are its forks.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "torchvision", "time_parallel"])
    run_cases(4, tmp_path, seed, "cpu", False, "forkserver")


@needs_gpus
@links
def test_clips_split_over_gpus(seed, tmp_path, has_links):
    if has_links and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the GPUs do not reach each other's memory")
    run_cases(min(4, torch.cuda.device_count()), tmp_path, seed, "cuda", has_links, "spawn")


@needs_gpus
@links
def test_a_gpu_whose_process_dies(tmp_path, has_links):
    """The other one ends with an error, at the latest some time after the time-out of ten seconds."""
    if has_links and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the GPUs do not reach each other's memory")
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, tmp_path, has_links) for rank in range(2)]
    processes = [context.Process(target=time_parallel.run_with_a_rank_that_dies, args=each) for each in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(deadline - time.monotonic())
        if process.is_alive():
            process.kill()
            pytest.fail("a rank hangs")
    assert [process.exitcode == 0 for process in processes] == [False, True]

"""One clip over several processes: four of them, started once, run all cases of ``time_parallel.py``."""

import multiprocessing

import time_parallel
import torch


def test_clips_split_over_processes(seed, tmp_path):
    # One process imports what takes seconds, and the four are its forks.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "torchvision", "time_parallel"])
    arguments = time_parallel.run, (tmp_path, seed)
    torch.multiprocessing.start_processes(*arguments, nprocs=time_parallel.WORLD, start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(time_parallel.WORLD)]
    failures = [f"{name}, rank {rank}: {text}" for rank, failed in enumerate(results) for name, text in failed.items()]
    assert not failures, "\n".join(failures)

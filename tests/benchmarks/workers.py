"""The cost of many worker processes: the main process's time per batch, and the start and memory of the workers.

    python -m tests.benchmarks.workers [--workers 2 16 64] [--batches 150]

Decoding is replaced: each sample is the same ready image, so that workers return batches as fast as the machine copies them.
Main thread and main process are CPU times; the process includes the threads that send keys and, with --pin on a GPU, the
thread that copies batches to pinned memory. The number of workers does not depend on the number of cores. "fresh" means that
shared memory is allocated for each batch, as torch's DataLoader does by itself."""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from reslt.core.batch_shard import BatchShard
from reslt.loading.batches import ShuffledBatches
from reslt.loading.workers import Workers
from tests.benchmarks.lists import memory_of
from tests.benchmarks.turns import machine

SHAPES = ((224, 256), (32, 4096))  # pixels per side, images per batch


class Ready(torch.utils.data.Dataset):
    """A dataset with one image for every key, at no cost."""

    def __init__(self, size: int):
        self.image = torch.zeros(3, size, size, dtype=torch.uint8)

    def __getitems__(self, keys: np.ndarray) -> list[tuple[torch.Tensor, int]]:
        return [(self.image, 0)] * len(keys)


@dataclass(frozen=True)
class Cost:
    """The measured cost of one loader."""

    start_seconds: float  # CPU time of the main process until the first batch
    main_thread: float  # milliseconds of CPU time per batch
    main_process: float  # milliseconds of CPU time per batch, all threads
    wall: float  # milliseconds per batch, including the workers
    own_bytes: float  # per worker: pages that it shares with no other process


def measure(size: int, batch: int, workers: int, batches: int, is_fresh: bool, pin: bool) -> Cost:
    """Measure `batches` batches after each worker has made two."""
    began = time.process_time()
    sampler = ShuffledBatches(np.arange((3 * workers + batches) * batch), BatchShard(batch), seed=0)
    loader = Workers(
        Ready(size), sampler, workers, pin_memory=pin, image_bytes=0 if is_fresh else 3 * size**2, most=workers
    )
    others = set(multiprocessing.active_children())
    arriving = iter(loader)
    next(arriving)
    started = time.process_time() - began
    for _ in range(2 * workers):
        next(arriving)
    thread, process, wall = time.thread_time(), time.process_time(), time.perf_counter()
    for _ in range(batches):
        next(arriving)
    costs = time.thread_time() - thread, time.process_time() - process, time.perf_counter() - wall
    pids = [worker.pid for worker in multiprocessing.active_children() if worker not in others]
    own = memory_of(pids).own
    arriving.close()
    loader.end()
    return Cost(started, *(1e3 * cost / batches for cost in costs), own)


def main(arguments: list[str] | None = None) -> dict[tuple[int, int, bool], Cost]:
    """Print the table; return {(pixels per side, workers, whether memory is fresh): costs}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 16, 64], help="numbers of workers")
    parser.add_argument("--batches", type=int, default=150, help="measured batches per loader")
    parser.add_argument("--size", type=int, help="pixels per side; unset: those of the table")
    parser.add_argument("--pin", action="store_true", help="copy batches to pinned memory (on a GPU)")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    print(machine())
    print(
        f"{'':<26}{'workers':>8}{'main thread':>13}{'main process':>14}{'wall':>9}{'start':>9}{'own pages of a worker':>24}"
    )
    found = {}
    for size, batch in SHAPES if given.size is None else [(given.size, SHAPES[0][1])]:
        for workers in given.workers:
            for is_fresh in (False, True):
                cost = measure(size, batch, workers, given.batches, is_fresh, given.pin)
                found[size, workers, is_fresh] = cost
                title = "  fresh" if is_fresh else f"{batch:,} images of {size} px"
                print(
                    f"{title:<26}{workers:>8}{cost.main_thread:>10.2f} ms{cost.main_process:>11.2f} ms{cost.wall:>6.1f} ms"
                    f"{cost.start_seconds:>7.1f} s{cost.own_bytes / 2**20:>20.0f} MiB",
                    flush=True,
                )
    return found


if __name__ == "__main__":
    main()

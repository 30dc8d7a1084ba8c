"""Worker processes that read and decode images."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.signals import STOP_SIGNALS


class Workers:
    """Batches of a dataset's samples in a sampler's order, made by worker processes (`workers` 0: by this one). They are
    kept from one epoch to the next."""

    def __init__(
        self,
        dataset: Dataset,
        batches: Sampler | list,
        workers: int,
        collate: Callable = default_collate,
        pin_memory: bool = False,
    ):
        """At most one worker per CPU core. A dataset's `__getitems__` may return a UserError, which is raised here: torch
        would wrap an exception of a worker in its traceback."""
        count = min(workers, available_cores())
        self.is_guarded = False
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=count,
            collate_fn=UnlessFault(collate),
            pin_memory=pin_memory,
            persistent_workers=count > 0,
            generator=torch.Generator(),  # else each epoch would draw a number from the global generator
            worker_init_fn=_begin_worker,
        )

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        if self.loader.num_workers and not self.is_guarded:
            atexit.register(_end_workers)  # behind torch's own, so that it comes before them
            self.is_guarded = True
        for batch in batches:
            if isinstance(batch, UserError):
                self._end_epoch()
                raise batch
            yield batch

    def _end_epoch(self) -> None:
        """Let the workers of an epoch that broke off go. Left to the garbage collector, which may take their queues before
        them, torch would wait ten seconds for each. It has no public name for this."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


class UnlessFault:
    """A collate function that passes a fault on as it is. (A class: workers may be spawned, and a closure has no name.)"""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list | UserError):
        return samples if isinstance(samples, UserError) else self.collate(samples)


def _end_workers() -> None:
    """At this process's exit in the middle of an epoch. torch would wait five seconds for each worker, then send SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's end for a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # as workers are; Python itself would end these
            child.kill()


def _begin_worker(worker: int) -> None:
    """Signals are the main process's affair: a worker that ended at one would take the run with it before its checkpoint.
    It ends with its parent. The garbage collector marks the objects it visits: without `freeze`, a forked worker copies
    every page that holds one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()

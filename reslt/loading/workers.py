"""Worker processes that read and decode images."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from reslt.core.cpu import available_cores
from reslt.core.environment import explained
from reslt.core.errors import UserError
from reslt.core.ranks import let_collectives_end
from reslt.core.signals import STOP_SIGNALS
from reslt.loading.slots import BatchesWithSlots, IntoSlots, SamplesWithSlots, Slots

PREFETCHED = 2  # batches requested from each worker in advance
LOOSE = 4  # batches in use by the main process


class Workers:
    """Batches of a dataset's samples in a sampler's order, made by worker processes, or with `workers` 0 by this process.
    The workers are kept from one epoch to the next."""

    def __init__(
        self,
        dataset: Dataset,
        batches: Sampler | list,
        workers: int,
        collate: Callable = default_collate,
        pin_memory: bool = False,
        image_bytes: int = 0,
        most: int | None = None,
    ):
        """There are at most `most` workers, None: one per CPU core. A dataset's `__getitems__` may return a UserError, which
        is raised here: torch would wrap a worker's exception in its traceback. `image_bytes`: the size of a sample's image,
        if samples are uint8 images of one size with labels, and `batches` are ShuffledBatches; workers then write batches
        to memory that is reused."""
        count = min(workers, most or available_cores())
        self.is_guarded = False
        if count and image_bytes:
            needed = count * PREFETCHED + LOOSE, batches.images_at_once * image_bytes
            if (slots := Slots.created(*needed)) is not None:
                dataset, collate = SamplesWithSlots(dataset), IntoSlots(slots)
                batches = BatchesWithSlots(batches, slots)
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=count,
            collate_fn=UnlessFault(collate),
            pin_memory=pin_memory,
            persistent_workers=count > 0,
            prefetch_factor=PREFETCHED if count else None,
            generator=torch.Generator(),  # without it, each epoch would draw a number from the global generator
            worker_init_fn=_begin_worker,
        )

    def __iter__(self) -> Iterator:
        if self.loader.num_workers and self.loader._iterator is None:
            let_collectives_end()  # before workers are forked
        batches = iter(self.loader)
        if self.loader.num_workers and not self.is_guarded:
            atexit.register(_end_workers)  # registered after torch's own, so that it runs before them
            self.is_guarded = True
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    self.end()
                    raise batch
                yield batch
        except (RuntimeError, OSError):  # one of the workers failed; the others would fail too, each with a traceback
            _end_workers(getattr(self.loader._iterator, "_workers", ()))
            raise

    def end(self) -> None:
        """End the workers, even mid-epoch. Without this call, the garbage collector may collect their queues first, and
        torch would wait ten seconds for each worker. torch has no public name for this."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


class UnlessFault:
    """A collate function that passes errors on. It is a class because workers may be spawned, and closures cannot be
    pickled."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list | UserError):
        return samples if isinstance(samples, UserError) else self.collate(samples)


def _end_workers(workers: Iterable[BaseProcess] | None = None) -> None:
    """Kill workers, by default all workers of this process, which exits mid-epoch: torch would wait five seconds for each,
    then send SIGTERM."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch treats a worker's end as a failure
    for child in multiprocessing.active_children() if workers is None else workers:
        if child.daemon:  # as workers are; Python itself would end daemons too
            child.kill()


def _begin_worker(worker: int) -> None:
    """Prepare a worker process.

    It ignores stop signals, which the main process handles: a worker ended by a signal would end the run before its
    checkpoint. A worker ends with its parent. The garbage collector marks the objects that it visits: without `freeze`, a
    forked worker would copy every page that contains one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # a forked worker inherits the main process's, which watches its waits
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda fault, batch: _end_worker(fault))
    sys.excepthook = lambda kind, fault, frames: _end_worker(fault)
    gc.freeze()


def _end_worker(fault: BaseException) -> NoReturn:
    """End this worker because one of its threads cannot send a batch: Python would print the error and continue without the
    batch, for which the main process would wait forever. (The hook of Python's queues has no public name.)"""
    message = explained(fault)
    sys.stderr.write(f"error: {message}\n" if message else "".join(traceback.format_exception(fault)))
    sys.stderr.flush()
    os._exit(1)

"""The CPU cores that this process may use, and limits on the time they lose to spinning threads, to memory that is returned
and cleared, and to garbage collection."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SPIN_COUNT = 2_000  # loops of a waiting thread before it sleeps; unbounded threads spin for milliseconds

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGEST_KEPT = 1 << 30  # bytes; memory of larger allocations is returned to the system


def available_cores() -> int:
    """Return the number of CPU cores this process may use; more workers than that only slow each other down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bound_spinning() -> None:
    """Make OpenMP's threads sleep after a short wait, unless the environment sets it. Call before importing torch.

    Threads that spin while they wait occupy cores that another busy process needs: a demo run used 23 minutes of CPU time
    instead of 3. On idle cores the limit costs less than 2 %."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, unless the environment sets its limits. Do nothing on systems
    without glibc.

    By default, glibc returns the memory of each large activation to the system, which clears it before the next use:
    forward passes of EfficientNet-Lite0 with batches of 128 images of 96 x 96 pixels took 7.9 ms of CPU time per image
    instead of 2.5."""
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Collect no garbage within the block, which imports large packages, and exclude the imported objects from later
    collections.

    Modules are hardly ever garbage, but each pass over the 400,000 objects of torch and timm takes 0.2 seconds. Such passes
    take a quarter of the time of their import, and delay training each time all objects are examined."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # only once: later, garbage of an earlier run in this process would be frozen too
            gc.collect()  # errors that packages caught refer to the frames above them, and so to the caller's objects
            gc.freeze()
        if was_enabled:
            gc.enable()

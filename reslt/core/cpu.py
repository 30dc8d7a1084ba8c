"""The CPU cores that this process may use, and threads that leave them to others while they wait."""

from __future__ import annotations

import os

SPIN_COUNT = 1_000  # loops of a waiting thread before it sleeps; unbounded threads spin for milliseconds


def available_cores() -> int:
    """CPU cores this process may use; more workers than that only take time from each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bound_spinning() -> None:
    """Have OpenMP's threads sleep after a short wait, unless the environment says how they wait. Call before torch is loaded.

    Beside another busy process, two threads that spin for each other take the core that the other one needs: a demo run
    used 23 minutes of CPU time instead of 3. On idle cores nothing is lost."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)

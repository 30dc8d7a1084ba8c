"""The CPU cores of this machine that the process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """CPU cores this process may use; more workers than that only take time from each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

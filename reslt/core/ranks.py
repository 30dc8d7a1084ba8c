"""The rank of this process, from the launcher's environment; requires no torch."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Return whether this is the first of the launched processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_local_main_process() -> bool:
    """Return whether this is the first process on its machine: an error found by all is printed once per console."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"

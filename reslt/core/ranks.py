"""The rank of this process, from the launcher's environment; requires no torch."""

from __future__ import annotations

import os


def launched_processes() -> int:
    """Return the number of processes that a launcher started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the first of the launched processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_local_main_process() -> bool:
    """Return whether this is the first process on its machine: an error found by all is printed once per console."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def process_name() -> str:
    """Return 'process 1', as messages of one of several processes call it."""
    return f"process {os.environ.get('RANK', '0')}"


def local_main_process_name() -> str:
    """Return 'process 8': the first process on this machine."""
    return (
        f"process {int(os.environ.get('RANK', '0')) - int(os.environ.get('LOCAL_RANK', os.environ.get('RANK', '0')))}"
    )

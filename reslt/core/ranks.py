"""The rank of this process, from the launcher's environment. Loads no torch."""

from __future__ import annotations

import os
import time

QUIET_SECONDS = 0.1


def launched_processes() -> int:
    """Return the number of processes that a launcher started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the first of the launched processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_local_main_process() -> bool:
    """Return whether this is the first process on its machine, which prints an error that all processes find."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def process_name() -> str:
    """Return the name of this process in messages, such as 'process 1'."""
    return f"process {os.environ.get('RANK', '0')}"


def local_main_process_name() -> str:
    """Return the name in messages of the first process on this machine, such as 'process 8'."""
    rank = os.environ.get("RANK", "0")
    return f"process {int(rank) - int(os.environ.get('LOCAL_RANK', rank))}"


def let_collectives_end() -> None:
    """Wait until the threads of a collective that has just ended have left Python, if several processes were launched.

    To release a tensor, such a thread takes Python's locks. A worker forked meanwhile would wait for one of them forever
    (Python 3.11 and older), and so would a process that destroys its process group, which waits for the thread (torch
    2.8)."""
    if launched_processes() > 1:
        time.sleep(QUIET_SECONDS)

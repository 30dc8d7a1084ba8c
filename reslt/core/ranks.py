"""Which of the launched processes this is, as the launcher's environment says; no torch needed."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_local_main_process() -> bool:
    """Whether this is the first process on its machine: what each of them finds is reported once on every console."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"

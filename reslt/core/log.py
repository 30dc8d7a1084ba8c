"""Warnings and progress of a run, through Python's logging."""

from __future__ import annotations

import sys

from tqdm import tqdm

from reslt.core.ranks import is_main_process


def say(warning: str) -> None:
    """One clear line on standard error, of the first process alone."""
    if is_main_process():
        print(f"warning: {warning}", file=sys.stderr)


def progress_bar(is_shown: bool, title: str, steps: int, done: int = 0) -> tqdm:
    """A bar on a terminal; nothing elsewhere, or on another process than the first."""
    return tqdm(
        total=steps,
        initial=done,
        desc=title,
        unit="batch",
        leave=False,
        disable=None if is_shown else True,
        dynamic_ncols=True,
    )

"""The one kind of fault a user can mend, and how an entry point reports it."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave: its text names place, value and remedy."""


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `main` so that a `UserError` ends the process with exit code 2 and its text alone, Ctrl-C with 130, SIGTERM
    with 143 after everything on the way out was put in order."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> None:
        try:
            with _ended_by_signals():
                main(*args, **kwargs)
        except UserError as fault:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # `... | head` closed our standard output: nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as fault:  # no such folder, not permitted, disk full: the machine's state, not ours
            if fault.filename is None:
                raise
            print(f"error: {fault.filename}: {fault.strerror}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    return guarded


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and the end of the terminal where it is not ignored, raise SystemExit with the shell's exit code."""

    def end(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers there alone
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """argparse that takes flags by their whole names and raises UserError instead of printing its usage."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message}; `{self.prog} --help` lists all flags")


def did_you_mean(word: str, known: list[str]) -> str:
    """' (did you mean X?)' for the closest known word, else ''."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""

"""Shared by every command: the argument parser, the exit codes, and the messages when it ends early."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reslt.core.cpu import bound_spinning
from reslt.core.errors import LocalFault, Stopped, UserError
from reslt.core.log import log_to_console
from reslt.core.ranks import is_local_main_process, is_main_process
from reslt.core.text import printable, printable_output


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `main` so that a `UserError` prints only its text and exits with code 2, Ctrl-C exits with 130, and
    SIGTERM with 143 after an orderly cleanup. An error that all processes find is reported by one per machine."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> None:
        bound_spinning()
        log_to_console()
        try:
            with _ended_by_signals(), printable_output():
                main(*args, **kwargs)
        except LocalFault as fault:
            of_several = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
            _report(f"error: {of_several}{fault}")
            sys.exit(2)
        except UserError as fault:
            if is_local_main_process():
                _report(f"error: {fault}")
            sys.exit(2)
        except Stopped as stopped:
            if is_main_process():
                _report(f"\n{stopped}")
            sys.exit(stopped.exit_code)
        except BrokenPipeError:  # `... | head` closed our standard output: not an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as fault:  # no such folder, no permission, disk full: the machine's state, not a bug
            if fault.filename is None:
                raise
            _report(f"error: {fault.filename}: {fault.strerror}")
            sys.exit(2)
        except RuntimeError as fault:
            if not _lost_the_others(fault):
                raise
            reason = str(fault).strip().splitlines()[0]
            _report(f"process {os.environ['RANK']}: lost the other processes; see their message ({reason})")
            sys.exit(1)
        except KeyboardInterrupt:
            if is_main_process():
                print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    return guarded


def _report(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _lost_the_others(fault: RuntimeError) -> bool:
    """Return whether this process failed because another one ended (torch's DistError, or gloo's RuntimeError)."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(fault).__mro__)
    of_gloo = any(words in str(fault) for words in ("by peer", "Broken pipe"))
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and (of_torch or of_gloo)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within the block, SIGTERM, SIGUSR1 (SLURM's warning) and SIGHUP (the terminal's end), unless ignored, raise
    SystemExit with the shell's exit code."""

    def end(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
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
    """An argument parser that accepts no abbreviated flags and raises UserError instead of printing its usage."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message}; `{self.prog} --help` lists all flags")

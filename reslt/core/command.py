"""Shared by every command: the argument parser, the exit codes, and the messages when it ends early."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

from reslt.core.cpu import bound_spinning, keep_freed_memory
from reslt.core.environment import explained, mend_standard_streams
from reslt.core.errors import LocalFault, Stopped, UserError
from reslt.core.log import log_to_console
from reslt.core.ranks import is_local_main_process, is_main_process, launched_processes, process_name
from reslt.core.spelling import did_you_mean
from reslt.core.text import printable, printable_output
from reslt.core.waiting import waits_watched

# Delay before a process other than the first on its machine reports an error. If the first one finds it too, the launcher
# ends all processes by then, which takes some seconds on a busy machine.
REPORT_LATER_SECONDS = 10.0


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `main`: a `UserError` or a fault of the environment prints only its text and exits with code 2, Ctrl-C exits
    with 130, and SIGTERM with 143 after an orderly cleanup. One process per machine reports an error that all of them
    find."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> None:
        bound_spinning()
        keep_freed_memory()
        mend_standard_streams()
        log_to_console()
        of_several = f"{process_name()}: " if launched_processes() > 1 else ""
        try:
            with _ended_by_signals(), waits_watched() if of_several else nullcontext(), printable_output():
                main(*args, **kwargs)
                sys.stdout.flush()  # else Python reports a full disk only at its exit
        except LocalFault as fault:
            _fail(f"error: {of_several}{fault}")
        except UserError as fault:
            if not is_local_main_process():
                time.sleep(REPORT_LATER_SECONDS)
            _fail(f"error: {'' if is_local_main_process() else of_several}{fault}")
        except Stopped as stopped:
            _fail(f"\n{stopped}" if is_main_process() else None, stopped.exit_code)
        except BrokenPipeError:  # `... | head` closed our standard output: not an error
            _fail(None, 1)
        except KeyboardInterrupt:
            _fail("\ninterrupted" if is_main_process() else None, 130)
        except Exception as fault:
            if _lost_the_others(fault):
                reason = str(fault).strip().splitlines()[0]
                _fail(f"{of_several}lost the other processes; see their message ({reason})", 1)
            if (message := explained(fault)) is None:
                raise
            _fail(f"error: {of_several}{message}")

    return guarded


def exit_code_of(command: Callable[[], None]) -> int:
    """Call a command in this process and return the exit code that it would end a process of its own with. Print the error
    that ends it, as `entry_point` does."""
    try:
        command()
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except Stopped as stopped:
        message, code = f"\n{stopped}", stopped.exit_code
    except UserError as fault:
        message, code = f"error: {fault}", 2
    except Exception as fault:
        if (reason := explained(fault)) is None:
            traceback.print_exc()
            return 1
        message, code = f"error: {reason}", 2
    print(printable(message), file=sys.stderr)
    return code


def _fail(message: str | None, code: int = 2) -> NoReturn:
    """Print a message to standard error and exit. Drop the rest of standard output if it cannot be written."""
    if message:
        print(printable(message), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its exit
        with suppress(OSError):  # in a test, standard output has no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _lost_the_others(fault: Exception) -> bool:
    """Return whether this process failed because another one ended or is stuck (torch's DistError, or gloo's
    RuntimeError)."""
    of_torch = any(kind.__name__ == "DistError" for kind in type(fault).__mro__)
    of_gloo = any(words in str(fault) for words in ("by peer", "Broken pipe", "Timed out waiting"))
    return launched_processes() > 1 and isinstance(fault, RuntimeError) and (of_torch or of_gloo)


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

    def error(self, message: str) -> NoReturn:
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        hint = did_you_mean(words.partition(" ")[0], list(self._option_string_actions)) if is_unknown else ""
        raise UserError(f"{message}{hint}; `{self.prog} --help` lists all flags")

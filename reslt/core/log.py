"""The logger `reslt`, for the console and a run's train.log, and progress bars.

Warnings go to standard error, everything else to standard output. Only the main process prints, except in
`log_from_here`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from reslt.core.environment import explained
from reslt.core.errors import Stopped, UserError
from reslt.core.ranks import is_main_process
from reslt.core.text import printable
from reslt.core.turns import Turn, own_turn

logger = logging.getLogger("reslt")


class Console(logging.Handler):
    """A handler that prints messages to the current standard streams, warnings with the prefix `warning: `. If they are
    redirected to a full disk, the run continues."""

    is_lost = False  # whether standard output could not be written

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process() or record.__dict__.get("is_from_any_process"):
            is_plain = record.levelno < logging.WARNING
            text = record.getMessage() if is_plain else f"{record.levelname.lower()}: {record.getMessage()}"
            stream = sys.stdout if is_plain else sys.stderr
            try:
                tqdm.write(printable(text), file=stream)  # above a bar, if there is one
                stream.flush()
            except BrokenPipeError:  # `... | head` ends the run
                raise
            except OSError as fault:
                if stream is sys.stdout and not self.is_lost:
                    self.is_lost = True
                    print(f"warning: standard output cannot be written: {fault.strerror}", file=sys.stderr)


class RunLog(logging.FileHandler):
    """A file of messages with their times. A full disk does not end a run here; writing a checkpoint reports it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


_CONSOLE = Console()


def log_to_console() -> None:
    """Print the logger's messages. For commands; a program that imports the package decides for itself."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if _CONSOLE not in logger.handlers:
        logger.addHandler(_CONSOLE)


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Within the block, also append the logger's messages to a file, and then the error or signal that ends the block. If
    several runs share the process, the file receives only the messages of this one."""
    handler, turn = RunLog(file, encoding="utf-8", delay=True), own_turn()
    handler.addFilter(lambda record: own_turn() is turn)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except Exception as end:
        text = str(end) if isinstance(end, (UserError, Stopped)) else explained(end) or f"{type(end).__name__}: {end}"
        level = logging.INFO if isinstance(end, Stopped) else logging.ERROR
        handler.handle(logger.makeRecord(logger.name, level, "", 0, text, (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


_WARNED: set[tuple[Turn | None, str]] = set()


def warn_once(kind: str, text: str) -> None:
    """Log a warning that may recur, at every step for example: only the first one of its `kind` in a run."""
    if (own_turn(), kind) not in _WARNED:
        _WARNED.add((own_turn(), kind))
        logger.warning(text)


def log_from_here(level: int, text: str) -> None:
    """Log a message of this process, even if it is not the main one."""
    logger.log(level, text, extra={"is_from_any_process": True})


def progress_bar(is_shown: bool, title: str, steps: int, done: int = 0) -> tqdm:
    """Return a progress bar, which is displayed on a terminal if `is_shown`."""
    return tqdm(
        total=steps,
        initial=done,
        desc=title,
        unit="batch",
        leave=False,
        disable=None if is_shown else True,
        dynamic_ncols=True,
    )

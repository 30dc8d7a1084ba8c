"""What a command says while it works: the logger `reslt`, on the console and in a run's train.log, and progress bars.

Warnings go to standard error, everything else to standard output. Of several processes the main one speaks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from reslt.core.errors import Stopped, UserError
from reslt.core.ranks import is_main_process

logger = logging.getLogger("reslt")


class Console(logging.Handler):
    """Writes messages as they are, and warnings after `warning: `, to the streams that are current at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            is_plain = record.levelno < logging.WARNING
            text = record.getMessage() if is_plain else f"{record.levelname.lower()}: {record.getMessage()}"
            stream = sys.stdout if is_plain else sys.stderr
            tqdm.write(text, file=stream)  # above a bar, if there is one
            stream.flush()


class RunLog(logging.FileHandler):
    """A file of messages with their times. A full disk must not end a run: its checkpoints report it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


_CONSOLE = Console()


def log_to_console() -> None:
    """Show the logger's messages. For commands; a program that imports the package decides for itself."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if _CONSOLE not in logger.handlers:
        logger.addHandler(_CONSOLE)


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Append the logger's messages to a file too, and how the block ends if a mistake or a signal ends it."""
    handler = RunLog(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except (UserError, Stopped) as end:
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, "%s", (end,), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def progress_bar(is_shown: bool, title: str, steps: int, done: int = 0) -> tqdm:
    """A bar on a terminal; nothing elsewhere, or on another process than the main one."""
    return tqdm(
        total=steps,
        initial=done,
        desc=title,
        unit="batch",
        leave=False,
        disable=None if is_shown else True,
        dynamic_ncols=True,
    )

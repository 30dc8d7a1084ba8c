"""Locks that allow one process at a time to work in a folder, and the removal of files that killed processes left there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from reslt.core.errors import UserError
from reslt.core.files import UNFINISHED, remove
from reslt.core.log import logger
from reslt.core.turns import take_turns

AT_WORK = "another process is using"
PATIENCE_SECONDS = 0.5  # `is_locked` takes a lock for an instant, which must not make `locked` fail
SILENT_SECONDS = 5.0  # of waiting before a message


@contextmanager
def locked(place: Path, waits: bool = False) -> Iterator[None]:
    """Within the block, lock a folder or file, which need not exist, with the file `.<name>.lock` next to it. If the process
    ends for any reason, the system releases the lock. On a file system without locks, warn and lock nothing.

    If another process has the lock, raise UserError or, with `waits`, report it and wait."""
    lock = FileLock(lock_file(place))
    lock_file(place).parent.mkdir(parents=True, exist_ok=True)
    try:
        _acquire(lock, place, waits)
    except (OSError, NotImplementedError) as fault:  # no Timeout, which is an OSError too: `_acquire` handles it
        logger.warning(f"{place} cannot be locked ({fault}): do not start a second process that writes to it")
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, place: Path, waits: bool) -> None:
    try:
        lock.acquire(timeout=SILENT_SECONDS if waits else PATIENCE_SECONDS)
    except Timeout:
        if not waits:
            raise UserError(f"{AT_WORK} {place}; wait for it to end, or stop it") from None
        logger.warning(f"waiting: {AT_WORK} {place}")
        while not lock.is_locked:
            take_turns()
            with suppress(Timeout):
                lock.acquire(timeout=PATIENCE_SECONDS)


def is_locked(place: Path) -> bool:
    """Return whether a folder or file is locked by another process."""
    if not lock_file(place).exists():
        return False
    try:
        with FileLock(lock_file(place), timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks
        return False


def lock_file(place: Path) -> Path:
    """Return the file that `locked` locks."""
    place = place.resolve()
    return place.with_name(f".{place.name}.lock")


def sweep(folder: Path, below: bool = False) -> None:
    """Remove the unfinished files and folders that killed processes left in a folder and, with `below`, in its subfolders.
    The folder need not exist.

    Files of a process that is still writing are kept if it has locked their target. If such processes lock the folder
    instead, call this with that lock. Names such as .2024.notes, which earlier versions used, may be a user's own and are
    kept."""
    for path in list(folder.rglob(".[0-9]*") if below else folder.glob(".[0-9]*")):
        found = UNFINISHED.fullmatch(path.name)
        if found and found["random"] and not is_locked(folder / found["target"]):
            remove(path)

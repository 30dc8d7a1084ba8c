"""Locks that allow one process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from reslt.core.errors import UserError
from reslt.core.log import logger

AT_WORK = "another process is using"
PATIENCE_SECONDS = 0.5  # `is_locked` takes a lock for an instant, which must not make `locked` fail


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which need not exist: `.<name>.lock` next to it. The lock is released when its process
    ends, however that ends. Raises UserError if another process holds it. On a file system without locks, nothing is
    locked."""
    lock = FileLock(lock_file(folder))
    lock_file(folder).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise UserError(f"{AT_WORK} {folder}; wait for it to end, or stop it") from None
    except (OSError, NotImplementedError) as fault:
        logger.warning(f"{folder} cannot be locked ({fault}): do not start a second run in it")
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder."""
    if not lock_file(folder).exists():
        return False
    try:
        with FileLock(lock_file(folder), timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks
        return False


def lock_file(folder: Path) -> Path:
    """Return the file that `locked` locks."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")

"""One process at a time in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.files import _named

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


AT_WORK = "another process is at work in"


LOCK_ATTEMPTS, SECONDS_BETWEEN_ATTEMPTS = 5, 0.1  # `user_of` holds a lock for an instant, which must refuse nobody


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time at a folder, which need not exist: `.<name>.lock` beside it holds the process's number.

    The lock ends with its process, however that ends, and forked workers do not hold it. Raises UserError where another
    process has it. On Windows, and on file systems without such locks, nothing is locked."""
    if fcntl is None:
        yield
        return
    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(LOCK_ATTEMPTS):
        time.sleep(SECONDS_BETWEEN_ATTEMPTS * (attempt > 0))
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor) and _still_names(file, descriptor):
            break
        os.close(descriptor)
    else:
        raise UserError(f"{AT_WORK} {folder} (number {user_of(folder) or 'unknown'}); wait for it or end it")
    try:
        with _named(file):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock ends, so that it is ours
        os.close(descriptor)


def user_of(folder: Path) -> str | None:
    """The number of the process that holds a folder's lock ('' where it has not written it yet); None: nobody does.

    Not for the holder itself: closing the file would end its lock."""
    try:
        descriptor = os.open(lock_file(folder), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if fcntl is None or _lock(descriptor) else os.read(descriptor, 32).decode()
    finally:
        os.close(descriptor)


def lock_file(folder: Path) -> Path:
    """The file that `locked` locks."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def _lock(descriptor: int) -> bool:
    """Whether this process has the lock now. A POSIX lock is the process's own: a forked worker does not inherit it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _still_names(file: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file; its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False

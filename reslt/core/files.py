"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reslt.core.log import warn_once

# Names of unfinished files and folders; those of earlier versions have no random part.
UNFINISHED = re.compile(r"\.\d+(-(?P<random>[0-9a-f]{8}))?\.(?P<target>.+)", re.DOTALL)
NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


def regular_file(path: Path) -> Path:
    """Return the path of a file to read. Raises OSError if it is missing, or if it is a pipe or a device, from which
    reading might never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # the caller's open() reports a folder
        kind = "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise OSError(errno.EINVAL, f"it is a {kind}; give a file on disk", str(path))
    return path


def read_json(file: Path) -> dict:
    """Return the mapping in a JSON file; {} if the file is missing, unreadable, or contains no mapping."""
    try:
        content = json.loads(regular_file(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def atomic_file(file: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `file` if the block succeeds, and removed if not.

    `durable`: flush it to disk first (takes milliseconds: not for thousands of small files)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(file)
    try:
        with named(file):
            temporary.touch()
            mode = temporary.stat().st_mode  # the user's default, restored below: writers of weights narrow it
            yield temporary
            temporary.chmod(stat.S_IMODE(mode))
            if durable:
                flush(temporary)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """Yield a folder to write files to; it is renamed to `folder` if the block succeeds, and removed if not.

    Raises FileExistsError if `folder` exists before the block or after it. With `replaces`, an existing folder is replaced:
    it is renamed first, and removed only when the new one has its name."""
    temporary, old = _unfinished(folder), _unfinished(folder)
    try:
        with named(folder):
            if not replaces:
                _require_absent(folder)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                flush(file)
            flush(temporary)
            if not replaces:
                _require_absent(folder)
            elif folder.exists():
                os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except OSError:
                if old.exists():
                    os.rename(old, folder)
                raise
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    """Return a new name next to a path, for incomplete content. The process number in it is for people; only the random
    part is unique among machines that share a file system."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{path.name}")


def _require_absent(folder: Path) -> None:
    if os.path.lexists(folder):
        raise FileExistsError(errno.EEXIST, "it already exists and is not replaced; move it away", str(folder))


@contextmanager
def named(place: Path) -> Iterator[None]:
    """Within the block, add the path to an OSError that lacks one, such as that of a full disk."""
    try:
        yield
    except OSError as fault:
        if fault.filename is None and fault.errno is not None:
            raise OSError(fault.errno, fault.strerror, str(place)) from None
        raise


def write_atomically(file: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, which may be missing, or as much as possible of a folder."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk. Only warn if a file system cannot flush a folder, as some
    network and FUSE file systems cannot: this matters only if the power fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        if fault.errno not in NO_FOLDER_FLUSH or not path.is_dir():
            raise
        warn_once(
            "flushing folders",
            f"{path}: the file system cannot flush a folder to disk ({fault.strerror}); if the power fails, the newest "
            "files may be lost",
        )

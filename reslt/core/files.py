"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(file: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `file` if the block succeeds, and removed if not.

    `durable`: flush it to disk first (takes milliseconds: not for thousands of small files)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        with _named(file):
            yield temporary
            if durable:
                flush(temporary)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write files to; it is renamed to `folder` if the block succeeds, replacing an older one."""
    temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        with _named(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                flush(file)
            flush(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Add the path to an error that lacks one, such as that of a full disk."""
    try:
        yield
    except OSError as fault:
        if fault.filename is None and fault.errno is not None:
            raise OSError(fault.errno, fault.strerror, str(place)) from None
        raise


def write_atomically(file: Path, text: str) -> None:
    """Write a UTF-8 text file, completely or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, or a folder with as much of its content as possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

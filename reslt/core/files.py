"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(file: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a path to write to; it becomes `file` when the block ends well, and vanishes when not.

    `durable`: flushed to disk before (milliseconds: not for thousands of small files)."""
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
    """The same for a folder of files; an older folder of that name is replaced."""
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
    """A full disk is told by the writing, which does not know what it writes: name the place."""
    try:
        yield
    except OSError as fault:
        if fault.filename is None and fault.errno is not None:
            raise OSError(fault.errno, fault.strerror, str(place)) from None
        raise


def write_atomically(file: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """A file, or a folder with all it holds; what cannot be removed stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

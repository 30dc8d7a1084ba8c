"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(file: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a path to write to; it becomes `file` when the block ends well, and vanishes when not.

    `durable`: flushed to disk before (milliseconds: not for thousands of small files)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder of files; an older folder of that name is replaced."""
    temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
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


def write_whole(file: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

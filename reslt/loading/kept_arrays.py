"""Arrays with a row per image of a list, kept in a file of the cache folder for later runs.

A file is used only once it is verified: it contains the digest of everything that determined its values, and a digest of
its own bytes. It is read, not mapped: if a mapped file is truncated meanwhile, SIGBUS ends the process."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL

from reslt.core.cache import cache_folder, make_writable
from reslt.core.cpu import available_cores
from reslt.core.files import atomic_file
from reslt.core.locks import locked, sweep
from reslt.core.log import warn_once
from reslt.loading.image_dataset import ListedImages

FORMAT = "pixels 2"  # part of every file's digest; change it when the format changes
DIGEST = 32  # bytes
AXES = 4
HEADER = np.dtype([("own", f"V{DIGEST}"), ("origin", f"V{DIGEST}"), ("shape", "<i8", AXES)])  # before the values
CHUNK = 16 << 20  # bytes that a thread verifies at a time


@dataclass(frozen=True)
class Kind:
    """A kind of arrays with up to `AXES` axes. `suffix`: of its files; `noun` and `made`: the words of a warning, such as
    'decoded images' and 'decoded'."""

    suffix: str
    dtype: np.dtype
    axes: int
    noun: str
    made: str


def kept(
    kind: Kind, images: ListedImages, described: str, make: Callable[[], np.ndarray], changing: str = ""
) -> np.ndarray:
    """Return the (N, ...) array that `make` returns for a list of images, from the cache folder if it is there.

    `described` and `changing` state what, besides the images, determines the array. The cache folder keeps one file per
    list and `described`, which is used as long as `changing`, the list and its images are unchanged (see `digest`). If the
    file cannot be read or written, the array is made; if another process is making it, this one waits. Raises what `make`
    raises."""
    file, origin = _file(kind, images, described), digest(images, described + changing)
    if file is None:
        return make()
    if (found := _read(kind, file, origin, len(images))) is not None:
        return found
    try:
        make_writable(file.parent)
        _sweep(file)
    except OSError as fault:
        _warn(kind, file, fault)
        return make()
    with locked(file, waits=True):
        # The process that this one waited for may have made it
        if (found := _read(kind, file, origin, len(images))) is not None:
            return found
        array = make()
        try:
            _write(file, origin, array)
        except OSError as fault:  # the folder is not writable, or the disk is full
            _warn(kind, file, fault)
        return array


def kept_shape(kind: Kind, images: ListedImages, described: str) -> tuple[int, ...] | None:
    """Return the shape (N, ...) of the array that `kept` would read from the cache folder, without reading its values; None
    if there is none for these images as they are now."""
    if (file := _file(kind, images, described)) is None or not file.is_file():
        return None
    try:
        with open(file, "rb") as handle:
            header = _header(handle, kind, digest(images, described), len(images))
    except OSError:
        return None
    return None if header is None else tuple(header["shape"][0, : kind.axes].tolist())


def _file(kind: Kind, images: ListedImages, described: str) -> Path | None:
    """Return the only file for this list, images' folder and description; None without a cache folder. The name does not
    depend on what may change, so that the cache does not grow with every change of an image."""
    if (folder := cache_folder()) is None:
        return None
    lists = images.file.parent.resolve()
    parts = (str(lists), str(images.root.folder.resolve()), described)
    place = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return folder / f"{lists.name}-{images.file.stem}-{place}.{kind.suffix}"


def digest(images: ListedImages, described: str) -> bytes:
    """Return the digest of everything that determines the array and is known without reading the image files: the
    description, the list, the images' folder, and the size, mtime, ctime and inode of each image."""
    listed, root = images.listed, images.root
    parts = (FORMAT, PIL.__version__, described, listed.digest, str(root.folder.resolve()), repr(root.rules))
    stats = np.zeros((len(images), 4), np.uint64)
    for i in range(len(images)):
        try:
            found = root.file(listed.path(i)).stat()  # for an image in a shard, with the times and inode of the shard
        except OSError:  # decoding reports it
            continue
        stats[i] = [n % 2**64 for n in (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape") + stats.tobytes()).digest()


def _read(kind: Kind, file: Path, origin: bytes, images: int) -> np.ndarray | None:
    """Read and verify a file. Return None if it is missing, damaged, or of another origin or number of images."""
    if not file.is_file():
        return None
    try:
        with open(file, "rb") as handle:
            if (header := _header(handle, kind, origin, images)) is None:
                return None
            shape = header["shape"][0].tolist()
            size = np.prod(shape) * kind.dtype.itemsize
            content = np.fromfile(handle, np.uint8, size)
    except OSError:
        return None
    if len(content) != size or _own_digest(header, content) != header["own"].tobytes():
        return None
    return content.view(kind.dtype).reshape(shape[: kind.axes])


def _header(handle: BinaryIO, kind: Kind, origin: bytes, images: int) -> np.ndarray | None:
    """Read the header of a file. Return None if the file is damaged, or of another origin or number of images."""
    header = np.fromfile(handle, HEADER, 1)
    if len(header) != 1 or header["origin"].tobytes() != origin:
        return None
    shape = header["shape"][0].tolist()
    size = os.fstat(handle.fileno()).st_size - HEADER.itemsize
    is_whole = min(shape) >= 1 and np.prod(shape, dtype=object) * kind.dtype.itemsize == size
    return header if is_whole and shape[0] == images else None


def _write(file: Path, origin: bytes, array: np.ndarray) -> None:
    header = np.zeros(1, HEADER)
    header["origin"], header["shape"] = np.void(origin), array.shape + (1,) * (AXES - array.ndim)
    content = array.reshape(-1).view(np.uint8)
    header["own"] = np.void(_own_digest(header, content))
    with atomic_file(file, durable=False) as temporary, open(temporary, "wb") as handle:
        handle.write(header.tobytes())
        handle.write(content.data)


def _own_digest(header: np.ndarray, content: np.ndarray) -> bytes:
    """Return the digest of the bytes that follow it in the file; all cores share the work."""
    parts = [header.tobytes()[DIGEST:], *(content[i : i + CHUNK].data for i in range(0, len(content), CHUNK))]
    with ThreadPoolExecutor(available_cores()) as pool:
        of_parts = pool.map(lambda part: hashlib.blake2b(part, digest_size=DIGEST).digest(), parts)
        return hashlib.blake2b(b"".join(of_parts), digest_size=DIGEST).digest()


def _sweep(file: Path) -> None:
    """Remove the unfinished files of killed processes, and the files that earlier versions kept for the same list."""
    sweep(file.parent)
    prefix = file.name.rpartition("-")[0]
    for old in file.parent.glob("*.npy"):
        if re.fullmatch(r"(\.\d+\.)?" + re.escape(prefix) + r"-[0-9a-f]{24}\.npy", old.name):
            with suppress(OSError):
                old.unlink()


def _warn(kind: Kind, file: Path, fault: OSError) -> None:
    warn_once(
        f"{kind.suffix} cache",
        f"{file.parent}: {kind.noun} cannot be kept there ({fault.strerror or fault}), so they will be {kind.made} again "
        "next time; to use another folder, set RESLT_CACHE",
    )

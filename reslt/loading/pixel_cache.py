"""The images of a list in memory: decoded once, on all cores, and kept in one file for the next time.

The file is trusted only as far as it is verified: it contains the digest of everything that determined its pixels, and
one of its own bytes. It is read, not mapped: a mapped file that is truncated meanwhile ends the process by SIGBUS."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from reslt.core.cache import cache_folder, make_writable
from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.locks import locked, sweep
from reslt.core.log import warn_once
from reslt.loading.batches import OrderedBatches
from reslt.loading.image_dataset import ListedImages
from reslt.loading.workers import Workers

FORMAT = "pixels 2"  # part of every file's digest; change it when the format changes
DIGEST = 32  # bytes
HEADER = np.dtype([("own", f"V{DIGEST}"), ("origin", f"V{DIGEST}"), ("shape", "<i8", 4)])  # before the pixels
CHUNK = 16 << 20  # bytes that a thread verifies at a time
BATCH = 256


def pixels(images: ListedImages, described: str, workers: int) -> np.ndarray:
    """Return (N, 3, H, W) uint8, all images of a list after `images.transform`, which is deterministic.

    `described` states what that transform does. The cache folder keeps one file per list and `described`, which is used
    as long as the list and its images are unchanged (see `digest`). If it cannot be read or written, the images are
    decoded; if another process is decoding them, this one waits. Raises UserError, with file and line, for an image
    that cannot be read, or whose size differs from that of the first."""
    file, origin = _file(images, described), digest(images, described)
    if file is None:
        return _decoded(images, workers)
    if (kept := _read(file, origin, len(images))) is not None:
        return kept
    try:
        make_writable(file.parent)
        _sweep(file)
    except OSError as fault:
        _warn(file, fault)
        return _decoded(images, workers)
    with locked(file, waits=True):
        if (kept := _read(file, origin, len(images))) is not None:  # written by the process that this one waited for
            return kept
        array = _decoded(images, workers)
        try:
            _write(file, origin, array)
        except OSError as fault:  # the folder cannot be written, or the disk is full
            _warn(file, fault)
        return array


def _file(images: ListedImages, described: str) -> Path | None:
    """Return the one file of this list, images' folder and transform. So that the cache does not grow with every change
    of an image, what may change is in the file, not in its name."""
    if (folder := cache_folder()) is None:
        return None
    lists = images.file.parent.resolve()
    parts = (str(lists), str(images.root.folder.resolve()), described)
    place = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return folder / f"{lists.name}-{images.file.stem}-{place}.pixels"


def digest(images: ListedImages, described: str) -> bytes:
    """Return the digest of everything that determines the pixels, as far as known without reading the image files:
    the list, the images' folder, and size, mtime, ctime and inode of each image."""
    listed, root = images.listed, images.root
    parts = (FORMAT, PIL.__version__, described, listed.digest, str(root.folder.resolve()), repr(root.rules))
    stats = np.zeros((len(images), 4), np.uint64)
    for i in range(len(images)):
        try:
            found = os.stat(root.file(listed.path(i)))
        except OSError:  # decoding will report it
            continue
        stats[i] = [n % 2**64 for n in (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape") + stats.tobytes()).digest()


def _read(file: Path, origin: bytes, images: int) -> np.ndarray | None:
    """Read and verify a file; None if it is missing, damaged, or of another origin or number of images."""
    if not file.is_file():
        return None
    try:
        with open(file, "rb") as handle:
            header = np.fromfile(handle, HEADER, 1)
            if len(header) != 1 or header["origin"].tobytes() != origin:
                return None
            shape = header["shape"][0].tolist()
            size = os.fstat(handle.fileno()).st_size - HEADER.itemsize
            if shape[:2] != [images, 3] or min(shape) < 1 or np.prod(shape, dtype=object) != size:
                return None
            content = np.fromfile(handle, np.uint8, size)
    except OSError:
        return None
    if len(content) != size or _own_digest(header, content) != header["own"].tobytes():
        return None
    return content.reshape(shape)


def _write(file: Path, origin: bytes, array: np.ndarray) -> None:
    header = np.zeros(1, HEADER)
    header["origin"], header["shape"] = np.void(origin), array.shape
    header["own"] = np.void(_own_digest(header, array.reshape(-1)))
    with atomic_file(file, durable=False) as temporary, open(temporary, "wb") as handle:
        handle.write(header.tobytes())
        handle.write(array.data)


def _own_digest(header: np.ndarray, content: np.ndarray) -> bytes:
    """Return the digest of the bytes after it, of which all cores read a part."""
    parts = [header.tobytes()[DIGEST:], *(content[i : i + CHUNK].data for i in range(0, len(content), CHUNK))]
    with ThreadPoolExecutor(available_cores()) as pool:
        of_parts = pool.map(lambda part: hashlib.blake2b(part, digest_size=DIGEST).digest(), parts)
        return hashlib.blake2b(b"".join(of_parts), digest_size=DIGEST).digest()


def _sweep(file: Path) -> None:
    """Remove the unfinished files of killed processes, and what earlier versions kept of the same list."""
    sweep(file.parent)
    prefix = file.name.rpartition("-")[0]
    for old in file.parent.glob("*.npy"):
        if re.fullmatch(r"(\.\d+\.)?" + re.escape(prefix) + r"-[0-9a-f]{24}\.npy", old.name):
            with suppress(OSError):
                old.unlink()


def _warn(file: Path, fault: OSError) -> None:
    warn_once(
        "pixel cache",
        f"{file.parent}: decoded images cannot be kept there ({fault.strerror or fault}), so they will be decoded again "
        "next time; another folder: RESLT_CACHE",
    )


def _decoded(images: ListedImages, workers: int) -> np.ndarray:
    """Decode a list, with a progress bar -> (N, 3, H, W) uint8, in its order."""
    shape = images.transform(_first(images)).shape
    array = np.empty((len(images), *shape), np.uint8)
    batches = OrderedBatches(0, len(images), BATCH)
    decoded = Workers(images, batches, workers, collate=EqualSizes(shape))
    with tqdm(total=len(images), desc=f"decoding {images.file.stem}", unit="image", leave=False, disable=None) as bar:
        for (first, end), batch in zip(batches.spans(), decoded, strict=True):
            if isinstance(batch, int):
                raise UserError(
                    f"{images.place(first + batch)}: the image does not have the size that its header states; repair it, "
                    "or use --data-on-device off"
                )
            array[first:end] = batch.numpy()
            bar.update(end - first)
    return array


def _first(images: ListedImages):
    image, _ = images.decoded(0)
    if image is None:
        images[0, 0]  # raises the error, with its place
    return image


class EqualSizes:
    """A collate function: samples -> (N, *shape) images, or the position of one that has another shape."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __call__(self, samples: list[tuple[torch.Tensor, int]]) -> torch.Tensor | int:
        unequal = [i for i, (image, _) in enumerate(samples) if image.shape != self.shape]
        return unequal[0] if unequal else torch.stack([image for image, _ in samples])

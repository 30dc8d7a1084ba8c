"""The content of image files: a digest that recognizes exact copies, and a fingerprint that recognizes near-copies."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from PIL import Image

from reslt.data.shards import PackedImage, StoredImage

DIGEST_BYTES = 16
THREADS, CHUNK = 16, 256  # a network file system answers many requests at a time
BLOCK_BYTES = 1 << 20
HASH_SIDE, THUMBNAIL_SIDE = 8, 16
FINGERPRINT_BYTES = HASH_SIDE**2 // 8 + THUMBNAIL_SIDE**2
HASH_BITS_APART = 6  # at most, of 64 bits; a candidate shares one of the hash's four 16-bit parts
# Measured on crops of photos: recompressed (JPEG quality 30 to 60) or resized copies (half, 0.7, twice the side) correlate
# by 0.998 from 96 pixels a side, and at a quarter of 200; the two most similar of 1,797 different 8 x 8 scans by 0.9962.
LEAST_CORRELATION = 0.997
LEAST_CONTRAST = 8.0  # standard deviation of a thumbnail, in levels of 255: below it, images are nearly blank and alike
PAIRS_AT_ONCE, IMAGES_AT_ONCE = 1 << 18, 1 << 13


def digests_of(files: Iterable[str | StoredImage]) -> Iterator[bytes | None]:
    """Yield the digest of each file's content (BLAKE2b, 16 bytes), in order; None for a file that is empty, missing,
    unreadable, or not a regular file."""
    files = list(files)
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from chain.from_iterable(pool.map(lambda chunk: [digest_of(file) for file in chunk], chunks))


def digest_of(file: str | StoredImage) -> bytes | None:
    """Return the digest of one file, as `digests_of` does."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        if isinstance(file, PackedImage):
            digest.update(file.read_bytes())
            return digest.digest()
        status = os.stat(file)  # before opening it: opening a pipe would wait
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return None
        with open(file, "rb", buffering=0) as handle:
            while block := handle.read(BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()


def fingerprint(image: Image.Image) -> bytes:
    """Return a perceptual hash of an image (8 bytes) and its gray thumbnail (16 x 16 bytes), which change little if it is
    recompressed or resized.

    The hash: signs of the 8 x 8 lowest frequencies (DCT-II) of the image at 32 x 32 pixels, against their median."""
    side = 2 * THUMBNAIL_SIDE
    pixels = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR), np.float32)
    frequencies = np.arange(1, HASH_SIDE + 1)[:, None]  # without frequency 0, the constant
    waves = np.cos(np.pi * frequencies * (2 * np.arange(side) + 1) / (2 * side))
    spectrum = waves @ pixels @ waves.T
    bits = np.packbits(spectrum > np.median(spectrum))
    halves = pixels.reshape(THUMBNAIL_SIDE, 2, THUMBNAIL_SIDE, 2)
    return bits.tobytes() + np.rint(halves.mean(axis=(1, 3))).astype(np.uint8).tobytes()


def near_pairs(fingerprints: np.ndarray) -> np.ndarray:
    """(N, 264) uint8 fingerprints -> (P, 2) pairs i < j of images that look the same, sorted.

    Candidates are pairs whose hashes share one of four 16-bit parts and differ in at most six bits; those whose
    thumbnails correlate are kept. Nearly blank images are never paired."""
    hashes = np.ascontiguousarray(fingerprints[:, :8]).view(np.uint64)[:, 0]
    thumbnails = fingerprints[:, 8:]
    starts = range(0, len(thumbnails), IMAGES_AT_ONCE)
    contrast = np.concatenate([np.empty(0), *(thumbnails[i : i + IMAGES_AT_ONCE].std(axis=1) for i in starts)])
    usable = np.flatnonzero(contrast >= LEAST_CONTRAST)
    found = [np.empty((0, 2), np.int64)]
    for part in range(4):
        key = (hashes[usable] >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        order = usable[np.argsort(key, kind="stable")]
        _, sizes = np.unique(key, return_counts=True)
        for pairs in _pairs_within(order, sizes):
            apart = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
            bits = np.unpackbits(apart.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
            pairs = pairs[bits <= HASH_BITS_APART]
            correlations = _correlations(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])
            found.append(np.sort(pairs[correlations >= LEAST_CORRELATION], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _correlations(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(P, K), (P, K) -> (P,) correlation of each row with the other row; none is constant."""
    some, others = (rows - rows.mean(axis=1, keepdims=True, dtype=np.float32) for rows in (some, others))
    lengths = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return np.einsum("pk,pk->p", some, others) / lengths


def _pairs_within(order: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield all pairs within consecutive groups of `order` of the given sizes, as (P, 2) blocks of bounded size."""
    ends = np.cumsum(sizes)
    last = np.repeat(ends, sizes)  # of the group that each position belongs to
    partners = last - np.arange(len(order)) - 1  # later positions of the same group
    block_of = np.cumsum(partners) // PAIRS_AT_ONCE
    for block in np.unique(block_of[partners > 0]):
        first = np.flatnonzero((block_of == block) & (partners > 0))
        counts = partners[first]
        one = np.repeat(first, counts)
        offset = np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield np.stack([order[one], order[one + 1 + offset]], axis=1)

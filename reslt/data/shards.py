"""Images packed into a few large files, the shards, which are read without opening a file per image.

A pack, which `python -m reslt.prepare pack` writes, is a folder of tar files in WebDataset's layout, `000000.tar`, ..., and
an index from the digest of an image's path to its place in a shard. The index is mapped into memory: all processes of a
machine, forked or spawned, share its pages."""

from __future__ import annotations

import hashlib
import os
import posixpath
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.text import one_line

PACK, INDEX = "pack.yaml", "index.npy"
DIGEST = "index_digest"  # key of pack.yaml, written last: it marks a complete pack
COMMAND = "command"  # key of pack.yaml: the command that made the pack, without its --output
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("shard", "<u4")])  # 32 bytes
KEPT_OPEN = 256  # shards per process; many systems allow a process to open 1,024 files
NEAR = 64 << 10  # bytes; a shorter gap between two images of a shard is read, not skipped
LONGEST_READ = 16 << 20  # bytes
AHEAD = 64 << 20  # bytes of a batch that a worker reads before it decodes the first image; it reads the rest one by one


class UnreadableShard(OSError):
    """An image that a pack lacks, or whose shard is missing or ends early. The text is the reason, for the user."""


def path_digest(path: str) -> tuple[int, int]:
    """Return the 128-bit digest of a list's path, as two numbers; equal for `a/1.jpg` and `a//1.jpg`."""
    normal = posixpath.normpath(path).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(normal, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def index_digest(entries: np.ndarray) -> str:
    """Return the digest of an index, as stated in pack.yaml."""
    return hashlib.blake2b(np.ascontiguousarray(entries).view(np.uint8), digest_size=16).hexdigest()


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"{shard:06}.tar"


@dataclass(frozen=True)
class PackedImage:
    """An image in a shard, with the methods of a Path that readers of images use."""

    pack: Pack
    path: str  # as listed
    shard: int | None  # None: the pack does not contain the path
    offset: int  # of its first byte in the shard
    length: int  # in bytes

    def __str__(self) -> str:
        if self.shard is None:
            return f"{self.pack.folder} ({self.path})"
        return f"{self.pack.shard_file(self.shard)}, byte {self.offset} ({self.path})"

    def fault(self) -> str | None:
        """Return why the image cannot be read, if that is known without reading it; else None."""
        if self.shard is None:
            return f"the pack does not contain this path; bring it up to date with: {self.pack.command}"
        status = self.pack.status(self.shard)
        if status is None:
            return f"the shard is missing; pack again with: {self.pack.command}"
        if status.st_size < self.offset + self.length:
            return self._cut(status.st_size)
        return None

    def _cut(self, size: int) -> str:
        return f"the shard ends at byte {size}, before the image does; pack again with: {self.pack.command}"

    def is_file(self) -> bool:
        """Return whether the image is in the pack and its shard is long enough."""
        return self.fault() is None

    exists = is_file

    def stat(self) -> SimpleNamespace:
        """Return the image's size, and the mode, times and inode of its shard. Raises UnreadableShard."""
        if reason := self.fault():
            raise UnreadableShard(reason)
        status = self.pack.status(self.shard)
        return SimpleNamespace(
            st_mode=stat.S_IFREG | stat.S_IMODE(status.st_mode),
            st_size=self.length,
            st_mtime_ns=status.st_mtime_ns,
            st_ctime_ns=status.st_ctime_ns,
            st_ino=status.st_ino,
        )

    def read_bytes(self) -> bytes:
        """Return the image's file, byte for byte. Raises UnreadableShard, and OSError if reading fails."""
        if self.shard is None:
            raise UnreadableShard(self.fault())
        if (content := self.pack.already_read(self)) is not None:
            return content
        try:
            content = self.pack.read(self.shard, self.offset, self.length)
        except FileNotFoundError:
            raise UnreadableShard(f"the shard is missing; pack again with: {self.pack.command}") from None
        if len(content) < self.length:
            raise UnreadableShard(self._cut(self.offset + len(content)))
        return content


StoredImage = Path | PackedImage


class Pack:
    """The images of a packed folder. Processes share the index; each has its own open files and images read ahead."""

    def __init__(self, folder: Path):
        """Raises UserError if the index is missing, incomplete or damaged."""
        self.folder = folder
        described = read_yaml(folder / PACK)
        made_by = described.get(COMMAND) or "python -m reslt.prepare pack NAME"
        self.command = one_line(f"{made_by} --output {shlex.quote(str(folder.resolve()))}")
        if DIGEST not in described:
            raise UserError(f"{folder}: packing was interrupted; continue it with: {self.command}")
        self._open()
        if index_digest(self.entries) != described[DIGEST]:
            raise UserError(f"{folder / INDEX}: its digest is not that of {PACK}; pack again with: {self.command}")

    @classmethod
    def at(cls, folder: Path) -> Pack | None:
        """Return the pack in a folder; None if it contains none."""
        return cls(folder) if (folder / PACK).is_file() else None

    def _open(self) -> None:
        file = self.folder / INDEX
        try:
            # A plain array over the mapping: indexing a memmap costs several times as much.
            self.entries = np.asarray(np.load(file, mmap_mode="r"))
            if self.entries.dtype != ENTRY:
                raise ValueError
        except FileNotFoundError:
            raise UserError(f"{file} is missing; pack again with: {self.command}") from None
        except (ValueError, EOFError):
            raise UserError(f"{file} is damaged; pack again with: {self.command}") from None
        self._highs = self.entries["high"]
        self._descriptors: dict[int, int] = {}
        self._statuses: dict[int, os.stat_result | None] = {}
        self._batch: dict[str, PackedImage] = {}  # images of the current batch, by path
        self._ahead: dict[tuple[int, int], bytes] = {}

    def __getstate__(self) -> tuple[Path, str]:
        return self.folder, self.command

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self.folder, self.command = state
        self._open()

    def __del__(self):
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            with suppress(OSError):
                os.close(descriptor)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shards(self) -> list[Path]:
        """The files that contain images, in order."""
        return [self.shard_file(shard) for shard in range(int(self.entries["shard"].max()) + 1)]

    def shard_file(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / shard_name(shard)

    def image(self, path: str) -> PackedImage:
        """Return the image of a list's path."""
        if (found := self._batch.get(path)) is not None:
            return found
        high, low = path_digest(path)
        position = int(np.searchsorted(self._highs, np.uint64(high)))
        while position < len(self.entries):
            found_high, found_low, offset, length, shard = self.entries[position].item()
            if found_high != high:
                break
            if found_low == low:
                return PackedImage(self, path, shard, offset, length)
            position += 1
        return PackedImage(self, path, None, 0, 0)

    def status(self, shard: int) -> os.stat_result | None:
        """Return the status of a shard's file at the first call for it; None if it is missing."""
        if shard not in self._statuses:
            try:
                self._statuses[shard] = os.stat(self.shard_file(shard))
            except OSError:
                self._statuses[shard] = None
        return self._statuses[shard]

    def already_read(self, image: PackedImage) -> bytes | None:
        """Return an image's content if it was read ahead, else None."""
        return self._ahead.get((image.shard, image.offset))

    @contextmanager
    def ahead(self, paths: Iterable[str]) -> Iterator[None]:
        """Read the images of a batch in the order of the shards, neighbors in one read; within the block, `read_bytes`
        returns them. Announce all reads to the system first, so that it can fetch several at a time. Leave faults to
        `read_bytes`."""
        self._batch = {path: self.image(path) for path in paths}
        images = [image for image in self._batch.values() if image.shard is not None]
        runs = list(_runs(sorted({(image.shard, image.offset, image.length) for image in images})))
        try:
            with suppress(OSError):
                for shard, first, end, _ in runs:
                    self._advise(shard, first, end - first)
                size = 0
                for shard, first, end, parts in runs:
                    size += end - first
                    if size > AHEAD:
                        break
                    content = self.read(shard, first, end - first)
                    if len(content) == end - first:
                        for offset, length in parts:
                            self._ahead[shard, offset] = content[offset - first : offset - first + length]
            yield
        finally:
            self._batch, self._ahead = {}, {}

    def _advise(self, shard: int, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with self._opened(shard) as descriptor:
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Return a part of a shard; fewer bytes if the shard ends early. Raises OSError."""
        if not hasattr(os, "pread"):  # Windows
            with open(self.shard_file(shard), "rb") as file:
                file.seek(offset)
                return file.read(length)
        with self._opened(shard) as descriptor:
            content = os.pread(descriptor, length, offset)
            while len(content) < length:  # a network file system may return less than there is
                more = os.pread(descriptor, length - len(content), offset + len(content))
                if not more:
                    break
                content += more
        return content

    @contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        """Yield a descriptor of a shard, which forked processes may share: no read depends on its position."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            descriptor = os.open(self.shard_file(shard), os.O_RDONLY)
            if len(self._descriptors) >= KEPT_OPEN:
                try:
                    yield descriptor
                finally:
                    os.close(descriptor)
                return
            kept = self._descriptors.setdefault(shard, descriptor)
            if kept != descriptor:  # another thread was faster
                os.close(descriptor)
                descriptor = kept
        yield descriptor


def _runs(places: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
    """Group sorted places (shard, offset, length) into those that one read covers. Yield (shard, first byte, last byte + 1,
    [(offset, length)]) of each group."""
    run = None
    for shard, offset, length in places:
        end = offset + length
        if run and run[0] == shard and offset - run[2] <= NEAR and end - run[1] <= LONGEST_READ:
            run = shard, run[1], end, [*run[3], (offset, length)]
            continue
        if run:
            yield run
        run = shard, offset, end, [(offset, length)]
    if run:
        yield run

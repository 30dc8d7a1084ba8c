"""`python -m reslt.prepare pack NAME`: the image files of a dataset in a few shards, which are read in long pieces.

A shard is a tar file in WebDataset's layout. Each image has a member `000000123.jpg`, its file byte for byte, and a member
`000000123.cls`, its label. Images are in the order of the lists and numbered over all shards. The same files give the same
shards, byte for byte. A small file beside each shard records the origin of its images, so that an interrupted run keeps
finished shards, and a later one replaces only those from the first change on."""

from __future__ import annotations

import io
import os
import re
import shlex
import stat
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from reslt.augment.decode import UnsupportedImage, open_file
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.locks import locked, sweep
from reslt.core.log import logger
from reslt.core.text import counted
from reslt.data.datasets import Dataset, load_dataset, read_info
from reslt.data.lists import SPLITS, ImageList
from reslt.data.paths import ImageRoot, find_image_root, require_folder
from reslt.data.shards import COMMAND, DIGEST, ENTRY, INDEX, PACK, index_digest, path_digest, shard_name
from reslt.prepare.folder import claim_output, write_local, write_yaml

T, R = TypeVar("T"), TypeVar("R")
# A row per image of a shard. `number`: the one in its name; `changed`: the later of its original's mtime and ctime, in ns.
ORIGIN = np.dtype(
    [(name, "<u8") for name in ("high", "low", "number", "offset")]
    + [("changed", "<i8"), ("length", "<u4"), ("label", "<i4")]
)
THREADS = 16  # a network file system answers many requests at a time
IN_FLIGHT = 64  # images that are read ahead of the one being written
BLOCK_BYTES = 512  # a member of a tar file is a block for its header, and whole blocks of content
DIGITS = 9  # of an image's number in its name
SUFFIX = re.compile(r"[a-z0-9]+")
NAMED = 20  # missing images that are printed


@dataclass(frozen=True)
class Outcome:
    """Remarks, and a line to print for each of the first images that cannot be read."""

    remarks: list[str]
    bad: list[str]


class Original(NamedTuple):
    """A file to pack, and its content (None: only its status was requested)."""

    length: int  # in bytes
    changed: int
    content: bytes | None


def pack(data: str, output: Path, shard_megabytes: int, splits: list[str] | None, data_dir: Path | None) -> Outcome:
    """Write the image files of a dataset's lists (`splits` None: all) as shards below `output`, and make them the image
    root of the dataset on this machine. A path that is listed several times is packed once.

    Complete shards with unchanged originals are kept. Missing and empty files are left out and reported. Raises UserError if
    `output` contains something else or another process is writing to it, if no image can be read, and if a shard cannot be
    written."""
    output = output.expanduser()  # `--output=~/x`, as in local.yaml
    dataset = load_dataset(data, data_dir, images_needed=False)  # they may be a damaged pack that this run repairs
    if missing := [split for split in splits or () if split not in dataset.lists]:
        raise UserError(f"--lists {missing[0]}: {dataset.folder / f'{missing[0]}.txt'} does not exist")
    lists = {split: dataset.lists[split] for split in SPLITS if split in dataset.lists and split in (splits or SPLITS)}
    root = _originals(dataset, output)
    require_folder(root, dataset.folder, read_info(dataset.folder))
    with locked(output):
        sweep(output)
        described = {"dataset": dataset.folder.resolve().name, "images": str(root.folder.resolve())}
        described["shard_megabytes"] = shard_megabytes
        claim_output(output, PACK, described)
        described[COMMAND] = _command(dataset, shard_megabytes, splits)
        packing = Packing(lists, root, output, shard_megabytes * 10**6, described)
        packing.run()
    return Outcome([packing.summary(), *_use(dataset, output, set(lists) == set(dataset.lists))], packing.named())


def _originals(dataset: Dataset, output: Path) -> ImageRoot:
    """Return the root of the files: the dataset's or, if that is the pack to update, the one it was made from. Raises
    UserError for another pack."""
    root = dataset.image_root
    if not (root.folder / PACK).is_file():
        return root
    if root.folder.resolve() != output.resolve():
        raise UserError(
            f"{dataset.reference} reads its images from the pack {root.folder} (from {root.source}); give the folder of its "
            "files with --data-dir DIR"
        )
    return replace(root, folder=Path(str(read_yaml(output / PACK).get("images"))))


def _command(dataset: Dataset, shard_megabytes: int, splits: list[str] | None) -> str:
    """Return the command that updates the pack, without --output, since the folder may be moved."""
    parts = ["python", "-m", "reslt.prepare", "pack", dataset.reference]
    parts += ["--shard-size", str(shard_megabytes), *(["--lists", *splits] if splits else [])]
    return shlex.join(parts)


def _use(dataset: Dataset, output: Path, has_all: bool) -> Iterator[str]:
    """Make the pack the dataset's image root if it contains all its images; yield remarks."""
    by_flag = f"--data-dir {shlex.quote(str(output.resolve()))}"
    if not has_all:
        yield f"the pack does not contain all lists of {dataset.reference}; read it with: {by_flag}"
        return
    local = dataset.folder / "local.yaml"
    try:
        write_local(dataset.folder, dataset.image_root.rules, output)
    except OSError as fault:
        logger.warning(f"{local} cannot be written ({fault.strerror}); read the pack with: {by_flag}")
        return
    found = find_image_root(dataset.folder, read_info(dataset.folder), None)
    if found.folder.resolve() != output.resolve():
        yield f"{found.source} names another folder, {found.folder}; read the pack with: {by_flag}"
    else:
        yield f"{dataset.reference} reads its images from {output} from now on (image_root in {local})"


class Packing:
    """The writing of the images of lists into shards."""

    def __init__(self, lists: dict[str, ImageList], root: ImageRoot, output: Path, shard_bytes: int, described: dict):
        self.lists, self.root, self.output, self.shard_bytes = list(lists.values()), root, output, shard_bytes
        self.described = described
        self.starts = np.cumsum([0, *map(len, self.lists)])
        self.keys, self.plan = self._unique()
        self.absent: list[tuple[int, str]] = []  # numbers in the plan, and reasons
        self.images = self.written = self.kept = 0

    def _unique(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the digests of all lists' paths, and the positions of those to pack: the first of each file."""
        keys = np.empty(int(self.starts[-1]), [("high", "<u8"), ("low", "<u8")])
        for start, images in zip(self.starts, self.lists, strict=False):
            for i in range(len(images)):
                keys[start + i] = path_digest(images.path(i))
        order = np.lexsort((np.arange(len(keys)), keys["low"], keys["high"]))
        ordered = keys[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        return keys, np.sort(order[is_first])

    def run(self) -> None:
        """Write all shards that are missing or out of date, and the index. Raises UserError if that is impossible."""
        position, shard, records = 0, 0, []
        try:
            with (
                ThreadPoolExecutor(THREADS) as pool,
                tqdm(total=len(self.plan), desc="packing", unit="image", leave=False, disable=None) as self.bar,
            ):
                while position < len(self.plan):
                    found = self._kept(pool, shard, position)
                    if found is None:
                        self._touch()
                        found = self._write(pool, shard, position)
                    position, record = found
                    if len(record):
                        records.append(record)
                        shard += 1
            if not records:
                number, reason = self.absent[0]
                raise UserError(
                    f"no image could be read; the first: {self._place(number)}: {reason}; does the list belong to the image "
                    f"root {self.root.folder}? Give another with --data-dir DIR"
                )
            self._finish(records)
        except OSError as fault:
            raise UserError(
                f"{fault.filename or self.output}: {fault.strerror or fault}; fix this, then repeat the command"
            ) from None

    def _touch(self) -> None:
        """Remove the index's digest from pack.yaml, so that no process reads the shards before they are complete."""
        if read_yaml(self.output / PACK) != self.described:
            write_yaml(self.output / PACK, self.described)

    def _kept(self, pool: ThreadPoolExecutor, shard: int, position: int) -> tuple[int, np.ndarray] | None:
        """Return the position after a shard, and its record, if it contains exactly what would be written; else None."""
        record = self._record(shard)
        if record is None:
            return None
        absent, place, size = [], 0, 0
        for number, original, reason in self._read(pool, position, with_content=False):
            if reason:
                absent.append((number, reason))
                continue
            high, low, named, _, changed, length, label = record[place].item()
            found = ((high, low), label), named, length, changed
            if found != (self._row(number), number, original.length, original.changed):
                return None
            place, size = place + 1, size + _packed_bytes(original.length)
            if place == len(record):
                break
        number += 1
        if place < len(record) or (size < self.shard_bytes and number < len(self.plan)):
            return None
        self._count(absent, len(record), number - position)
        self.kept += 1
        return number, record

    def _record(self, shard: int) -> np.ndarray | None:
        """Return the record of a shard; None if there is none or the shard is not as long as recorded."""
        try:
            record = np.load(self._record_file(shard))
            size = (self.output / shard_name(shard)).stat().st_size
        except (OSError, ValueError, EOFError):
            return None
        if record.dtype != ORIGIN or not len(record) or size < int(record["offset"][-1]) + int(record["length"][-1]):
            return None
        return record

    def _record_file(self, shard: int) -> Path:
        return self.output / shard_name(shard).replace(".tar", ".npy")

    def _write(self, pool: ThreadPoolExecutor, shard: int, position: int) -> tuple[int, np.ndarray]:
        """Write a shard from a position of the plan on; return the position after it, and its record."""
        self._record_file(shard).unlink(missing_ok=True)
        rows, absent, size, done = [], [], 0, position
        with (
            atomic_file(self.output / shard_name(shard)) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, original, reason in self._read(pool, position, with_content=True):
                done = number + 1
                if reason:
                    absent.append((number, reason))
                    continue
                key, label = self._row(number)
                name, suffix = f"{number:0{DIGITS}}", self._suffix(number)
                rows.append((*key, number, tar.offset + BLOCK_BYTES, original.changed, original.length, label))
                _add(tar, f"{name}.{suffix}", original.content)
                _add(tar, f"{name}.cls", str(label).encode())
                self.bar.update()
                size += _packed_bytes(original.length)
                if size >= self.shard_bytes:
                    break
        record = np.array(rows, ORIGIN)
        if rows:
            with atomic_file(self._record_file(shard)) as temporary, open(temporary, "wb") as file:
                np.save(file, record)
        else:
            (self.output / shard_name(shard)).unlink()
        self._count(absent, len(rows), len(absent))
        self.written += bool(rows)
        return done, record

    def _count(self, absent: list[tuple[int, str]], images: int, of_bar: int) -> None:
        self.absent += absent
        self.images += images
        self.bar.update(of_bar)

    def _read(
        self, pool: ThreadPoolExecutor, position: int, with_content: bool
    ) -> Iterator[tuple[int, Original | None, str | None]]:
        """Yield (number in the plan, file, None) or (number, None, reason) from a position on, reading some ahead."""

        def read(number: int) -> tuple[int, Original | None, str | None]:
            try:
                return number, self._original(number, with_content), None
            except (FileNotFoundError, NotADirectoryError):
                return number, None, "there is no such image"
            except UnsupportedImage as reason:
                return number, None, str(reason)
            except OSError as fault:
                return number, None, f"it cannot be read ({fault.strerror or fault})"

        return _in_order(pool, read, range(position, len(self.plan)))

    def _original(self, number: int, with_content: bool) -> Original:
        file = self.root.file(self._path(number))
        if not with_content:
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise UnsupportedImage("the file is empty" if stat.S_ISREG(status.st_mode) else "not a file")
            return Original(status.st_size, max(status.st_mtime_ns, status.st_ctime_ns), None)
        with open_file(file) as handle:
            status = os.fstat(handle.fileno())  # before the content, so that the next run notices a later change
            content = handle.read()
        return Original(len(content), max(status.st_mtime_ns, status.st_ctime_ns), content)

    def _finish(self, records: list[np.ndarray]) -> None:
        """Write the index, and remove further shards of an earlier pack."""
        entries = np.empty(sum(map(len, records)), ENTRY)
        start = 0
        for shard, record in enumerate(records):
            part = entries[start : start + len(record)]
            for name in ("high", "low", "offset", "length"):
                part[name] = record[name]
            part["shard"] = shard
            start += len(record)
        entries = entries[np.lexsort((entries["low"], entries["high"]))]
        complete = self.described | {DIGEST: index_digest(entries)}
        if read_yaml(self.output / PACK) == complete and self._has_index(complete[DIGEST]):
            return
        with atomic_file(self.output / INDEX) as temporary, open(temporary, "wb") as file:
            np.save(file, entries)
        shard = len(records)
        while (self.output / shard_name(shard)).is_file() or self._record_file(shard).is_file():
            (self.output / shard_name(shard)).unlink(missing_ok=True)
            self._record_file(shard).unlink(missing_ok=True)
            shard += 1
        write_yaml(self.output / PACK, complete)

    def _has_index(self, digest: str) -> bool:
        try:
            return index_digest(np.load(self.output / INDEX)) == digest
        except (OSError, ValueError, EOFError):
            return False

    def _located(self, number: int) -> tuple[ImageList, int]:
        position = int(self.plan[number])
        k = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.lists[k], position - int(self.starts[k])

    def _path(self, number: int) -> str:
        images, i = self._located(number)
        return images.path(i)

    def _row(self, number: int) -> tuple[tuple[int, int], int]:
        """Return the digest of an image's path, and its label in the first list that contains it."""
        images, i = self._located(number)
        return self.keys[self.plan[number]].item(), int(images.labels[i])

    def _suffix(self, number: int) -> str:
        """Return the ending of an image's name, by which other tools choose a decoder; jpg if it has none."""
        suffix = PurePosixPath(self._path(number)).suffix[1:].lower()
        return suffix if SUFFIX.fullmatch(suffix) and suffix != "cls" else "jpg"

    def _place(self, number: int) -> str:
        images, i = self._located(number)
        return f"{images.place(i)}: {self.root.file(images.path(i))}"

    def summary(self) -> str:
        """Return a line with the numbers of images and shards."""
        parts = [f"{n} {what}" for n, what in ((self.written, "written"), (self.kept, "already there")) if n]
        shards = counted(self.written + self.kept, "shard")
        return f"{self.output}: {counted(self.images, 'image')} in {shards} ({', '.join(parts)})"

    def named(self) -> list[str]:
        """Return a line for each of the first images that are not in the pack."""
        named = [f"{self._place(number)}: {reason}" for number, reason in self.absent[:NAMED]]
        if len(self.absent) > NAMED:
            named.append(f"and {len(self.absent) - NAMED:,} more")
        return named


def _packed_bytes(length: int) -> int:
    """Return the bytes that an image file of this length and its label occupy in a shard."""
    return BLOCK_BYTES * (1 - (-length // BLOCK_BYTES) + 2)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member, whose header depends only on name and size."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _in_order(pool: ThreadPoolExecutor, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `do(item)` for each item, in order, with IN_FLIGHT calls under way."""
    under_way = deque()
    for item in items:
        under_way.append(pool.submit(do, item))
        if len(under_way) > IN_FLIGHT:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()

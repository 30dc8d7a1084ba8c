"""`python -m reslt.prepare shrink NAME`: a copy of a dataset whose images are no larger than training needs.

An image keeps its path and its format: a JPEG becomes a JPEG, a PNG a PNG. Only a GIF, limited to 256 colors, becomes a
PNG under the same name, since the content determines how a file is read. Images that are small enough are copied unchanged.
Shrunk images are 8-bit RGB, upright, without EXIF block and color profile, as in training."""

from __future__ import annotations

import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from reslt.augment.decode import View, decode_or_reason, open_file, open_image
from reslt.config.places import lists_folder
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, atomic_folder
from reslt.core.locks import locked, sweep
from reslt.data.datasets import Dataset, load_dataset, read_info
from reslt.data.lists import ImageList
from reslt.data.paths import ImageRoot, read_local
from reslt.data.shards import StoredImage
from reslt.prepare.folder import (
    claim_output,
    new_folder,
    record_where_possible,
    require_writable,
    write_image_root,
    write_yaml,
)

SETTINGS = "shrink.yaml"  # in the folder of images: their source and settings
OF_THE_ORIGINAL = {
    "image_root",
    "images",
    "path_variants",
    "prepare",
    "published",
}  # keys of info.yaml that are not copied
OTHER_FORMAT = {"MPO": "JPEG", "HEIF": "JPEG", "GIF": "PNG"}
LOSSY = {"JPEG", "WEBP", "AVIF"}  # formats that have a quality from 1 to 100
BATCH = 16
NAMED = 20  # bad images that are printed


@dataclass(frozen=True)
class Outcome:
    """The copy's folder under data_lists/, remarks, and the images that cannot be read, a line to print for each."""

    folder: Path
    remarks: list[str]
    bad: list[str]


def shrink(
    data: str, size: int, output: Path, quality: int, name: str | None, workers: int, data_dir: Path | None
) -> Outcome:
    """Write the images of all lists below `output`, with a short side of at most `size` pixels, and data_lists/<name> with
    the same lists (`name` None: <data>_<size>). Existing images are kept unless their original has changed since, so that a
    killed run can be continued.

    An image that cannot be read is recorded in the copy's bad_images.csv instead. Raises UserError if `output` or
    data_lists/<name> contains something else or another process is writing to it, if no image can be read, and if one cannot
    be written."""
    dataset = load_dataset(data, data_dir)
    name = name or f"{dataset.name}_{size}"
    _claim(dataset, name, output)
    sweep(lists_folder())
    require_writable(lists_folder())  # now, not after hours of shrinking
    with locked(lists_folder() / name), locked(output):
        sweep(output, below=True)
        return _shrink(dataset, _claim(dataset, name, output), size, output, quality, workers)


def _shrink(dataset: Dataset, folder: Path, size: int, output: Path, quality: int, workers: int) -> Outcome:
    made_from = {"images": str(dataset.image_root.folder.resolve()), "size": size, "quality": quality}
    claim_output(output, SETTINGS, made_from)
    counts, reasons = _write_images(Shrinking(dataset.lists, dataset.image_root, output, size, quality), workers)
    if reasons and not counts:
        (split, i), reason = next(iter(reasons.items()))
        raise UserError(
            f"no image could be read; the first: {dataset.lists[split].place(i)}: {reason}; does the list belong to the image "
            f"root {dataset.image_root.folder}? Give another with --data-dir DIR"
        )
    if not folder.exists():
        _write_dataset(dataset, folder, output, size)
    bad = list(_lines_of(dataset.lists, reasons))
    rows = [(f"{split}.txt", images.line(i), images.path(i), reason) for split, images, i, reason in bad]
    record = record_where_possible(folder, rows, output)
    named = [
        f"{images.place(i)}: {dataset.image_root.file(images.path(i))}: {reason}"
        for _, images, i, reason in bad[:NAMED]
    ]
    if len(bad) > NAMED:
        named.append(f"and {len(bad) - NAMED:,} more" + (f"; all are in {record}" if record else ""))
    return Outcome(folder, [f"{output}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items())], named)


class Shrinking:
    """The images of lists, shrunk on access. A key is (split, index). A sample is the key, the outcome in words, and the
    reason why the image cannot be read or None."""

    def __init__(self, lists: dict[str, ImageList], root: ImageRoot, output: Path, size: int, quality: int):
        self.lists, self.root, self.output, self.size, self.quality = lists, root, output, size, quality

    def __len__(self) -> int:
        return sum(map(len, self.lists.values()))

    def __getitems__(self, keys: list[tuple[str, int]]) -> list[tuple[tuple[str, int], str, str | None]] | UserError:
        """Return samples, or a failure to write as a UserError, as Workers requires."""
        try:
            return [(key, *self._written(self.lists[key[0]].path(key[1]))) for key in keys]
        except OSError as fault:
            return UserError(
                f"{fault.filename or self.output}: {fault.strerror or fault}; fix this, then repeat the command"
            )

    def keys(self) -> list[tuple[str, int]]:
        """Return one key for each file of the lists."""
        first = {}
        for split, images in self.lists.items():
            for i in range(len(images)):
                first.setdefault(posixpath.normpath(images.path(i)), (split, i))
        return list(first.values())

    def _written(self, path: str) -> tuple[str, str | None]:
        source, target = self.root.file(path), self.output / path
        if _is_up_to_date(target, source):
            return "already there", None
        asked = []
        image, reason = decode_or_reason(source, lambda size: asked.append(size) or self._smaller(size))
        if reason:
            return "bad", reason
        with atomic_file(target, durable=False) as temporary:
            if image.size == asked[0]:
                temporary.write_bytes(source.read_bytes())
                return "copied", None
            with open_file(source) as file:
                original = open_image(file).format
            kind = OTHER_FORMAT.get(original, original)
            image.info = {}  # otherwise, PIL stores the original's profile, transparency or comment
            image.save(temporary, kind, **({"quality": self.quality} if kind in LOSSY else {}))
        return "shrunk", None

    def _smaller(self, size: tuple[int, int]) -> View:
        """Return the whole of an image of (width, height) with its short side at most `self.size` pixels."""
        short = min(size)
        width, height = (side if short <= self.size else round(side * self.size / short) for side in size)
        return View((0, 0, *size), (width, height), Image.Resampling.LANCZOS)


def _is_up_to_date(target: Path, source: StoredImage) -> bool:
    """Return whether a file was written completely, and after the last change of its source, or if the source is gone. The
    source's ctime counts too: a copy that replaces an image may have the modification time of its own original."""
    if not target.is_file() or not (made := target.stat()).st_size:  # a power failure leaves empty files
        return False
    try:
        original = source.stat()
    except OSError:
        return True
    return made.st_mtime_ns >= max(original.st_mtime_ns, original.st_ctime_ns)


def _write_images(images: Shrinking, workers: int) -> tuple[Counter, dict[tuple[str, int], str]]:
    """Shrink the images. Return the numbers of files by outcome, and {key: reason} of those that cannot be read."""
    from tqdm import tqdm

    from reslt.loading.workers import Workers

    keys, counts, reasons = images.keys(), Counter(), {}
    batches = [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]
    with tqdm(total=len(keys), desc="shrinking", unit="image", leave=False, disable=None) as bar:
        for outcomes in Workers(images, batches, workers, collate=list):
            bar.update(len(outcomes))
            for key, done, reason in outcomes:
                if reason:
                    reasons[key] = reason
                else:
                    counts[done] += 1
    return counts, reasons


def _lines_of(
    lists: dict[str, ImageList], reasons: dict[tuple[str, int], str]
) -> Iterator[tuple[str, ImageList, int, str]]:
    """Yield (split, list, index, reason) for every line whose path is that of a bad image; lines may share a file."""
    if not reasons:
        return
    by_path = {posixpath.normpath(lists[split].path(i)): reason for (split, i), reason in reasons.items()}
    for split, images in lists.items():
        for i in range(len(images)):
            if reason := by_path.get(posixpath.normpath(images.path(i))):
                yield split, images, i, reason


def _claim(dataset: Dataset, name: str, output: Path) -> Path:
    """Return data_lists/<name>, which is new or from an earlier run of the same command. Raises UserError otherwise."""
    folder = lists_folder() / name
    if Path(name).name != name or not (folder / "local.yaml").is_file():
        return new_folder(name)
    same_images = read_local(folder).get("image_root") == str(output.resolve())
    same_lists = all(
        (folder / f"{split}.txt").is_file() and (folder / f"{split}.txt").read_bytes() == images.file.read_bytes()
        for split, images in dataset.lists.items()
    )
    return folder if same_images and same_lists else new_folder(name)


def _write_dataset(dataset: Dataset, folder: Path, output: Path, size: int) -> None:
    """Write the lists unchanged, with their info.yaml."""
    info = {key: value for key, value in read_info(dataset.folder).items() if key not in OF_THE_ORIGINAL}
    description = f"{dataset.name}, images with a short side of at most {size} pixels"
    if stated := info.get("description"):
        description = f"{stated} ({description})"
    with atomic_folder(folder) as temporary:
        write_yaml(temporary / "info.yaml", {**info, "description": description})
        write_image_root(temporary, output)
        for split, images in dataset.lists.items():
            shutil.copyfile(images.file, temporary / f"{split}.txt")

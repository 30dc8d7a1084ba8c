"""The list that each image of a dataset belongs to permanently. Images are recognized by content, even if they are moved."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.data.lists import SPLITS, ImageList
from reslt.data.paths import ImageRoot
from reslt.prepare.contents import DIGEST_BYTES, digests_of

SIDES = "sides.csv"  # in the dataset's folder; includes images that are no longer in its lists
COLUMNS = ["digest", "split"]


def read_sides(folder: Path) -> dict[bytes, str] | None:
    """Return {digest of an image: split} from sides.csv; None if there is none. Raises UserError with file and line."""
    file, sides = folder / SIDES, {}
    if not file.exists():
        return None
    remedy = "restore the file from a copy; without it, the sides of images that are no longer listed are not known"
    try:
        with open(file, encoding="utf-8", newline="") as handle:
            rows = csv.reader(handle, strict=True)
            if next(rows, None) != COLUMNS:
                raise UserError(f"{file}:1: the columns are not {','.join(COLUMNS)}; {remedy}")
            for row in rows:
                digest = _digest(row[0]) if len(row) == len(COLUMNS) and row[1] in SPLITS else None
                if digest is None or sides.setdefault(digest, row[1]) != row[1]:
                    raise UserError(f"{file}:{rows.line_num}: not the digest of one more image and its split; {remedy}")
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UserError(f"{file}: {getattr(fault, 'strerror', None) or fault}; {remedy}") from None
    return sides


def _digest(text: str) -> bytes | None:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        return None
    return digest if len(digest) == DIGEST_BYTES else None


def write_sides(folder: Path, sides: dict[bytes, str]) -> None:
    """Write sides.csv, ordered by digest, completely or not at all."""
    with atomic_file(folder / SIDES) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, lineterminator="\n")
        rows.writerow(COLUMNS)
        rows.writerows((digest.hex(), sides[digest]) for digest in sorted(sides))


def sides_on_disk(lists: dict[str, ImageList], root: ImageRoot) -> tuple[dict[bytes, str], int]:
    """Return the sides of the listed images that exist, after reading them, and the number of those that do not.

    An image in several lists is on the side of training if it is in train.txt."""
    sides, lost = {}, 0
    for split in sorted(lists, key=SPLITS.index):
        images = lists[split]
        for digest in digests_of(root.file(images.path(i)) for i in range(len(images))):
            if digest is None:
                lost += 1
            else:
                sides.setdefault(digest, split)
    return sides, lost


def sides_of_new(new: list[bytes], known: Counter, held_out: dict[str, int], seed: int) -> dict[bytes, str]:
    """Assign the new images of a class to splits, by ascending digest, salted with the seed.

    `known`: the number of its other images per split, which stay there. The splits of `held_out` are filled in turn, 'test'
    first, up to that many images each, while at most half of the class, rounded down, is held out. All other images are for
    training."""
    sides, known = dict.fromkeys(new, "train"), Counter(known)
    may_leave = (len(new) + known.total()) // 2 - (known.total() - known["train"])
    for digest in sorted(new, key=lambda digest: hashlib.sha256(b"%d," % seed + digest).digest()):
        short = [split for split in ("test", "val") if known[split] < held_out.get(split, 0)]
        if may_leave <= 0 or not short:
            break
        split = sides[digest] = min(short, key=lambda split: known[split])
        known[split] += 1
        may_leave -= 1
    return sides

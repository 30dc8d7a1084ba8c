"""Photos that a file of any format lists: its paths are matched with the images on disk, each of which is accounted for."""

from __future__ import annotations

import os
import posixpath
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reslt.core.errors import UserError
from reslt.core.text import counted, listed, shown
from reslt.data.find_images import HIDDEN_FILES, IMAGE_SUFFIXES, Found, find_images, stem
from reslt.data.lists import SPLITS
from reslt.prepare.photos import SPLIT_NAMES, Account, Photos, order_classes, require_two

NOT_LISTED = "not listed"  # images in a folder in which other images are listed


@dataclass(frozen=True)
class Listing:
    """The N images that one file lists, in its order."""

    file: Path
    unit: str  # of `numbers`, for messages: row, line or image
    numbers: Sequence[int]  # (N,)
    paths: list[str]  # (N,) as the file writes them
    labels: list[str]  # (N,) class names; unused for images that are left out
    splits: list[str] | None  # (N,), if the file states them
    split: str = "train"  # of all images otherwise
    left_out: dict[int, str] = field(default_factory=dict)  # index -> reason

    def place(self, i: int) -> str:
        """Return the place of image i, for error messages."""
        return f"{self.file}: {self.unit} {self.numbers[i]}"


def listed_photos(
    listings: list[Listing], data_dir: Path | None, decisions: list[str], root: Path | None = None
) -> Photos:
    """Match the images of the files with those on disk, below `data_dir` (None: paths start from each file's folder).

    A path may lack its file ending. If none of a file's paths exist, but most exist below one folder, they start there.
    `decisions`: those made while the files were read. `root`: the folder to account for; None: `data_dir`, else the folder
    that contains all files. Raises UserError for an image that does not exist, is listed twice or might be several files."""
    is_metadata = root is not None  # then --data-dir is no remedy
    root = root or data_dir or Path(os.path.commonpath([listing.file.parent.absolute() for listing in listings]))
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder")
    found = find_images(root)
    account = Account.of(found)
    account.decisions += decisions
    taken: dict[str, tuple[Listing, int]] = {}
    rows: dict[str, dict[str, list[str]]] = {}  # split -> class name -> images
    for listing in listings:
        start = "" if data_dir else os.path.relpath(listing.file.parent.absolute(), root.absolute())
        splits = listing.splits or _splits_of_folders(listing, account)
        images = _find(listing, "" if start == "." else Path(start).as_posix(), found, account, is_metadata)
        if absent := images.count(None):
            account.decisions.append(f"{listing.file.name}: of those left out, {absent:,} are not on disk")
        for i, image in enumerate(images):
            if image is None:
                continue
            if image in taken:
                other, k = taken[image]
                where = "" if other is listing else f", which {other.place(k)} lists"
                raise UserError(
                    f"{listing.place(i)}: duplicate image {shown(listing.paths[i], 120)}{where}; give one row per image"
                )
            taken[image] = listing, i
            if i in listing.left_out:
                account.left_out[listing.left_out[i]] += 1
            else:
                rows.setdefault(splits[i] if splits else listing.split, {}).setdefault(listing.labels[i], []).append(
                    image
                )
    _count_others(found, taken, account)
    read = {os.path.relpath(listing.file.absolute(), root.absolute()) for listing in listings}
    account.note_unread([table for table in found.tables() if table not in read])
    return _photos(root, listings, rows, account)


def read_splits(file: Path, unit: str, numbers: Sequence[int], column: str, values: Sequence[object]) -> list[str]:
    """Read a column that states 'train', 'val' or 'test', or another usual name of these. Raises UserError for any other
    value."""
    splits = [SPLIT_NAMES.get(str(value).strip().lower()) for value in values]
    if None in splits:
        unknown = dict.fromkeys(str(value) for value, split in zip(values, splits, strict=True) if split is None)
        raise UserError(
            f"{file}: {unit} {numbers[splits.index(None)]}: --split-column {column} says neither train, val nor test but: "
            f"{listed(unknown, 6)}; rename these, or remove their {unit}s (known: {', '.join(SPLIT_NAMES)})"
        )
    return splits


def unused_splits(file: Path, columns: Mapping[str, Iterable[str]]) -> list[str]:
    """Return a line for each column that seems to state the split, for tables read without --split-column."""
    found = {name: {SPLIT_NAMES.get(text.strip().lower()) for text in set(texts)} for name, texts in columns.items()}
    return [
        f"{file.name}: column {shown(name)} seems to state the split, but is not used; to use it: --split-column "
        f"{shlex.quote(name)}"
        for name, splits in found.items()
        if None not in splits and len(splits) > 1
    ]


def _photos(root: Path, listings: list[Listing], rows: dict[str, dict[str, list[str]]], account: Account) -> Photos:
    """Return the photos of all files. Raises UserError for a class of val or test that is not in train, and for fewer than
    two classes."""
    source, train = listings[0].file, rows.get("train", {})
    if not rows:
        without = f" ({n:,} without one)" if (n := account.left_out.total()) else ""
        raise UserError(f"{source}: it lists no image with a class{without}")
    if not train:
        raise UserError(f"{source}: there is no training image in it; it has only {', '.join(rows)}")
    for split, classes in rows.items():
        if extra := order_classes(classes.keys() - train.keys()):
            raise UserError(
                f"{source}: {len(extra):,} classes of {split} have no training image: {listed(extra, 6)}; add some, or remove "
                "these classes"
            )
    names = order_classes(train)
    require_two(names, source)
    splits = [split for split in SPLITS if split in rows]
    return Photos(root, names, {split: [rows[split].get(name, []) for name in names] for split in splits}, account)


def _splits_of_folders(listing: Listing, account: Account) -> list[str] | None:
    """Return the splits if every path starts with the folder of a split, such as train/a.jpg, and there are several."""
    if listing.split != "train" or "/" not in (listing.paths or [""])[0].replace("\\", "/"):
        return None
    splits = [SPLIT_NAMES.get(_normal(path).split("/", 1)[0].lower(), "") for path in listing.paths]
    if "" in splits or len(counts := Counter(splits)) < 2:
        return None
    sizes = ", ".join(f"{split} {counts[split]:,}" for split in SPLITS if counts[split])
    account.decisions.append(f"{listing.file.name}: splits by the folders that its paths start with: {sizes}")
    return splits


def _find(listing: Listing, start: str, found: Found, account: Account, is_metadata: bool) -> list[str | None]:
    """Return the images that a file lists, and None for left-out ones that do not exist. Its paths start from the folder
    `start` below the root."""
    absolute = found.root.absolute().as_posix() + "/"
    paths = [_normal(path.replace("\\", "/").removeprefix(absolute)) for path in listing.paths]
    needed = [i for i in range(len(paths)) if i not in listing.left_out]
    images = _look_up(paths, start, found)
    if needed and all(images[i] is None for i in needed) and not _on_disk(_below(start, paths[needed[0]]), found):
        folders = _likely_starts([paths[i] for i in needed], found)
        if len(folders) > 1:
            raise UserError(
                f"{listing.place(needed[0])}: {shown(paths[needed[0]], 120)!r} might be in any of {len(folders)} folders "
                f"below {found.root}: {listed(folders, 4)}; give the one that the paths start from with --data-dir DIR"
            )
        if folders:
            start = folders[0]
            images = _look_up(paths, start, found)
            account.decisions.append(f"{listing.file.name}: its paths start from {start}/")
    for i in needed:
        images[i] = images[i] or _on_disk(_below(start, paths[i]), found)
    if missing := [i for i in needed if images[i] is None]:
        i = missing[0]
        if 2 * len(missing) <= len(needed):
            remedy = f"restore it, or remove the {listing.unit} from {listing.file.name}"
        elif is_metadata:
            remedy = "paths must start from the folder of this file"
        else:
            remedy = "give the folder that the paths start from with --data-dir DIR"
        raise UserError(
            f"{listing.place(i)}: there is no image {shown(listing.paths[i], 120)!r} below {found.root / start}, nor one "
            f"of that name with a file ending ({len(missing):,} of {counted(len(needed), listing.unit)}); {remedy}"
        )
    endings: Counter[str] = Counter()
    for i in needed:
        path = _below(start, paths[i])
        if images[i] != path and stem(images[i]) == path:
            endings[images[i][len(path) :]] += 1
            if len(found.by_stem[path]) > 1:
                raise UserError(
                    f"{listing.place(i)}: {shown(listing.paths[i], 120)!r} might be {listed(found.by_stem[path], 4)}; write "
                    "the file ending, or keep one of the files"
                )
    if endings:
        sizes = ", ".join(f"{n:,} are {ending} files" for ending, n in endings.most_common(4))
        account.decisions.append(f"{listing.file.name}: paths without file ending: {sizes}")
    return images


def _look_up(paths: list[str], start: str, found: Found) -> list[str | None]:
    """Return the image of each path, else the first one with that path and a file ending, else None."""
    paths = [_below(start, path) for path in paths]
    images = [path if path in found.known else None for path in paths]
    if None in images:
        images = [image or found.by_stem.get(path, [None])[0] for image, path in zip(images, paths, strict=True)]
    return images


def _likely_starts(paths: list[str], found: Found) -> list[str]:
    """Return the folder below which most of a sample of the paths exist; several folders if equally many do."""
    sample = paths[:: -(-len(paths) // 200)]
    first = sample[:: -(-len(sample) // 5)]  # probably, at least one of these exists
    shares = {
        start: sum((place := _below(start, path)) in found.known or place in found.by_stem for path in sample)
        for start in {folder for path in first for folder in _folders_of(path, found)}
    }
    most = max(shares.values(), default=0)
    return sorted(start for start, n in shares.items() if n == most and 2 * n > len(sample))


def _folders_of(path: str, found: Found) -> list[str]:
    """Return the folders below which there is an image of this path, with or without its file ending."""
    tail = f"/{path}"
    places = (place for image in found.images for place in (image, stem(image)))
    return sorted({place[: -len(tail)] for place in places if place.endswith(tail)})


def _on_disk(path: str, found: Found) -> str | None:
    """Return a path that is not among the images found if there is such a file: in a hidden folder, without a file ending,
    or below a link to a folder that was read under another path, which then replaces the link's. Return None otherwise."""
    if path.startswith(("/", "../")) or not (found.root / path).is_file():
        return None
    folder, name = os.path.split(path)
    if (read_as := found.folders.get(os.path.realpath(found.root / folder))) is not None:
        return _below(read_as, name)
    return path


def _count_others(found: Found, taken: dict[str, tuple[Listing, int]], account: Account) -> None:
    """Count the images that no file lists: those beside listed ones, and those in other folders."""
    folders = {posixpath.dirname(image) for image in taken}
    others: Counter[str] = Counter()
    for image in found.images:
        if image not in taken:
            if (folder := posixpath.dirname(image)) in folders:
                account.left_out[NOT_LISTED] += 1
            else:
                others[f"{folder.split('/')[0]}/" if folder else "the folder itself"] += 1
    if n := account.left_out[NOT_LISTED]:
        account.decisions.append(f"left out: {counted(n, 'image')} in the same folders, not listed")
    else:
        del account.left_out[NOT_LISTED]
    for place, n in others.most_common(8):
        account.skip(place, n, "nothing there is listed")
    if rest := sum(n for _, n in others.most_common()[8:]):
        account.skip("other folders", rest, "nothing there is listed")
    for image in taken.keys() - found.known:  # listed files in hidden places were counted there
        if os.path.splitext(image)[1].lower() in IMAGE_SUFFIXES:
            *folders, name = image.split("/")
            places = [f"{folder}/" for folder in folders] + [HIDDEN_FILES] * name.startswith(".")
            if hidden := next((place for place in places if account.not_looked_at[place]), None):
                account.not_looked_at[hidden] -= 1
    account.not_looked_at = +account.not_looked_at


def _normal(path: str) -> str:
    """Return one spelling of a//b, ./a/b and a\\b."""
    return posixpath.normpath(path.replace("\\", "/"))


def _below(start: str, path: str) -> str:
    return posixpath.normpath(f"{start}/{path}") if start and not path.startswith("/") else path

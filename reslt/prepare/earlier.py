"""A dataset that `own` extends or replaces: the classes, sides and settings that it keeps."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reslt.core.errors import UserError
from reslt.core.text import counted
from reslt.data.datasets import class_names, list_files, read_info
from reslt.data.lists import SPLITS, ImageList, images_per_class, read_list
from reslt.data.paths import find_image_root
from reslt.prepare.photos import Photos
from reslt.prepare.sides import SIDES, read_sides, sides_on_disk

DEFAULT_HELD_OUT = {"val": 0, "test": 10}  # images per class
# The description that `own` writes; it also recognizes datasets of earlier versions, which wrote no sides.csv.
OUR_DESCRIPTION = re.compile(r"(train|val|test) [\d,]+(, (val|test) [\d,]+)* images of \d+ classes")


@dataclass(frozen=True)
class Earlier:
    """A dataset before it is extended or replaced; empty if there is none."""

    info: dict = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # classes, in the order of their indices; [] if they are not kept
    sides: dict[bytes, str] = field(default_factory=dict)  # digest -> split, of all images that were ever listed
    listed: dict[str, str] = field(default_factory=dict)  # path -> split, if the image root stays the same
    labels: dict[str, int] = field(default_factory=dict)  # path -> class index, if the image root stays the same
    images: dict[str, int] = field(default_factory=dict)  # list -> number of images
    set_aside: dict[str, int] = field(default_factory=dict)  # images per class, from info.yaml or the lists
    keeps_local: bool = False  # its local.yaml still fits


def is_own(folder: Path, info: dict) -> bool:
    """Return whether `own` made a dataset."""
    return (folder / SIDES).exists() or bool(OUR_DESCRIPTION.fullmatch(str(info.get("description"))))


def read_earlier(folder: Path, photos: Photos, is_extended: bool, messages: list[str]) -> Earlier:
    """Read the dataset to extend or replace, in `folder`, if there is one. Add a message if some of its images cannot be
    recognized. Raises UserError if it cannot be extended."""
    if not folder.exists():
        return Earlier()
    info = read_info(folder)
    lists = {split: read_list(file) for split, file in list_files(folder).items()}
    root = find_image_root(folder, info, None)
    sides = read_sides(folder)
    if sides is None:
        sides, lost = sides_on_disk(lists, root)
        if lost:
            messages.append(
                f"no longer below {root.folder}: {counted(lost, 'image')} that {folder.name} lists, without a record of the "
                "content; those that were moved or renamed count as new"
            )
    names = []
    if is_extended:
        names = class_names(info, folder / "info.yaml", lists["train"]) if "train" in lists else info.get("class_names")
        if not names:
            raise UserError(f"--extend {folder.name}: {folder / 'info.yaml'} states no class_names; add them")
    listed, labels, same_root = {}, {}, root.folder.resolve() == photos.root.resolve()
    if same_root:
        for split in sorted(lists, key=SPLITS.index):
            for i in range(len(lists[split])):
                path = posixpath.normpath(root.rewritten(lists[split].path(i)))
                listed.setdefault(path, split)
                labels.setdefault(path, int(lists[split].labels[i]))
    counts = {split: len(images) for split, images in lists.items()}
    set_aside = _recorded(info) or (_as_listed(lists) if is_own(folder, info) and "train" in lists else {})
    paths = (path for per_class in photos.paths.values() for of_class in per_class for path in of_class)
    keeps_local = same_root and all(root.rewritten(path) == path for path in paths)
    return Earlier(info, list(map(str, names)), sides, listed, labels, counts, set_aside, keeps_local)


def _recorded(info: dict) -> dict[str, int]:
    """Return `held_out` of info.yaml; {} if there is none. Raises UserError if it is invalid."""
    recorded = info.get("held_out") or {}
    whole = isinstance(recorded, dict) and all(type(n) is int and n >= 0 for n in recorded.values())
    if not whole or not set(recorded) <= {"val", "test", "seed"}:
        raise UserError(f"info.yaml: held_out is {recorded!r}; write it as {{val: N, test: N, seed: N}}")
    return recorded


def _as_listed(lists: dict[str, ImageList]) -> dict[str, int]:
    """Return {'val', 'test': images per class that were set aside}, derived from the lists of an earlier version of `own`:
    the number in classes with enough images or, if there are none, at least the largest number in any class."""
    classes = max(int(images.labels.max()) for images in lists.values()) + 1
    counts = {split: images_per_class(images.labels, classes) for split, images in lists.items()}
    held_out = {split: counts.get(split, np.zeros(classes, np.int64)) for split in DEFAULT_HELD_OUT}
    enough = counts["train"] > sum(held_out.values()) + 1  # classes in which the limit of one half had no effect
    if enough.any():
        return {split: int(n[enough].max()) for split, n in held_out.items()}
    return {split: max(int(n.max()), DEFAULT_HELD_OUT[split]) for split, n in held_out.items()}

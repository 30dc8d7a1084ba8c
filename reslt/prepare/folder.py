"""Shared by all ways to create a dataset: the folder under data_lists/, written and described."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from reslt.config.places import DESCRIPTIONS, lists_folder
from reslt.core.errors import UserError
from reslt.core.files import write_atomically
from reslt.data.datasets import load_dataset
from reslt.data.groups import SHOTS
from reslt.data.lists import SPLITS, write_list

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip
NO_IMAGES = {"Thumbs.db", "desktop.ini"}  # files that systems leave in folders of photos
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNLISTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]|[ ]$")


def new_folder(name: str) -> Path:
    """Return the dataset folder of this name, which must not exist yet, nor be that of a dataset that the project
    describes. Raises UserError."""
    folder = lists_folder() / name
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise UserError(f"--name {name}: give a plain name for a folder under data_lists/")
    for taken in (folder, DESCRIPTIONS / name):
        if taken.exists():
            raise UserError(f"--name {name}: {taken} already exists; remove it or choose another name")
    return folder


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders below a folder and below those linked into it, each once, with file names; none hidden."""
    entered = set()
    for here, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in entered:  # a link that leads back
            below.clear()
            continue
        entered.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        yield here, [name for name in files if not name.startswith(".")]


def image_files(folder: Path, left_out: Counter | None = None) -> list[Path]:
    """Return the image files under a folder and the folders linked into it, sorted, without hidden ones.

    `left_out` counts the suffixes of the other files."""
    found = []
    for here, files in walk(folder):
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                found.append(Path(here, name))
            elif left_out is not None and name not in NO_IMAGES:
                left_out[suffix or name] += 1
    return sorted(found)


def split_folders(source: Path, left_out: Counter | None = None) -> tuple[list[str], dict[str, list[list[Path]]]]:
    """Return the class names of source/{train,val,test}/<class>/, in alphabetical order, and {split: files per class}.

    Raises UserError if there is no train/, a class of another split is not in it, or a class is empty there."""
    require_source(source)
    names = subfolders(source / "train")
    if not names:
        raise UserError(f"--from {source}: there is no train/<class>/ folder in it")
    images = {}
    for folder in subfolders(source):
        if (split := SPLIT_FOLDERS.get(folder.lower())) is None:
            continue
        if split in images:
            raise UserError(f"{source / folder}: there are two folders of {split} images; keep one")
        found = subfolders(source / folder)
        if unknown := sorted(set(found) - set(names)):
            raise UserError(f"{source / folder}: class {unknown[0]!r} is not under train/")
        files = [image_files(source / folder / c, left_out) if c in found else [] for c in names]
        if split == "train" or any(files):  # a test/ without class folders has no labels
            images[split] = files
    require_images(source / "train", names, images["train"])
    return names, {split: images[split] for split in SPLITS if split in images}


def subfolders(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders, sorted, without hidden ones; [] if it does not exist."""
    return sorted(p.name for p in folder.glob("*") if p.is_dir() and not p.name.startswith("."))


def require_source(source: Path) -> None:
    """Raise UserError if --from names no folder."""
    if not source.is_dir():
        raise UserError(f"--from {source}: there is no such folder")


def require_images(folder: Path, names: list[str], files: list[list[Path]]) -> None:
    """Raise UserError if a class of a folder of class folders has no image."""
    if empty := [name for name, of_class in zip(names, files, strict=True) if not of_class]:
        raise UserError(f"{folder / empty[0]}: the class has no image; add some or remove its folder")


def write_lists(folder: Path, lines: dict[str, Iterable[tuple[str, int]]]) -> None:
    """Write {split: (path, label) rows}; train.txt last, since it marks the dataset as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in sorted(lines, key=SPLITS.index, reverse=True):
        rows = list(lines[split])
        for path, _ in rows:
            if UNLISTABLE.search(path):
                raise UserError(
                    f"{path!r}: a list cannot contain this name (control characters such as line breaks, bytes that are not "
                    "UTF-8, or spaces at its end); rename the file or its folder"
                )
        write_list(folder / f"{split}.txt", rows)


def write_image_root(folder: Path, root: Path) -> None:
    """Write this machine's image root to local.yaml."""
    write_yaml(folder / "local.yaml", {"image_root": str(root.resolve())})


def write_yaml(file: Path, content: dict) -> None:
    """Write a mapping as YAML, completely or not at all."""
    write_atomically(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def describe(folder: Path, flags: str = "") -> str:
    """Describe the lists of a dataset, and the command that trains on it."""
    dataset = load_dataset(str(folder), images_needed=False)
    counts = dataset.images_per_class
    sizes = ", ".join(f"{split} {len(images):,}" for split, images in dataset.lists.items())
    shots = " / ".join(str(int(dataset.shot_groups["standard"][shot].sum())) for shot in SHOTS)
    return (
        f"{folder}: {sizes} images; {dataset.num_classes} classes with {counts.max():,}..{counts.min():,} training images; "
        f"many / medium / few: {shots} classes\n"
        f"train with: accelerate launch train.py --data {shlex.quote(dataset.reference)}{flags}"
    )

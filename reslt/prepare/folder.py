"""What all ways to make a dataset share: the folder under data_lists/, written, and described."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import yaml

from reslt.datasets import SPLITS, load_dataset
from reslt.errors import UserError
from reslt.files import write_whole
from reslt.groups import SHOTS
from reslt.lists import write_list
from reslt.sources import DATA_LISTS

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def new_folder(name: str) -> Path:
    """data_lists/<name>, which must not exist yet. Raises UserError."""
    folder = DATA_LISTS / name
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise UserError(f"--name {name}: give a plain name for a folder under data_lists/")
    if folder.exists():
        raise UserError(f"--name {name}: {folder} exists; remove it or choose another name")
    return folder


def image_files(folder: Path) -> list[Path]:
    """The image files under a folder, sorted, hidden ones left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def split_folders(source: Path) -> tuple[list[str], dict[str, list[list[Path]]]]:
    """source/{train,val,test}/<class>/: class names, alphabetical, and {split: files per class}.

    Raises UserError where there is no train/, a class of another split is not under it, or a class is empty there."""
    require_source(source)
    names = subfolders(source / "train")
    if not names:
        raise UserError(f"--from {source}: there is no train/<class>/ folder in it")
    images = {}
    for split in SPLITS:
        if (source / split).is_dir():
            found = subfolders(source / split)
            if unknown := sorted(set(found) - set(names)):
                raise UserError(f"{source / split}: class {unknown[0]!r} is not under train/")
            images[split] = [image_files(source / split / c) if c in found else [] for c in names]
    empty = [c for c, files in zip(names, images["train"], strict=True) if not files]
    if empty:
        raise UserError(f"{source / 'train' / empty[0]}: the class has no image; add some or remove its folder")
    return names, images


def subfolders(folder: Path) -> list[str]:
    """The names of a folder's folders, sorted, hidden ones left out; none where it does not exist."""
    return sorted(p.name for p in folder.glob("*") if p.is_dir() and not p.name.startswith("."))


def require_source(source: Path) -> None:
    """Raises UserError where --from names no folder."""
    if not source.is_dir():
        raise UserError(f"--from {source}: there is no such folder")


def write_lists(folder: Path, lines: dict[str, Iterable[tuple[str, int]]]) -> None:
    """Write {split: (path, label) rows}; train.txt last, as it says that the dataset is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in sorted(lines, key=SPLITS.index, reverse=True):
        rows = list(lines[split])
        for path, _ in rows:
            if not path.isprintable() or path.strip() != path:  # line breaks; bytes that are no UTF-8
                raise UserError(
                    f"{path!r}: a list cannot hold this name (line breaks, other control characters, bytes that are not UTF-8, "
                    "or spaces at its ends); rename the file or its folder"
                )
        write_list(folder / f"{split}.txt", rows)


def write_image_root(folder: Path, root: Path) -> None:
    """Note in local.yaml where this machine keeps the images."""
    write_yaml(folder / "local.yaml", {"image_root": str(root.resolve())})


def write_yaml(file: Path, content: dict) -> None:
    """Write a mapping as YAML, whole or not at all."""
    write_whole(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def describe(folder: Path) -> str:
    """What the lists of a dataset hold."""
    dataset = load_dataset(str(folder), images_needed=False)
    counts = dataset.images_per_class
    sizes = ", ".join(f"{split} {len(images):,}" for split, images in dataset.lists.items())
    shots = " / ".join(str(int(dataset.shot_groups["standard"][shot].sum())) for shot in SHOTS)
    return (
        f"{folder}: {sizes} images; {dataset.num_classes} classes with {counts.max():,}..{counts.min():,} training images; "
        f"many / medium / few: {shots} classes"
    )


def train_command(folder: Path, flags: str = "") -> str:
    """The command that trains on a dataset."""
    reference = load_dataset(str(folder), images_needed=False).reference
    return f"train with: accelerate launch train.py --data {shlex.quote(reference)}{flags}"

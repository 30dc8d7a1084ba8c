"""A user's own photos -> a dataset: from a folder of class folders, or a table of files and labels."""

from __future__ import annotations

import posixpath
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from reslt.config.schema import DEFAULTS
from reslt.core.errors import UserError
from reslt.core.files import atomic_folder
from reslt.core.spelling import did_you_mean
from reslt.data.lists import ImageList, read_list
from reslt.data.paths import ImageRoot
from reslt.prepare.check import unreadable
from reslt.prepare.folder import (
    SPLIT_FOLDERS,
    image_files,
    new_folder,
    require_images,
    require_source,
    split_folders,
    subfolders,
    write_image_root,
    write_lists,
    write_yaml,
)

STEPS_PER_EPOCH = 10  # at least, for short lists


@dataclass(frozen=True)
class Photos:
    """Class names, and {split: paths relative to `root`, per class}. Without a split, all paths are under 'train'."""

    root: Path
    names: list[str]
    paths: dict[str, list[list[str]]]
    left_out: dict[str, int] = field(default_factory=dict)  # suffix -> number of files of other formats


def make_own(photos: Photos, name: str, held_out: dict[str, int], seed: int, decode: bool, workers: int) -> list[str]:
    """Write data_lists/<name>: lists, class names, settings that fit the size. Return remarks.

    `held_out`: images per class to set aside for 'val' and 'test', if the source has no such split; they are drawn with
    `seed`. At least half of a class, rounded up, stays in training, so that none is left without images. With `decode`,
    files that cannot be read are left out, and named. Raises UserError."""
    folder = new_folder(name)
    messages = [f"left out: {n:,} {kind} files, not a supported image format" for kind, n in photos.left_out.items()]
    with atomic_folder(folder) as temporary:
        write_image_root(temporary, photos.root)
        paths = photos.paths
        if decode:
            paths, bad = _readable(photos, temporary, workers)
            messages += [f"left out: {photos.root / path}: {reason}" for path, reason in bad]
        given = set(paths) - {"train"}
        paths = split_off(paths, {split: n for split, n in held_out.items() if split not in given}, seed)
        if empty := [c for c, files in zip(photos.names, paths["train"], strict=True) if not files]:
            raise UserError(
                "\n".join([*messages, f"class {empty[0]!r} has no readable training image; add some, or remove it"])
            )
        lines = {split: [(p, c) for c, ps in enumerate(per_class) for p in ps] for split, per_class in paths.items()}
        lines = {split: rows for split, rows in lines.items() if rows}
        sizes = ", ".join(f"{split} {len(rows):,}" for split, rows in lines.items())
        info = {"description": f"{sizes} images of {len(photos.names)} classes", "class_names": photos.names}
        if defaults := settings_for(len(lines["train"])):
            info["defaults"] = defaults
            messages.append(
                f"a short list: {', '.join(f'{k} {v:g}' for k, v in defaults.items())} (info.yaml, defaults)"
            )
        write_yaml(temporary / "info.yaml", info)
        write_lists(temporary, lines)
    for split, n in held_out.items():
        short = sum(len(files) < n for files in paths.get(split, []))
        if split not in given and short:
            messages.append(
                f"{split}: {short} of {len(photos.names)} classes have too few images to set aside {n}; they have fewer"
            )
    if "test" not in lines and "val" not in lines:
        messages.append(
            "neither test.txt nor val.txt: training will print no table; --test-per-class N sets some aside"
        )
    return messages


def from_folder(source: Path) -> Photos:
    """Find photos in source/<class>/..., or in source/train/<class>/..., val/ (valid/, validation/) and test/."""
    require_source(source)
    top = subfolders(source)
    if not top:
        raise UserError(f"--from {source}: there are no class folders in it")
    left_out, lowered = Counter(), {folder.lower() for folder in top}
    if "train" not in top and "train" in lowered and lowered <= set(SPLIT_FOLDERS):
        raise UserError(f"--from {source}: {top} look like splits; call the folder of training images train")
    if top == ["train"] or (subfolders(source / "train") and lowered & (set(SPLIT_FOLDERS) - {"train"})):
        if others := [folder for folder in top if folder.lower() not in SPLIT_FOLDERS]:
            raise UserError(
                f"--from {source}: {top} are partly splits and partly not; move {others[0]} away, or give the folder of classes"
            )
        names, files = split_folders(source, left_out)
    else:
        names, files = top, {"train": [image_files(source / c, left_out) for c in top]}
        require_images(source, names, files["train"])
    _require_two(names, source)
    relative = {
        s: [[f.relative_to(source).as_posix() for f in fs] for fs in per_class] for s, per_class in files.items()
    }
    return Photos(source, names, relative, dict(left_out))


def from_csv(file: Path, image_column: str, label_column: str, data_dir: Path | None) -> Photos:
    """Read a table with a header: a column of paths relative to `data_dir` (None: its folder), one of class names.

    Numbers as class names are sorted numerically, others alphabetically. Raises UserError."""
    separator = "\t" if file.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would lose cells
            table = pd.read_csv(
                file, dtype=str, keep_default_na=False, sep=separator, encoding="utf-8-sig", index_col=False
            )
    except (OSError, ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as fault:
        raise UserError(
            f"--csv {file}: not readable as a table: {fault}; it must be UTF-8 text with a header, cells separated by commas "
            "(.tsv: by tabs), and no row longer than the header"
        ) from None
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column not in table.columns:
            known = list(map(str, table.columns))
            raise UserError(
                f"{flag} {column}: {file} has no such column{did_you_mean(column, known)}; it has: {', '.join(known)}"
            )
    root = data_dir or file.parent
    table = table[[image_column, label_column]].set_axis(["path", "label"], axis=1)
    table = table.apply(lambda column: column.str.strip())
    for column, name in (("path", image_column), ("label", label_column)):
        if len(blank := np.flatnonzero(table[column] == "")):
            raise UserError(f"{file}: row {blank[0] + 2}: column {name} is empty; fill it in, or remove the row")
    absolute = root.absolute().as_posix() + "/"
    table["path"] = table["path"].str.replace("\\", "/", regex=False).str.removeprefix(absolute)
    table["path"] = table["path"].map(posixpath.normpath)  # one spelling of a//b and ./a/b
    if len(twice := np.flatnonzero(table["path"].duplicated())):
        raise UserError(
            f"{file}: row {twice[0] + 2}: duplicate image {table['path'].iloc[twice[0]]}; give one row per image"
        )
    for row, path in enumerate(table["path"], 2):
        if path.startswith("/") or ".." in path.split("/") or not (root / path).is_file():
            raise UserError(
                f"{file}: row {row}: there is no image {path!r} below {root}; give the folder that the paths start from with "
                "--data-dir DIR"
            )
    labels = table["label"].unique().tolist()
    names = sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
    _require_two(names, file)
    by_label = table.groupby("label")["path"].apply(list)
    return Photos(root, names, {"train": [by_label[name] for name in names]})


def split_off(paths: dict[str, list[list[str]]], held_out: dict[str, int], seed: int) -> dict[str, list[list[str]]]:
    """Set aside up to N training images of each class for each split of `held_out`, in total at most half of the class,
    rounded down, assigned in turn, 'test' first. The lists' order is kept."""
    wanted = {split: n for split in ("test", "val") if (n := held_out.get(split, 0))}
    result = paths | {split: [] for split in wanted} | {"train": []}
    for c, files in enumerate(paths["train"]):
        turns = sorted((turn, k) for k, n in enumerate(wanted.values()) for turn in range(min(n, len(files))))[
            : len(files) // 2
        ]
        split_of = np.full(len(files), len(wanted))  # else: stays in training
        split_of[: len(turns)] = [k for _, k in turns]
        split_of = np.random.default_rng((seed, c)).permutation(split_of)
        for k, split in enumerate((*wanted, "train")):
            result[split].append([files[i] for i in np.flatnonzero(split_of == k)])
    return result


def settings_for(images: int) -> dict[str, float]:
    """Return batch size and learning rate if the default batch would leave few steps per epoch: a power of two, and a
    rate in proportion to it. {} if the defaults fit."""
    if images >= STEPS_PER_EPOCH * DEFAULTS["batch_size"]:
        return {}
    batch = max(2, 2 ** int(np.log2(max(images // STEPS_PER_EPOCH, 2))))
    return {"batch_size": batch, "lr": DEFAULTS["lr"] * batch / DEFAULTS["batch_size"]}


def _readable(photos: Photos, scratch: Path, workers: int) -> tuple[dict[str, list[list[str]]], list[tuple[str, str]]]:
    """Decode everything -> {split: readable paths per class}, and (path, reason) of each unreadable file."""
    kept, bad = {}, []
    for split, per_class in photos.paths.items():
        rows = [(path, c) for c, paths in enumerate(per_class) for path in paths]
        write_lists(scratch, {split: rows})
        images: ImageList = read_list(scratch / f"{split}.txt")
        found = dict(unreadable(images, ImageRoot(photos.root), np.arange(len(images)), workers))
        bad += [(images.path(i), reason) for i, reason in found.items()]
        lost = {images.path(i) for i in found}
        kept[split] = [[path for path in paths if path not in lost] for paths in per_class]
        (scratch / f"{split}.txt").unlink()
    return kept, bad


def _require_two(names: list[str], source: Path) -> None:
    if len(names) < 2:
        raise UserError(f"{source}: there must be at least 2 classes, and there is only {', '.join(names) or 'none'}")

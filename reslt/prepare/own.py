"""A user's own photos -> a dataset: from a folder of class folders, or a table of files and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reslt.augment.decode import PACKAGE
from reslt.config.schema import DEFAULTS
from reslt.core.errors import UserError
from reslt.data.lists import ImageList, read_list
from reslt.data.paths import ImageRoot
from reslt.prepare.check import unreadable
from reslt.prepare.folder import (
    new_dataset,
    write_image_root,
    write_lists,
    write_yaml,
)
from reslt.prepare.photos import Photos

STEPS_PER_EPOCH = 10  # at least, for short lists
NAMED = 10  # files left out whose names are printed


def make_own(photos: Photos, name: str, held_out: dict[str, int], seed: int, decode: bool, workers: int) -> list[str]:
    """Write data_lists/<name>: lists, class names, settings that fit the size. Return remarks.

    `held_out`: images per class to set aside for 'val' and 'test', if the source has no such split; they are drawn with
    `seed`. At least half of a class, rounded up, stays in training, so that none is left without images. With `decode`,
    files that cannot be read are left out, and named. Raises UserError."""
    messages = [*photos.account.decisions]
    with new_dataset(name) as temporary:
        write_image_root(temporary, photos.root)
        paths = photos.paths
        if decode:
            paths, bad = _readable(photos, temporary, workers)
            messages += [f"left out: {photos.root / path}: {reason}" for path, reason in bad[:NAMED]]
            if len(bad) > NAMED:
                messages.append(f"left out: {len(bad) - NAMED:,} more files that cannot be read")
            photos.account.left_out.update("no decoder" if PACKAGE in reason else "unreadable" for _, reason in bad)
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
    messages.append(photos.account.balance(sum(map(len, lines.values()))))
    return messages


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

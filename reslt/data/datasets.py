"""A dataset, read from a folder of lists: its lists, class counts, class names, shot groups and image root."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from reslt.config.places import dataset_folder, lists_folder
from reslt.config.yaml_files import read_yaml, require_texts_as_written
from reslt.core.errors import UserError
from reslt.core.text import has_controls
from reslt.data.bad_images import describe_left_out, leave_out_bad_images, record_command
from reslt.data.classes import Classes, ClassMatch
from reslt.data.groups import SHOTS, STANDARD_SPLIT, shot_groups
from reslt.data.lists import SPLITS, ImageList, images_per_class, read_list
from reslt.data.paths import ImageRoot, find_image_root, require_folder
from reslt.data.set_aside import set_aside

INFO_KEYS = {
    "description",
    "num_classes",
    "class_names",
    "class_names_from_path",  # alternatively: the part of an image's path, counted from 0, that names its class
    "images",
    "image_root",
    "layout",  # the content of the image root, in words
    "path_variants",  # rules for other layouts of the images, tried by `prepare check`
    "held_out",  # images per class that `prepare own` sets aside for val and test, and the seed
    "prepare",  # the arguments of `python -m reslt.prepare` that create the lists
    "training_images",  # their number, for plans made before the lists exist
    "published",  # the source of the lists, and their digests
    "shot_split",
    "paper_split",
    "defaults",
}
EVALUATED = ("val", "test")  # the lists besides train
TEXT_KEYS = {"class_names", "images", "image_root"}
SAMPLE = 1000  # images of a list that are looked for on disk before a run
COMMAND = re.compile(r"\w+( --imb-factor [\d.]+)?")  # valid `prepare:` arguments, since users paste them into a shell


@dataclass(frozen=True)
class Dataset:
    """The content of a folder data_lists/<name>. `lists` contains 'train' and, if the files exist, 'val' and 'test'. For an
    evaluation, 'train' may be missing, and the classes are those of the model: see `load_for_evaluation`."""

    name: str
    folder: Path
    image_root: ImageRoot
    lists: dict[str, ImageList]
    num_classes: int
    class_names: tuple[str, ...] | None
    splits: dict[str, dict]  # rules: 'standard' (the usual or the dataset's own), and 'paper' if the dataset states one
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)  # paths of bad images, for splits that lost any
    val_is_set_aside: bool = False  # the validation list is a part of train.txt, which the training list lacks
    # (C,) if they are not those of the training list, but of the run that is evaluated, or of all classes while the lists
    # are restricted to one shot group
    training_counts: np.ndarray | None = None
    match: ClassMatch | None = None  # if the classes are numbered as those of a model

    @property
    def reference(self) -> str:
        """The value of --data that names it: its name, or its folder if that is not under data_lists/."""
        return self.name if self.folder.parent == lists_folder() else str(self.folder)

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """(C,) int64 training images."""
        if self.training_counts is not None:
            return self.training_counts
        return images_per_class(self.lists["train"].labels, self.num_classes)

    def eval_splits(self, wanted: str | None) -> list[str]:
        """'val', 'test', 'both' or None (val if it exists, else test) -> the lists to evaluate during training.

        Raises UserError for a list that does not exist."""
        if wanted is None:
            return [split for split in EVALUATED if split in self.lists][:1]
        return [
            self._existing(split, f"--eval-split {wanted}") for split in (EVALUATED if wanted == "both" else [wanted])
        ]

    def final_split(self, wanted: str | None) -> str | None:
        """'val', 'test' or None (test if it exists, else val) -> the list of the final tables; None if there is none.

        Raises UserError for a list that does not exist."""
        if wanted is None:
            return next((split for split in reversed(EVALUATED) if split in self.lists), None)
        return self._existing(wanted, f"--final-split {wanted}")

    def _existing(self, split: str, flag: str) -> str:
        if split not in self.lists:
            other = "; --val-from-train sets a part of the training list aside" if split == "val" else ""
            raise UserError(f"{flag}: {self.folder / f'{split}.txt'} does not exist{other}")
        return split

    @property
    def left_out_text(self) -> str:
        """One line for --bad-images skip: the number of images left out of each list, and their names."""
        if not self.left_out:
            where = f" --data-dir {shlex.quote(str(self.image_root.folder))}" * (self.image_root.source == "--data-dir")
            return (
                f"--bad-images skip: no bad images of {self.reference} are recorded, so none is left out; record them "
                f"with: {record_command(self.reference)}{where}"
            )
        return describe_left_out(self.left_out, self.folder)

    @cached_property
    def digests(self) -> dict[str, str]:
        """{split: digest of its list}."""
        return {split: images.digest for split, images in self.lists.items()}

    @cached_property
    def classes(self) -> Classes:
        """The classes of a model trained on this dataset; without names if they do not distinguish them (those of
        `class_names_from_path` may be equal)."""
        names, counts = self.class_names, self.images_per_class if "train" in self.lists else None
        if names is not None and len(set(names)) < len(names):
            names = None
        return Classes(self.num_classes, names, counts, self.splits if counts is not None else None, self.digests)

    def check_for_training(self, bad_images: str) -> list[str]:
        """Look for a sample of the images on disk, and return remarks on missing lists. Raises UserError for a missing
        image."""
        check_images(self, list(self.lists))
        remarks = [self.left_out_text] if bad_images == "skip" else []
        if not self.lists.keys() & {"val", "test"}:
            remarks.append(
                f"{self.folder} has neither val.txt nor test.txt: nothing is evaluated, and no table is printed"
            )
        elif "val" not in self.lists:
            remarks.append(f"{self.name} has no validation list, so no best epoch is chosen; the last epoch counts")
        return remarks

    @cached_property
    def shot_groups(self) -> dict[str, dict[str, np.ndarray]]:
        """{split: {'many' | 'medium' | 'few': (C,) bool}}"""
        return {name: shot_groups(self.images_per_class, split) for name, split in self.splits.items()}


def load_dataset(
    data: str,
    data_dir: str | Path | None = None,
    images_needed: bool = True,
    bad_images: str = "stop",
    model_classes: int | None = None,
    val_from_train: float | None = None,
    seed: int = 0,
    only_shots: str | None = None,
) -> Dataset:
    """Read and verify a dataset by name or folder. Raises UserError with file, value and remedy.

    If info.yaml states neither `class_names` nor `num_classes`, the labels of train.txt decide.

    `images_needed`: whether the image root must exist.
    `bad_images`: "skip" leaves images recorded in bad_images.csv out of the lists before anything else is derived from them.
    `model_classes`: the number of classes of a model to evaluate; it replaces train.txt if that is missing.
    `val_from_train`: the share of each class of the training list that becomes the validation list, drawn by `seed` (see
    `set_aside.py`). Class counts, shot groups and digests are those of the remaining images.
    `only_shots`: the shot group of the standard split to which all lists are restricted. The number of classes, class counts
    and shot groups remain those of all classes."""
    folder = dataset_folder(data)
    info_file, info = folder / "info.yaml", read_info(folder)
    lists = {split: read_list(file) for split, file in list_files(folder).items()}
    if "train" not in lists and not (lists and model_classes):
        raise UserError(f"{folder / 'train.txt'} does not exist; {how_to_prepare(folder, info)}")
    largest = int(lists["train"].labels.max()) if "train" in lists else model_classes - 1
    num_classes = count_classes(info, info_file, largest)
    lists, left_out = leave_out_bad_images(lists, folder, data) if bad_images == "skip" else (lists, {})
    for image_list in lists.values():
        image_list.check_labels(num_classes)
    train = lists.get("train")
    if train is not None:  # checked before any array is as long as the largest label
        _require_training_images(train, num_classes, info, folder, left_out)
    is_set_aside = val_from_train is not None and train is not None
    if is_set_aside:
        lists = set_aside(lists, folder, num_classes, val_from_train, seed)
    labels = np.arange(num_classes) if train is None else lists["train"].labels
    counts = images_per_class(labels, num_classes)
    splits = {"standard": info.get("shot_split", STANDARD_SPLIT)}
    if "paper_split" in info:
        splits["paper"] = info["paper_split"]
    for key, split in zip(("shot_split", "paper_split"), splits.values(), strict=False):
        try:
            shot_groups(counts, split)
        except UserError as fault:
            raise UserError(f"{info_file}: {key}: {fault}") from None
    if only_shots is not None:
        if train is None or only_shots not in SHOTS:  # a stranger's file may state any value
            raise UserError(
                f"--only-shots {only_shots}: give one of {', '.join(SHOTS)}; they are derived from {folder / 'train.txt'}, "
                "which must exist"
            )
        lists = _of_shots(lists, shot_groups(counts, splits["standard"])[only_shots], only_shots)
    root = find_image_root(folder, info, data_dir)
    if images_needed:
        require_folder(root, folder, info)
    return Dataset(
        name=folder.resolve().name,
        folder=folder,
        image_root=root,
        lists=lists,
        num_classes=num_classes,
        class_names=class_names(info, info_file, train),
        splits=splits,
        left_out=left_out,
        val_is_set_aside=is_set_aside,
        training_counts=None if only_shots is None else counts,
    )


def _require_training_images(
    train: ImageList, num_classes: int, info: dict, folder: Path, left_out: dict[str, tuple[str, ...]]
) -> None:
    """Raise UserError for the first class without a training image; `left_out`: bad images that the lists lost."""
    present = np.unique(train.labels)
    if len(present) == num_classes:
        return
    missing = int(np.argmax(np.append(present, -1) != np.arange(len(present) + 1)))
    names = info.get("class_names")
    place = f"{train.file}: class {missing}{f' ({names[missing]})' if names else ''}"
    if "train" in left_out:
        raise UserError(
            f"{place} has no training image left; {describe_left_out(left_out, folder)}; repair or replace some of its "
            "images, or remove the class from the lists"
        )
    raise UserError(
        f"{place} has no training image ({num_classes - len(present)} such classes of {num_classes}); number the classes "
        f"0..C-1 without gaps, or correct num_classes in {folder / 'info.yaml'}"
    )


def _of_shots(lists: dict[str, ImageList], group: np.ndarray, name: str) -> dict[str, ImageList]:
    """Return the lists restricted to the classes of a shot group; `group`: (C,) bool. Raises UserError for a list that
    becomes empty."""
    restricted = {split: images.where(group[images.labels]) for split, images in lists.items()}
    for split, images in restricted.items():
        if not len(images):
            drawn = f" ({split} is set aside by --val-from-train)" * (lists["train"].file == images.file != split)
            raise UserError(f"--only-shots {name}: {images.file} has no image of these classes{drawn}")
    return restricted


def read_info(folder: Path) -> dict:
    """Read a dataset folder's info.yaml; {} if there is none. Raises UserError for an unknown key."""
    file = folder / "info.yaml"
    info = read_yaml(file) if file.is_file() else {}
    if unknown := sorted(set(info) - INFO_KEYS):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(sorted(INFO_KEYS))}")
    for key in TEXT_KEYS & info.keys():
        if info[key] is not None:
            require_texts_as_written(file, info, key)
    return info


def list_files(folder: Path) -> dict[str, Path]:
    """Return {'train' | 'val' | 'test': file} of the lists that exist."""
    return {split: file for split in SPLITS if (file := folder / f"{split}.txt").is_file()}


def how_to_prepare(folder: Path, info: dict) -> str:
    """Return the remedy if a dataset has no lists yet: one command, or how to write them."""
    if COMMAND.fullmatch(str(info.get("prepare", ""))):
        return f"make the lists of {folder.resolve().name} with: python -m reslt.prepare {info['prepare']}"
    return (
        "write it, one `path label` per line, or create it from your images with: "
        f"python -m reslt.prepare own --from FOLDER --name {shlex.quote(folder.resolve().name)}"
    )


def count_classes(info: dict, info_file: Path, largest_label: int) -> int:
    """Return the number of classes that info.yaml states, else that of the labels. Raises UserError for an invalid number
    or invalid names."""
    names, num_classes = info.get("class_names"), info.get("num_classes")
    if names is not None:
        are_texts = isinstance(names, list) and all(type(name) in (str, int) for name in names)
        if not are_texts or not names or len(set(map(str, names))) != len(names):
            raise UserError(
                f"{info_file}: class_names must be a list of distinct strings (quote yes, no, null), one per class"
            )
        if odd := [name for name in map(str, names) if has_controls(name)]:
            raise UserError(
                f"{info_file}: class_names: {odd[0][:80]!r} contains a control character, such as a line break; remove it"
            )
        if num_classes not in (None, len(names)):
            raise UserError(f"{info_file}: num_classes is {num_classes!r}, but class_names has {len(names)} names")
        num_classes = len(names)
    if num_classes is None:
        num_classes = largest_label + 1
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise UserError(
            f"{info_file}: there must be at least 2 classes, a whole number; num_classes is {num_classes!r}"
        )
    return num_classes


def class_names(info: dict, info_file: Path, train: ImageList | None) -> tuple[str, ...] | None:
    """Return the class names that info.yaml states, or those in the path of each class's first training image (its number if
    that path is too short). Return None if it states neither, or if the training list is needed but missing."""
    if info.get("class_names") is not None:
        return tuple(map(str, info["class_names"]))
    part = info.get("class_names_from_path")
    if part is None:
        return None
    if not isinstance(part, int) or isinstance(part, bool) or part < 0:
        raise UserError(f"{info_file}: class_names_from_path is {part!r}; give the part of a path, counted from 0")
    if train is None:
        return None
    names = []
    for label, first in enumerate(np.unique(train.labels, return_index=True)[1]):
        *folders, _ = train.path(int(first)).split("/")
        names.append(folders[part] if part < len(folders) else str(label))
    return tuple(names)


def check_images(dataset: Dataset, splits: list[str]) -> None:
    """Look for up to 1,000 images of each list on disk. Raises UserError for the first missing one.

    That is enough to find lists that do not match the folder; decoding finds the rest."""
    for image_list in (dataset.lists[split] for split in splits):
        for i in np.unique(np.linspace(0, len(image_list) - 1, SAMPLE).astype(np.int64)):
            file = dataset.image_root.file(image_list.path(i))
            if not file.is_file():
                if dataset.image_root.pack is not None:
                    raise UserError(f"{image_list.place(i)}: {file}: {file.fault()}")
                rewritten = f" (rewritten by {dataset.folder / 'local.yaml'})" if dataset.image_root.rules else ""
                raise UserError(
                    f"{image_list.place(i)}: there is no image {file}{rewritten}; does the list belong to this image root "
                    f"({dataset.image_root.folder})? Give another root with --data-dir DIR; if the paths differ from those on "
                    f"disk, python -m reslt.prepare check {shlex.quote(dataset.reference)} --fix-paths tries other layouts"
                )

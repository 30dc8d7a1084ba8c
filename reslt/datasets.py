"""A folder of lists -> a dataset: lists, class counts, class names, shot groups, image root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from reslt.errors import UserError
from reslt.groups import STANDARD_SPLIT, shot_groups
from reslt.lists import ImageList, images_per_class, read_list
from reslt.sources import PROJECT, dataset_folder, read_yaml

INFO_KEYS = {
    "description",
    "num_classes",
    "class_names",
    "images",
    "image_root",
    "shot_split",
    "paper_split",
    "defaults",
}
LOCAL_KEYS = {"image_root"}
LOOKED_AT = 1000


@dataclass(frozen=True)
class Dataset:
    """What a `data_lists/<name>` folder says. `lists` holds 'train' and, where the files exist, 'val' and 'test'."""

    name: str
    folder: Path
    image_root: Path
    lists: dict[str, ImageList]
    num_classes: int
    class_names: tuple[str, ...] | None
    splits: dict[str, dict]  # 'standard' or the dataset's own, and 'paper' where the dataset states one

    @cached_property
    def images_per_class(self) -> np.ndarray:
        """(C,) int64 training images."""
        return images_per_class(self.lists["train"].labels, self.num_classes)

    def eval_splits(self, wanted: str | None) -> list[str]:
        """'val', 'test', 'both' or None (val where there is one, else test) -> lists to evaluate while training.

        Raises UserError for a list that does not exist."""
        if wanted is None:
            return [split for split in ("val", "test") if split in self.lists][:1]
        splits = ["val", "test"] if wanted == "both" else [wanted]
        for split in splits:
            if split not in self.lists:
                raise UserError(f"--eval-split {wanted}: {self.folder / f'{split}.txt'} does not exist")
        return splits

    @cached_property
    def shot_groups(self) -> dict[str, dict[str, np.ndarray]]:
        """{split: {'many' | 'medium' | 'few': (C,) bool}}"""
        return {name: shot_groups(self.images_per_class, split) for name, split in self.splits.items()}


def load_dataset(data: str, data_dir: str | None = None) -> Dataset:
    """Read and verify a dataset by name or folder. Raises UserError with file, value and remedy.

    Where info.yaml states neither `class_names` nor `num_classes`, the labels of train.txt decide."""
    folder = dataset_folder(data)
    name, info_file = folder.resolve().name, folder / "info.yaml"
    info = read_yaml(info_file) if info_file.is_file() else {}
    _refuse_unknown(info, INFO_KEYS, info_file)
    lists = {split: read_list(f) for split in ("train", "val", "test") if (f := folder / f"{split}.txt").is_file()}
    if "train" not in lists:
        raise UserError(
            f"{folder / 'train.txt'} does not exist; `python -m reslt.prepare --help` shows how lists are made"
        )

    names, num_classes = info.get("class_names"), info.get("num_classes")
    if names is not None:
        plain = isinstance(names, list) and all(isinstance(n, (str, int)) and not isinstance(n, bool) for n in names)
        if not plain or not names or len(set(map(str, names))) != len(names):
            raise UserError(
                f"{info_file}: class_names must be a list of different texts (in quotes: yes, no, null), one per class"
            )
        if num_classes not in (None, len(names)):
            raise UserError(f"{info_file}: num_classes is {num_classes!r}, but class_names has {len(names)} names")
        num_classes = len(names)
    if num_classes is None:
        num_classes = int(lists["train"].labels.max()) + 1
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise UserError(
            f"{info_file}: there must be at least 2 classes, a whole number; num_classes is {num_classes!r}"
        )
    for image_list in lists.values():
        image_list.check_labels(num_classes)
    present = np.unique(lists["train"].labels)
    if len(present) < num_classes:
        missing = int(np.argmax(np.append(present, -1) != np.arange(len(present) + 1)))
        called = f" ({names[missing]})" if names else ""
        raise UserError(
            f"{lists['train'].file}: class {missing}{called} has no training image ({num_classes - len(present)} such "
            f"classes of {num_classes}); number the classes 0..C-1 without gaps, or correct num_classes in {info_file}"
        )
    splits = {"standard": info.get("shot_split", STANDARD_SPLIT)}
    if "paper_split" in info:
        splits["paper"] = info["paper_split"]
    for key, split in zip(("shot_split", "paper_split"), splits.values(), strict=False):
        try:
            shot_groups(images_per_class(lists["train"].labels, num_classes), split)
        except UserError as fault:
            raise UserError(f"{info_file}: {key}: {fault}") from None
    return Dataset(
        name=name,
        folder=folder,
        image_root=find_image_root(folder, info, data_dir),
        lists=lists,
        num_classes=num_classes,
        class_names=tuple(map(str, names)) if names else None,
        splits=splits,
    )


def check_images(dataset: Dataset, splits: list[str]) -> None:
    """Look for up to 1,000 images of each list on disk. Raises UserError for the first that is missing.

    Enough to find lists that do not match the folder; the decoder finds the rest."""
    for image_list in (dataset.lists[split] for split in splits):
        for i in np.unique(np.linspace(0, len(image_list) - 1, LOOKED_AT).astype(np.int64)):
            path = dataset.image_root / image_list.path(i)
            if not path.is_file():
                raise UserError(
                    f"{image_list.place(i)}: there is no image {path}; does the list belong to this image root "
                    f"({dataset.image_root})? Another root: --data-dir DIR"
                )


def find_image_root(folder: Path, info: dict, data_dir: str | Path | None) -> Path:
    """--data-dir, else RESLT_DATA/<images>, else local.yaml's or info.yaml's image_root, else data/<images>; <images>
    is info.yaml's `images`, else the folder's name. Raises UserError where it is not a folder."""
    local_file = folder / "local.yaml"
    local = read_yaml(local_file) if local_file.is_file() else {}
    _refuse_unknown(local, LOCAL_KEYS, local_file)
    images = info.get("images", folder.resolve().name)
    if not isinstance(images, str):
        raise UserError(f"{folder / 'info.yaml'}: images must be the name of a folder, not {images!r}")
    shared = os.environ.get("RESLT_DATA")
    if data_dir is not None:
        root, source = Path(data_dir).expanduser(), "--data-dir"
    elif shared and (Path(shared) / images).is_dir():
        root, source = Path(shared) / images, "RESLT_DATA"
    elif local.get("image_root") or info.get("image_root"):
        source = local_file if local.get("image_root") else folder / "info.yaml"
        root = folder / Path(str(local.get("image_root") or info["image_root"])).expanduser()
    else:
        root, source = PROJECT / "data" / images, "the default place"
    if not root.is_dir():
        raise UserError(
            f"image root {root} (from {source}) is not a folder; give the folder that the paths of {folder / 'train.txt'} start "
            f"from with --data-dir DIR, or set RESLT_DATA to a folder that holds {images}/"
        )
    return root


def _refuse_unknown(content: dict, known: set[str], file: Path) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise UserError(f"{file}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")

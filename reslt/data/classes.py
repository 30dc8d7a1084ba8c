"""The meaning of a model's outputs: the classes of its run, and the mapping of a dataset's classes onto them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from reslt.core.errors import UserError
from reslt.core.text import listed, shown
from reslt.data.groups import shot_groups

BY_NAME, BY_INDEX = "by name", "by index"
SHOWN_NAMES = 3


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that a model was trained on, in the order of its outputs. Runs of earlier versions record only their
    number and the digests of their lists."""

    number: int
    names: tuple[str, ...] | None = None
    images_per_class: np.ndarray | None = None  # (C,) training images
    shot_splits: Mapping[str, dict] | None = None  # rules, as in `Dataset.splits`
    lists: Mapping[str, str] = field(default_factory=dict)  # digest of each list

    def stored(self) -> dict:
        """Return the entries of state.json and of a folded file's metadata."""
        counts = self.images_per_class
        return {
            "num_classes": self.number,
            "class_names": None if self.names is None else list(self.names),
            "images_per_class": None if counts is None else counts.tolist(),
            "shot_splits": None if self.shot_splits is None else dict(self.shot_splits),
            "lists": dict(self.lists),
        }

    @classmethod
    def read(cls, stored: Mapping) -> Classes:
        """Return the classes of entries in which `fault_of` finds nothing."""
        names, counts = stored.get("class_names"), stored.get("images_per_class")
        return cls(
            stored["num_classes"],
            None if names is None else tuple(names),
            None if counts is None else np.array(counts, np.int64),
            stored.get("shot_splits"),
            stored.get("lists", {}),
        )

    def completed_by(self, dataset: Classes) -> Classes:
        """Return the dataset's classes if these, of a run of an earlier version, have no names and their training list is
        the dataset's; else return these."""
        is_same = self.lists.get("train") is not None and self.lists.get("train") == dataset.lists.get("train")
        return dataset if is_same and self.names is None else self


def fault_of(stored: Mapping) -> str | None:
    """Return the error in entries of `Classes.stored`; None if they are valid. All but the number may be missing."""
    number, lists = stored.get("num_classes"), stored.get("lists", {})
    names, counts, splits = (stored.get(name) for name in ("class_names", "images_per_class", "shot_splits"))
    if not _is_count(number):
        return f"num_classes is {str(number)[:80]!r}, not a whole number from 0"
    if names is not None:
        if not isinstance(names, list) or len(names) != number or not all(isinstance(name, str) for name in names):
            return f"class_names is not a list of {str(number)[:20]} strings, one per class"
        if len(set(names)) != number:
            return "class_names contains a name twice"
        try:
            "".join(names).encode()
        except UnicodeEncodeError:
            return "class_names contains a name that is not text"
    if counts is not None:
        if not isinstance(counts, list) or len(counts) != number:
            return f"images_per_class is not a list of {str(number)[:20]} numbers, one per class"
        if not all(_is_count(count) and 0 < count < 2**31 for count in counts):
            return "images_per_class contains a value that is not a whole number from 1"
    if splits is not None:
        if not isinstance(splits, dict) or counts is None or not {"standard"} <= set(splits) <= {"standard", "paper"}:
            return "shot_splits does not map standard (and paper) to rules, or there are no training counts to apply them to"
        try:
            for split in splits.values():
                shot_groups(np.array(counts), split)
        except UserError as fault:
            return str(fault)[:200]
    if not isinstance(lists, dict) or not all(isinstance(digest, str) for digest in lists.values()):
        return "lists is not a mapping of digests"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """The mapping of a dataset's classes onto those of a model."""

    model_class: np.ndarray  # (C of the dataset,) int32: the model's class for each class of the dataset
    how: str  # BY_NAME or BY_INDEX
    note: str = ""  # for the title of a table; empty if both have the same names in the same order

    @property
    def is_identity(self) -> bool:
        """Whether every class keeps its number."""
        return bool((self.model_class == np.arange(len(self.model_class))).all())


def match_classes(model: Classes, data: Classes, checkpoint: Path, folder: Path, by_index: bool = False) -> ClassMatch:
    """Match the classes of a dataset in `folder` with those of a checkpoint's model: by name if both have names, by number
    otherwise or with `by_index`.

    Raises UserError for a name that the model does not know, for the same training list with its names in another order,
    and for different numbers of classes if they are matched by number."""
    if model.names is None or data.names is None or by_index:
        if model.number != data.number:
            raise UserError(
                f"--ckpt {checkpoint} was trained on {model.number} classes, but {folder} has {data.number}; "
                "give the dataset with its classes with --data"
            )
        return ClassMatch(np.arange(data.number, dtype=np.int32), BY_INDEX, "classes by index")
    ours, theirs = _comparable(model.names, data.names)
    index = {name: k for k, name in enumerate(ours)}
    if unknown := [name for name, key in zip(data.names, theirs, strict=True) if key not in index]:
        known = set(theirs)
        missing = [name for name, key in zip(model.names, ours, strict=True) if key not in known]
        also = f", and lacks {listed(missing, SHOWN_NAMES, quoted=True)}" if missing else ""
        renamed = "; if both list the same classes in the same order under other names, add --classes-by-index"
        raise UserError(
            f"--ckpt {checkpoint} was trained on other classes than those of {folder}, which has "
            f"{listed(unknown, SHOWN_NAMES, quoted=True)}{also}; give a dataset with the classes of the run (--data), or "
            f"rename those in its info.yaml{renamed if data.number == model.number else ''}"
        )
    match = ClassMatch(np.array([index[key] for key in theirs], np.int32), BY_NAME)
    if not match.is_identity and data.lists.get("train", "") == model.lists.get("train"):
        k = int(np.flatnonzero(match.model_class != np.arange(data.number))[0])
        raise UserError(
            f"{folder}: its train.txt is that of --ckpt {checkpoint}, in which label {k} is {shown(model.names[k])!r}, but "
            f"its info.yaml now names it {shown(data.names[k])!r}; restore its class_names, or add --classes-by-index"
        )
    notes = [f"{data.number:,} of the model's {model.number:,} classes"] * (data.number < model.number)
    notes += ["classes matched by name"] * (not match.is_identity)
    return replace(match, note=", ".join(notes))


def known_classes(model: Classes, data: Classes) -> ClassMatch | None:
    """Match the classes of a dataset with those of a model trained on another one: by name if both have names, by number if
    neither has names and the numbers of classes agree. `model_class` is -1 for a class that the model does not know. Return
    None if neither is possible."""
    if model.names is not None and data.names is not None:
        ours, theirs = _comparable(model.names, data.names)
        index = {name: k for k, name in enumerate(ours)}
        return ClassMatch(np.array([index.get(key, -1) for key in theirs], np.int32), BY_NAME)
    if model.names is None and data.names is None and model.number == data.number:
        return ClassMatch(np.arange(data.number, dtype=np.int32), BY_INDEX)
    return None


def _comparable(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return names of two sources in one Unicode form, or unchanged if two of them would become equal."""
    forms = _composed(ours), _composed(theirs)
    return forms if all(len(set(names)) == len(names) for names in forms) else (list(ours), list(theirs))


def _composed(names: tuple[str, ...]) -> list[str]:
    """Return names in one Unicode form: macOS encodes accents in folder names differently."""
    return [unicodedata.normalize("NFC", name) for name in names]

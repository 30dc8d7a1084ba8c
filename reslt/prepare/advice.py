"""Advice from class counts: the flags of `train.py` that suit them, and remarks on what the images are too few for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reslt.config.recipes import read_recipe
from reslt.config.schema import DEFAULTS, flag_of
from reslt.data.datasets import Dataset
from reslt.data.groups import branch_sets
from reslt.data.lists import images_per_class

STEPS_PER_EPOCH = 10  # at least, for short lists
PRETRAINED_BELOW = 100_000  # training images; the paper trains longer lists from scratch at 224 pixels
# Measured on CIFAR-100-LT (100 to 1): the prior in the loss with alpha 0.5 gains 1 to 4 points, most in rare classes.
# Not measured below 100 to 1; at 10 to 1 the prior shifts the rarest class by a factor of ten.
ADJUSTED_FROM = 10  # times as many images in the largest class as in the smallest
TESTED_ENOUGH = 5  # images of a class; with fewer, accuracy changes in steps of 25 points or more
MODEL = "resnet50"
RECIPE = "own_finetune"
# Written by `own` to `defaults:` of a dataset with few photos. `bn` branches hardly change learned features, and fold into
# the classifier. (The recipe's layer decay is not among these: it would harm training from scratch with --no-pretrained.)
FINE_TUNING = {"pretrained": True, "tune": "full", "branch": "bn"}


@dataclass(frozen=True)
class Advice:
    """Settings of `train.py` by name, a line for each of the reasons and warnings, and a recipe."""

    settings: dict[str, object]
    remarks: list[str]
    recipe: str | None = None

    def flags(self) -> str:
        """Return recipe and settings as flags, each after a space."""
        settings = "".join(f" {flag_of(name)}{_value(value)}" for name, value in self.settings.items())
        return (f" --recipe {self.recipe}" if self.recipe else "") + settings


def _value(value: object) -> str:
    return "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"


def advise(
    trained_per_class: np.ndarray,
    tested_per_class: np.ndarray | None,
    names: Sequence[str],
    stated: Mapping[str, object],
) -> Advice:
    """Return advice for (C,) training counts, (C,) counts of the list that is tested on (None: none) and class names. It does
    not contradict the dataset's own `defaults:`, `stated`."""
    images, settings, remarks, recipe = int(trained_per_class.sum()), {"model": MODEL}, [], None
    if images < PRETRAINED_BELOW:
        chosen, _, _ = read_recipe(RECIPE)
        recipe = RECIPE if all(stated.get(name, value) == value for name, value in chosen.items()) else None
        settings |= {} if recipe else {"pretrained": True}
        start = f"--recipe {RECIPE}" if recipe else "--pretrained"
        remarks.append(
            f"{images:,} training images are few to learn features from: {start} starts from learned ones (without network: "
            "--pretrained-file FILE); on a CPU, --tune head in place of a recipe is a first result within minutes"
        )
    fitting = settings_for(images)
    if all(stated.get(name, value) == value for name, value in fitting.items()):
        settings |= fitting
    has_branches = stated.get("method", DEFAULTS["method"]) == "reslt"
    if has_branches and "branch_sizes" not in stated:
        has_branches = _advise_branches(
            trained_per_class, int(stated.get("branches", DEFAULTS["branches"])), settings, remarks
        )
    imbalance = int(trained_per_class.max()) / int(trained_per_class.min())
    if imbalance >= ADJUSTED_FROM:
        settings |= {"logit_adjust": 1} | ({"alpha": 0.5} if has_branches else {})
        chosen = "--logit-adjust 1" + " --alpha 0.5" * has_branches
        remarks.append(
            f"the largest class has {imbalance:,.0f} times as many images as the smallest: {chosen} (if every class counts "
            "the same in the test)"
        )
    if tested_per_class is not None and len(few := np.flatnonzero(tested_per_class < TESTED_ENOUGH)):
        first = int(few[0])
        remarks.append(
            f"classes tested on fewer than {TESTED_ENOUGH} images: {len(few):,} of {len(names):,}, first {names[first]!r} on "
            f"{tested_per_class[first]}; their accuracy says little"
        )
    settings = {name: value for name, value in settings.items() if stated.get(name, value) == value}
    return Advice(settings, remarks, recipe)


def advise_on(dataset: Dataset, stated: Mapping[str, object]) -> Advice:
    """Advise on a dataset; it is tested on test.txt, else on val.txt."""
    split = next((split for split in ("test", "val") if split in dataset.lists), None)
    tested = images_per_class(dataset.lists[split].labels, dataset.num_classes) if split else None
    return advise(dataset.images_per_class, tested, dataset.class_names, stated)


def _advise_branches(counts: np.ndarray, branches: int, settings: dict[str, object], remarks: list[str]) -> bool:
    """Advise fewer branches, or a method without branches, if class sets coincide. Return whether branches are left."""
    distinct = next(k for k in range(branches, 0, -1) if len(np.unique(branch_sets(counts, k), axis=0)) == k)
    if distinct == branches:
        return True
    more = f", more than the {len(counts)} classes" if branches > len(counts) else ""
    found = f"{branches} branches{more}: class sets of branches coincide for these counts"
    if distinct == 1:
        settings["method"] = "ce"
        remarks.append(f"{found}, since all classes have the same number of images: --method ce")
        return False
    settings["branches"] = distinct
    remarks.append(f"{found}: --branches {distinct}")
    return True


def defaults_for(images: int) -> dict[str, object]:
    """Return `defaults:` for a dataset with this many training images if the built-in ones do not fit: the start from
    trained weights, batch size and learning rate."""
    return (FINE_TUNING if images < PRETRAINED_BELOW else {}) | settings_for(images)


def settings_for(images: int) -> dict[str, float]:
    """Return a smaller batch size, a power of two, and a learning rate in proportion to it if an epoch of default batches
    would have too few steps; else {}."""
    if images >= STEPS_PER_EPOCH * DEFAULTS["batch_size"]:
        return {}
    batch = max(2, 2 ** int(np.log2(max(images // STEPS_PER_EPOCH, 2))))
    return {"batch_size": batch, "lr": DEFAULTS["lr"] * batch / DEFAULTS["batch_size"]}

"""A dataset as a trained model sees it: with the model's classes, and the shot groups of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reslt.config.places import dataset_folder
from reslt.config.schema import DataSettings
from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.data.classes import BY_INDEX, Classes, ClassMatch, match_classes
from reslt.data.datasets import Dataset, check_images, how_to_prepare, list_files, load_dataset, read_info
from reslt.data.lists import read_list


def load_for_evaluation(
    data: DataSettings,
    split: str | None,
    model: Classes,
    checkpoint: Path,
    is_other: bool,
    by_index: bool = False,
    seed: int = 0,
    also: Sequence[str] = (),
) -> tuple[Dataset, str]:
    """Return a dataset with its classes numbered as those of a checkpoint's model, and the name of the list to evaluate. The
    folder needs no train.txt if the run recorded its training counts.

    `split`: the list; None: test, else val. `also`: further lists to check if they exist. `is_other`: the dataset was named
    for this evaluation, not for training. `by_index`: do not compare class names. `seed`: that of the run, which drew the
    images that it set aside.

    Logs one warning about everything that cannot be verified. Raises UserError if the classes do not match, if there is no
    such list, if the training list has changed since the list to evaluate was set aside from it, and for a missing image."""
    try:
        has_val = "val" in list_files(dataset_folder(data.data))  # perhaps added after a run that set images aside
        dataset = load_dataset(
            data.data,
            data.data_dir,
            bad_images=data.bad_images,
            model_classes=model.number,
            val_from_train=None if is_other or has_val else data.val_from_train,
            seed=seed,
            only_shots=None if is_other else data.only_shots,
        )
    except UserError as fault:
        if is_other:
            raise
        raise UserError(
            f"{fault} ({checkpoint} was trained with --data {data.data}; give another with --data)"
        ) from None
    match = match_classes(model, dataset.classes, checkpoint, dataset.folder, by_index)
    chosen = split or next((name for name in ("test", "val") if name in dataset.lists), None)
    if chosen not in dataset.lists:
        missing = f"no {chosen}.txt" if chosen else "neither test.txt nor val.txt"
        raise UserError(f"{dataset.folder} has {missing}: there is nothing to evaluate; give another list or dataset")
    if model.images_per_class is None and "train" not in dataset.lists:
        remedy = how_to_prepare(dataset.folder, read_info(dataset.folder))
        raise UserError(
            f"{dataset.folder / 'train.txt'} does not exist, and {checkpoint} does not record its training counts, from "
            f"which the shot groups are derived; {remedy}"
        )
    read = [name for name in dict.fromkeys((chosen, *also)) if name in dataset.lists]
    is_set_aside = "val" in read and dataset.val_is_set_aside
    if is_set_aside and model.lists.get("val", dataset.digests["val"]) != dataset.digests["val"]:
        raise UserError(
            f"{dataset.lists['val'].file}: the images that {checkpoint} set aside (--val-from-train) cannot be found again, "
            "since the list, or the images that --bad-images skip leaves out of it, have changed; restore it, or evaluate "
            "only the test list"
        )
    check_images(dataset, read)
    seen = _seen_by(model, dataset, match, is_other)
    if doubts := _doubts(model, dataset, seen, chosen, is_other, by_index):
        logger.warning(f"{checkpoint}: {'; '.join(doubts)}")
    return seen, chosen


def load_averaged(
    data: DataSettings,
    evaluated: Dataset,
    model: Classes,
    checkpoint: Path,
    is_other: bool,
    by_index: bool = False,
    seed: int = 0,
) -> Dataset:
    """Return the dataset with the training images of a run, for class means. `evaluated`: the dataset to evaluate, which is
    that of the run unless `is_other`; `data`, `seed`: the run's settings. Raises UserError if there is no training list,
    and for a missing image."""
    own = evaluated
    if is_other:
        own, _ = load_for_evaluation(data, "train", model, checkpoint, False, by_index, seed)
    if "train" not in own.lists:
        raise UserError(
            f"--ncm: {own.folder / 'train.txt'} does not exist, and class means require the training images; evaluate on a "
            "machine that has them, or drop it (--ncm none)"
        )
    check_images(own, ["train"])
    return own


def _seen_by(model: Classes, dataset: Dataset, match: ClassMatch, is_other: bool) -> Dataset:
    """Return a dataset with the classes of a model. The shot rules are the run's, except for the run's own dataset with its
    classes in the order of training: its info.yaml may have been edited since."""
    lists, splits = dataset.lists, dataset.splits
    if not match.is_identity:
        lists = {name: replace(images, labels=match.model_class[images.labels]) for name, images in lists.items()}
    if model.shot_splits and (is_other or not match.is_identity):
        splits = dict(model.shot_splits)
    return replace(
        dataset,
        lists=lists,
        num_classes=model.number,
        class_names=model.names or dataset.class_names,
        splits=splits,
        training_counts=model.images_per_class,
        match=match,
    )


def _doubts(model: Classes, dataset: Dataset, seen: Dataset, chosen: str, is_other: bool, by_index: bool) -> list[str]:
    """Return warnings about everything that the numbers rely on and class names do not prove."""
    doubts, folder, match = [], dataset.folder, seen.match
    is_same = "train" in dataset.lists and model.lists.get("train") == dataset.digests["train"]
    if match.how == BY_INDEX and not by_index:
        lacking = "the run" if dataset.class_names else folder
        who = (
            f"{lacking} has no class names"
            if model.names or dataset.class_names
            else f"neither the run nor {folder} has class names"
        )
        sure = "; train.txt is that of the run" if is_same else ", so both must list the same classes in the same order"
        doubts.append(f"{who}: classes are matched by index{sure}")
    if is_other:
        return doubts
    checked = [name for name in dict.fromkeys(("train", chosen)) if name in dataset.lists and name in model.lists]
    changed = [f"{name}.txt" for name in checked if model.lists[name] not in _digests(seen, name)]
    if changed and match.is_identity:
        verb = "differs" if len(changed) == 1 else "differ"
        doubts.append(
            f"{' and '.join(changed)} of {folder} {verb} from training: the numbers are right only if labels still mean the "
            "same classes"
        )
    if "train.txt" in changed and _groups_differ(dataset, seen):
        doubts.append("shot groups are those of the run's training counts, not of the present train.txt")
    return doubts


def _digests(dataset: Dataset, split: str) -> set[str]:
    """Return the digest of a list and, if bad images are left out of it, that of the whole file."""
    whole = {read_list(dataset.lists[split].file).digest} if split in dataset.left_out else set()
    return whole | {dataset.digests[split]}


def _groups_differ(dataset: Dataset, seen: Dataset) -> bool:
    """Return whether the dataset's own training list puts any class into another shot group."""
    own, used = dataset.shot_groups, seen.shot_groups
    return any(
        (groups[shot] != used[name][shot][seen.match.model_class]).any()
        for name, groups in own.items()
        if name in used
        for shot in groups
    )

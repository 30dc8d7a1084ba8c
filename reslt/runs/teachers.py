"""Reading of teachers, `--teachers`: trained networks, in runs or folded files, from which another network learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.data import resolve_model_data_config
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.core.text import one_line
from reslt.data.classes import Classes, known_classes
from reslt.data.datasets import Dataset
from reslt.data.groups import SHOTS
from reslt.models.create import create_model
from reslt.models.digest import weights_digest
from reslt.models.fold import is_folded, load_folded
from reslt.runs.folder import find
from reslt.training.teachers import Teachers

FLAG = "--teachers"
DIGITS = 16  # of the 64 of a digest


def read_teachers(
    places: Sequence[str], dataset: Dataset, images: ImageSettings, drawn_by: tuple[float | None, int]
) -> tuple[Teachers, list[str]]:
    """Read the teachers of the many, medium and few classes of a dataset, in this order, on the CPU. Return them and the
    digests of their weights. `images`: how the run prepares images; `drawn_by`: its --val-from-train and --seed. Warns if a
    teacher may have been trained on images that this run sets aside.

    Raises UserError for a group without a class, and for a teacher of other classes, another group or other images."""
    groups = dataset.shot_groups["standard"]
    if "val" not in dataset.lists:
        raise UserError(
            f"{FLAG}: teachers are weighted by accuracies on a validation list, and {dataset.folder} has none; set a part of "
            "the training list aside with --val-from-train 0.1, for the teachers too, with the same --seed"
        )
    if empty := [shot for shot in SHOTS if not groups[shot].any()]:
        raise UserError(
            f"{FLAG}: {dataset.folder} has no {empty[0]} classes by its shot split, but each group requires a teacher; state "
            "another shot_split in info.yaml"
        )
    networks = []
    for place, shot in zip(places, SHOTS, strict=True):
        try:
            networks.append(_read(Path(place), shot, dataset, images, drawn_by))
        except UserError as fault:
            raise UserError(f"{FLAG} {one_line(place)}: {fault}") from None
    digests = [weights_digest(dict(sorted(network.state_dict().items())))[:DIGITS] for network in networks]
    return Teachers(networks, groups), digests


def _read(
    place: Path, shot: str, dataset: Dataset, images: ImageSettings, drawn_by: tuple[float | None, int]
) -> nn.Module:
    if is_folded(place):
        network, described = load_folded(place)
        classes, taught_on = Classes.read(described), None
        prepared = {name: described.get(name) for name in ("img_size", "mean", "std")}
    else:
        found = find(place)
        config, classes = found.config(), found.classes
        network = create_model(config.model, config.method, classes.number, config.augment.img_size)
        found.load_evaluated(network)
        taught_on = found.state["config"].get("only_shots")
        own = ImageSettings.of(config.augment, resolve_model_data_config(network.backbone))
        prepared = {"img_size": own.size, "mean": own.mean, "std": own.std}
        if dataset.val_is_set_aside and (config.data.val_from_train, config.run.seed) != drawn_by:
            logger.warning(
                f"{FLAG} {one_line(place)}: it may have been trained on this run's validation images, on which teachers are "
                f"weighted: it was trained with --val-from-train {config.data.val_from_train} --seed {config.run.seed}, and "
                f"this run has --val-from-train {drawn_by[0]} --seed {drawn_by[1]}; give both the same"
            )
    match = known_classes(classes, dataset.classes)
    if classes.number != dataset.num_classes or match is None or not match.is_identity:
        raise UserError(f"its classes are not those of {dataset.folder}, in the same order; train it on the same lists")
    if taught_on not in (None, shot):
        raise UserError(
            f"it was trained with --only-shots {taught_on}, but is the teacher of the {shot} classes; give many, medium, few"
        )
    required = {"img_size": images.size, "mean": images.mean, "std": images.std}
    for name, value in required.items():
        if _plain(prepared[name]) != _plain(value):
            raise UserError(
                f"it was trained with {name} {prepared[name]}, but sees this run's images, with {name} {value}; give a "
                "teacher that was trained with the same"
            )
    return network


def _plain(value: object) -> object:
    return [round(number, 6) for number in value] if isinstance(value, (list, tuple)) else value

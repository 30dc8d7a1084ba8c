"""Training that starts from trained weights, `--init-from`: those of a run, of a folded file, or of timm.

Only tensors and the names of classes are read; the source, which may be a stranger's, chooses neither the model nor any
setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reslt.core.errors import UserError
from reslt.core.text import counted, listed, one_line
from reslt.data.classes import BY_INDEX, Classes, ClassMatch, known_classes
from reslt.models.digest import weights_digest
from reslt.models.experts import Network
from reslt.models.finite import not_finite
from reslt.models.fitting import Fitting, fitting
from reslt.models.fold import is_folded, read_folded, unfolded_names
from reslt.models.lora import plain_tensors
from reslt.models.weight_files import read_weights
from reslt.runs.folder import find

FLAG = "--init-from"
MOST_SHOWN = 3
DIGITS = 16  # of the 64 of a digest


@dataclass(frozen=True)
class Source:
    """Trained weights, under the names of `ResLT` or `Experts` on plain timm models, and the classes of their classifier
    (None: unknown)."""

    name: str
    tensors: dict[str, torch.Tensor]
    classes: Classes | None = None

    @property
    def digest(self) -> str:
        """The beginning of the SHA-256 of all tensors, in the order of their names."""
        return weights_digest(dict(sorted(self.tensors.items())))[:DIGITS]


def read_source(place: Path, model: Network) -> Source:
    """Read the weights that a user names. `place`: a run (its best checkpoint if a validation list chose one, else its last),
    a checkpoint or a file in it, each with the weights to evaluate; a folded file; or a file of timm's weights for the
    backbone of `model`. Raises UserError."""
    name = one_line(place)
    if is_folded(place):
        weights, described = read_folded(place)
        return Source(f"{name} (folded)", plain_tensors(unfolded_names(weights)), Classes.read(described))
    if place.is_dir() or place.name in ("last", "best") or (place.parent / "state.json").is_file():
        found = find(place)
        part = found.weights or found.evaluated
        average = ", moving average" * (part == "ema")
        tensors = plain_tensors(found.tensors(part), found.state["config"].get("lora_alpha"))
        return Source(f"{name} (epoch {found.epochs_done}{average})", tensors, found.classes)
    weights = read_weights(place, model.backbone, "weights")
    return Source(name, {f"backbone.{key}": tensor for key, tensor in weights.items()})


def initialize(model: Network, place: str, classes: Classes) -> tuple[str, str]:
    """Load those weights from a place on disk that fit into a model, on the CPU. `classes`: those of the dataset.

    Return the digest of the source's weights, and a text that lists which weights were taken and which are new. Raises
    UserError."""
    try:
        source = read_source(Path(place), model)
        match = source.classes and known_classes(source.classes.completed_by(classes), classes)
        found = fitting(model, source.tensors, match and match.model_class)
        if bad := not_finite(found.tensors, model):
            raise UserError(f"{bad} is not finite; use another checkpoint")
    except UserError as fault:
        raise UserError(f"{FLAG} {one_line(place)}: {fault}") from None
    model.load_state_dict(found.tensors, strict=False)
    return source.digest, f"{source.name}: {describe(found, match, classes)}"


def describe(found: Fitting, match: ClassMatch | None, classes: Classes) -> str:
    """Return a text such as '62 weights; classifier: 9 of 10 rows; new: branches (5 weights), 1 classifier row (dog)'."""
    text, new = counted(found.weights, "weight"), []
    nouns = {"backbone": "late stages of experts", "updates": "low-rank updates", "projection": "projection head"}
    for kind in ("backbone", "updates", "adapters", "branches", "gates", "router", "projection"):
        counts = [number for part, number in found.new_weights.items() if part.rpartition(".")[2] == kind]
        new += [f"{nouns.get(kind, kind)} ({counted(sum(counts), 'weight')})"] * bool(counts)
    if match is None:
        new.append("classifier (the classes of its rows are unknown)")
    elif not found.classifiers:
        new.append("classifier")
    else:
        is_new = match.model_class < 0
        text += f"; classifier: {classes.number - is_new.sum():,} of {classes.number:,} rows"
        text += " by index" * (match.how == BY_INDEX)
        if is_new.any():
            names = listed([classes.names[k] for k in np.flatnonzero(is_new)], MOST_SHOWN)
            new.append(f"{counted(int(is_new.sum()), 'classifier row')} ({names})")
        new += [f"{name} of the classifier" for name in sorted(found.new_in_classifier)]
        if found.new_classifiers:
            new.append(f"{found.new_classifiers} of {found.classifiers + found.new_classifiers} classifiers")
    text += f"; new: {', '.join(new)}" * bool(new)
    return text + f"; left out: {listed(sorted(found.left_out), MOST_SHOWN)}" * bool(found.left_out)

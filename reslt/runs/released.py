"""Checkpoints of the authors' code, read into this suite's models.

Such a file is a dict whose `state_dict` names a torchvision ResNet's weights (module.conv1.weight ...), the branches
(finalBlock: a 1x1 convolution to 3 D channels, a BatchNorm) and the classifier (fc). With experts: layer3s, layer4s,
ResLTBlocks and linears, each followed by the expert's number. Its classes are in ascending order of training images.
"""

from __future__ import annotations

import argparse
import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from reslt.config.places import dataset_folder
from reslt.config.resolve import configure
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.data.classes import Classes
from reslt.data.datasets import list_files, load_dataset
from reslt.models.experts import Experts
from reslt.models.finite import not_finite

# The authors' names -> ours; the first pattern that matches applies.
NAMES = (
    (r"layer(\d+)s\.(\d+)\.", r"experts.\2.backbone.layer\1."),
    (r"ResLTBlocks\.(\d+)\.0\.", r"experts.\1.branches.conv."),
    (r"ResLTBlocks\.(\d+)\.1\.", r"experts.\1.branches.bn."),
    (r"linears\.(\d+)\.", r"experts.\1.backbone.fc."),
    (r"finalBlock\.0\.", "branches.conv."),
    (r"finalBlock\.1\.", "branches.bn."),
    (r"", "backbone."),
)
# The accuracy next to the weights may be a NumPy number, pickled under NumPy 1.x's names. These functions can build
# nothing else.
_scalar = (np._core if hasattr(np, "_core") else np.core).multiarray.scalar
NUMPY_NUMBERS = [
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
    codecs.encode,
]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint of the authors' code, with the configuration of its model."""

    file: Path
    weights: dict[str, torch.Tensor]  # without `module.`
    flags: dict
    class_order: np.ndarray  # (C,) dataset class of each classifier row
    epochs_done: int | None
    classes: Classes  # those of the dataset that the user names: the file states none
    steps_of_the_next = MappingProxyType({})  # the authors' code writes checkpoints only at the end of an epoch
    is_best = False

    @classmethod
    def read(cls, file: Path, given: argparse.Namespace) -> ReleasedCheckpoint:
        """Read with `weights_only`, so that nothing in the file is executed. Raises UserError."""
        for name in ("model", "data"):
            if getattr(given, name) is None:
                raise UserError(f"{file}: a released checkpoint does not state its {name}; give it with --{name}")
        content = load_tensors(file)
        weights = {
            k.removeprefix("module."): v for k, v in content["state_dict"].items() if isinstance(v, torch.Tensor)
        }
        experts = {int(found[1]) for name in weights if (found := re.match(r"linears\.(\d+)\.", name))}
        classifier = weights.get("linears.0.weight" if experts else "fc.weight")
        if classifier is None:
            raise UserError(
                f"{file}: it contains no classifier (fc or linears); --format released reads the authors' files"
            )
        flags = {
            "data": given.data,
            "model": given.model,
            "method": "reslt",
            "branch": "conv",
            "experts": max(len(experts), 1),
        }
        if given.model_kwargs:
            flags["model_kwargs"] = given.model_kwargs
        if experts:
            flags["expert_width"] = _expert_width(weights)
        epochs = content.get("epoch")
        num_classes = len(classifier)
        if given.class_order and "train" not in list_files(dataset_folder(given.data)):
            classes = Classes(num_classes)  # converting with a given order requires no lists
        else:
            classes = load_dataset(given.data, images_needed=False).classes
        if classes.number != num_classes:
            folder = dataset_folder(given.data)
            raise UserError(
                f"{file}: it has {num_classes} classes, but {folder} has {classes.number}; is --data right?"
            )
        if given.class_order:
            order = class_order(given.class_order, num_classes)
        else:
            order = numpy1_argsort(classes.images_per_class)
        return cls(file, weights, flags, order, epochs if isinstance(epochs, int) else None, classes)

    @property
    def folder(self) -> Path:
        """The file, for messages."""
        return self.file

    @property
    def run(self) -> Path:
        """The default folder for results: output/<name of the file>."""
        return Path("output") / self.file.name.partition(".")[0]

    def config(self, **changes) -> Config:
        """Return the dataset's settings for this model, with changes. Raises UserError."""
        of_no_training = {
            "pretrained": False,
            "pretrained_file": None,
            "val_from_train": None,
            "only_shots": None,
            "mixed_precision": "no",
        }
        return configure(self.flags | of_no_training | changes)

    def load_evaluated(self, model: nn.Module) -> None:
        """Load the weights into a model of `config()`, with classifier rows in the dataset's class order, and as many branches
        as the model has. Raises UserError if they do not fit, or are not finite."""
        own = model.state_dict()
        state = {_own_name(name, isinstance(model, Experts)): weight for name, weight in self.weights.items()}
        unknown = sorted(set(state) - set(own))
        missing = sorted(
            name for name in set(own) - set(state) if not name.endswith(("fc.bias", "num_batches_tracked"))
        )
        if unknown or missing:
            raise UserError(
                f"{self.file}: it does not fit {self.flags['model']}"
                + (f"; it contains {unknown[0]} ({len(unknown)} such names), which the model lacks" if unknown else "")
                + (f"; it lacks {missing[0]} ({len(missing)} such names)" if missing else "")
                + "; is --model right, and does the file belong to ResLT?"
            )
        fitted = {}
        for name, weight in state.items():
            if ".fc." in f".{name}":
                rows = torch.empty_like(weight)
                rows[torch.from_numpy(self.class_order)] = weight
                weight = rows
            elif "branches." in name and weight.ndim and len(weight) > len(own[name]):
                weight = weight[: len(own[name])]  # the first K of the file's branches
            if weight.shape != own[name].shape:
                raise UserError(
                    f"{self.file}: {name} has shape {tuple(weight.shape)}, but {self.flags['model']} with "
                    f"{self.classes.number} classes needs {tuple(own[name].shape)}; is --model right?"
                )
            fitted[name] = weight
        for name in set(own) - set(state):
            fitted[name] = torch.zeros_like(own[name])  # the bias of a classifier without one, and BatchNorm's counters
        if bad := not_finite(fitted, model):
            raise UserError(f"{self.file}: {bad} is not finite; use another checkpoint")
        model.load_state_dict(fitted)


def load_tensors(file: Path) -> dict:
    """Read a file of torch.save with `weights_only`. Raises UserError if it contains other objects, or no
    state_dict."""
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(regular_file(file), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; give the authors' checkpoint, FILE.pth.tar") from None
    except Exception as fault:  # torch raises many types: a truncated archive, a pickle of other objects
        reason = re.sub(r"\x1b\[\d+m", "", str(fault)).partition("\n")[0] or type(fault).__name__
        raise UserError(
            f"{file}: not readable as a checkpoint of tensors only: {reason}; it is damaged, or contains other objects"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{file}: it contains no state_dict; --format released reads checkpoints of the authors' code")
    return content


def numpy1_argsort(images_per_class: np.ndarray) -> np.ndarray:
    """(C,) counts -> (C,) classes by ascending count, ties in the order that NumPy 1.x's default argsort gave them.

    That sort is unstable, so only its exact algorithm yields the order in which the authors' code numbers classes."""
    # NumPy still sorts longdouble with the introsort that 1.x used for integers, since its SIMD sorts lack this type.
    return np.argsort(images_per_class.astype(np.longdouble))


def class_order(file: Path, num_classes: int) -> np.ndarray:
    """Read --class-order, one class index per line -> (C,). Raises UserError if it is not an order of the classes."""
    try:
        order = [int(line) for line in regular_file(file).read_text().split()]
    except (OSError, ValueError) as fault:
        raise UserError(f"--class-order {file}: {fault}; write one class index per line") from None
    if sorted(order) != list(range(num_classes)):
        raise UserError(
            f"--class-order {file}: its {len(order)} numbers are not an order of 0..{num_classes - 1}; write each once"
        )
    return np.array(order, dtype=np.int64)


def _own_name(name: str, is_experts: bool) -> str:
    for pattern, replacement in NAMES:
        if re.match(pattern, name):
            own = re.sub(f"^{pattern}", replacement, name, count=1)
            return own.replace("backbone.", "shared.", 1) if is_experts and own.startswith("backbone.") else own
    raise AssertionError(name)  # the last pattern matches everything


def _expert_width(weights: dict[str, torch.Tensor]) -> float:
    """Return the width of the experts' last stage relative to that of the plain network, which doubles with each stage."""
    early = max((name for name in weights if re.match(r"layer2\.\d+\.conv3\.weight", name)), default=None)
    late = max((name for name in weights if re.match(r"layer4s\.0\.\d+\.conv3\.weight", name)), default=None)
    if early is None or late is None:
        return 1.0
    return len(weights[late]) / (4 * len(weights[early]))

"""The authors' networks: the figures recorded from them, and this suite's networks with the same weights. See README.md."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from builders import loss_of, model_of
from torch import nn

from reslt.config.schema import Config
from reslt.data.classes import Classes
from reslt.runs.released import ReleasedCheckpoint

FIGURES = Path(__file__).parent / "figures"
# The configuration of each network; alpha and the branches' classes are recorded with its figures.
SETTINGS = {
    "cifar10": dict(model="cifar_resnet32", branch="bn"),
    "cifar100": dict(model="cifar_resnet32", branch="bn"),
    "imagenet_resnet10": dict(
        model="resnet18", model_kwargs={"layers": (1, 1, 1, 1)}, branch="conv", branch_at="pooled", tau=0.3
    ),
    "imagenet_resnext50": dict(model="resnext50_32x4d", branch="conv", eval_branch_at="pooled", tau=0.7),
    "imagenet_resnext50_3experts": dict(
        model="resnext50_32x4d", experts=3, expert_width=0.75, branch="conv", eval_branch_at="pooled", tau=0.7
    ),
    "inaturalist_resnet50": dict(model="resnet50", branch="conv", eval_branch_at="pooled", tau=0.0),
}
# This suite's names of the large networks' tensors -> the authors'; the first pattern that matches applies.
THEIR_NAMES = (
    (r"experts\.(\d)\.backbone\.layer(\d)\.", r"layer\2s.\1."),
    (r"experts\.(\d)\.backbone\.fc\.", r"linears.\1."),
    (r"experts\.(\d)\.branches\.conv\.", r"ResLTBlocks.\1.0."),
    (r"experts\.(\d)\.branches\.bn\.", r"ResLTBlocks.\1.1."),
    (r"branches\.conv\.", "finalBlock.0."),
    (r"branches\.bn\.", "finalBlock.1."),
    (r"(backbone|shared)\.", ""),
)
CIFAR_BRANCHES = ("BNH", "BNM", "BNT")  # head, medium, tail


@dataclass(frozen=True)
class AuthorsNetwork:
    """One of the authors' networks, with the figures recorded from it."""

    name: str
    figures: dict[str, np.ndarray]

    @classmethod
    def read(cls, name: str) -> AuthorsNetwork:
        """Return the network that figures/NAME.npz was recorded from."""
        with np.load(FIGURES / f"{name}.npz") as arrays:
            return cls(name, dict(arrays))

    @property
    def is_cifar(self) -> bool:
        """Whether it is a CIFAR network: BatchNorm branches, classes from the most frequent."""
        return self.name.startswith("cifar")

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return int(self.figures["classes"])

    @property
    def branches_used(self) -> int:
        """Branches in the loss and the prediction; on iNaturalist one fewer than the network has."""
        return int(self.figures["branches_used"])

    @property
    def branches(self) -> int:
        """Branches that the network has."""
        return self.figures["train_logits"].shape[1]

    @property
    def tau(self) -> float | None:
        """Exponent of the classifier's row norms at evaluation; None: the classifier as trained."""
        return SETTINGS[self.name].get("tau")

    @property
    def images_per_class(self) -> np.ndarray:
        """(C,) training counts in the order of the labels."""
        counts = np.arange(1, self.num_classes + 1)
        return counts[::-1] if self.is_cifar else counts

    def images(self) -> torch.Tensor:
        """Return (N, 3, H, W) images."""
        return torch.from_numpy(generator("images").standard_normal(self.figures["images"]))

    def labels(self) -> torch.Tensor:
        """Return (N,) labels."""
        return torch.from_numpy(self.figures["labels"])

    def state(self) -> dict[str, torch.Tensor]:
        """Return the authors' state dict, made by the rule of README.md."""
        shapes = [tuple(map(int, filter(None, shape.split("x")))) for shape in self.figures["state_shapes"]]
        keys = self.figures["state_keys"].tolist()
        return {key: state_tensor(key, shape) for key, shape in zip(keys, shapes, strict=True)}

    def config(self, **changes) -> Config:
        """Return this suite's configuration of the network, with the branches that are used."""
        limits = self.figures["branch_sizes"].tolist()
        recorded = dict(
            alpha=float(self.figures["alpha"]),
            branches=self.branches_used,
            branch_sizes=tuple(self.num_classes - limit if self.is_cifar else limit for limit in limits),
        )
        return Config.of(**SETTINGS[self.name] | recorded | changes)

    def own_loss(self) -> nn.Module:
        """Return this suite's loss for the network."""
        return loss_of(self.config(), self.images_per_class)

    def own_network(self, **changes) -> nn.Module:
        """Return this suite's network with the authors' weights, in float64; `changes` apply to the configuration."""
        model = model_of(self.config(**changes), self.num_classes).double()
        state = self.state()
        if self.is_cifar:
            with torch.no_grad():
                for key, tensor in self.by_their_keys(model.state_dict()).items():
                    tensor.copy_(state[key])
        else:
            file, flags = FIGURES / f"{self.name}.npz", {"model": SETTINGS[self.name]["model"]}
            checkpoint = ReleasedCheckpoint(
                file, state, flags, np.arange(self.num_classes), None, Classes(self.num_classes)
            )
            checkpoint.load_evaluated(model)
        return model

    def by_their_keys(self, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors under this suite's names, or views of them, under the authors' keys."""
        theirs = {}
        for name, tensor in own.items():
            if not self.is_cifar:
                pattern, replacement = next(rule for rule in THEIR_NAMES if re.match(rule[0], name))
                theirs[re.sub(f"^{pattern}", replacement, name)] = tensor
            elif name.startswith("branches.bn."):  # the statistics that three BatchNorms of one map share
                theirs |= {name.replace("branches.bn", branch): tensor for branch in CIFAR_BRANCHES}
            elif name.startswith("branches."):
                rows = zip(CIFAR_BRANCHES, tensor, strict=True)
                theirs |= {name.replace("branches", branch): row for branch, row in rows}
            else:
                theirs[name.replace("backbone.fc.", "linear.").replace("backbone.", "model.")] = tensor
        return theirs


def generator(key: str) -> np.random.Generator:
    """Return the random generator of one tensor."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def state_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of the authors' state dict, by the rule of README.md."""
    draw = generator(re.sub(r"^BN[MT]\.running", "BNH.running", key))
    if key.endswith("num_batches_tracked"):
        values = np.zeros(shape, np.int64)
    elif key.endswith("running_mean"):
        values = 0.05 * draw.standard_normal(shape)
    elif key.endswith("running_var"):
        values = 1 + 0.2 * draw.random(shape)
    elif len(shape) == 1:
        values = key.endswith("weight") + 0.1 * draw.standard_normal(shape)
    else:
        values = draw.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return torch.from_numpy(values)

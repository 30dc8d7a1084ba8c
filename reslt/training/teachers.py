"""Teachers of a network in training: one per shot group, as in learning from multiple experts (LFME, Xiang et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from reslt.core.errors import UserError
from reslt.data.groups import SHOTS
from reslt.evaluation.evaluate import evaluate
from reslt.evaluation.metrics import fused_logits
from reslt.loading.batches import Loader

TEMPERATURE = 2.0
UNTAUGHT_BELOW = 0.3  # share of the teacher's accuracy up to which it teaches with full weight
PACED_EPOCHS = 0.5  # share of the epochs after which every image has the weight 1


class Teacher(nn.Module):
    """A trained network in evaluation mode as one whose predictions are evaluated: (N, 3, H, W) -> (1, N, C) logits."""

    logits_per_image = (1,)

    def __init__(self, network: nn.Module):
        """`network`: (N, 3, H, W) normalized images -> branch logits, or (N, C) logits of a folded one."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return (logits.float() if logits.ndim == 2 else fused_logits(logits))[None]


class Teachers(nn.Module):
    """The term that teachers add to a loss, and the weight that they give to an image in it.

    The term: sum over shot groups g of w_g KL(softmax(t_g / T) || softmax(z_g / T)), averaged over images, with t_g the
    logits of teacher g for the classes of its group, z_g those of the network that learns (fused, as it predicts), and
    T = 2; there is no factor T^2. The group's weight w_g follows accuracies on the validation list, A of the teacher and a
    of the network: 1 while a < 0.3 A, then falling linearly to 0 at a = A; 1 before the first evaluation.

    An image's weight: v = p + (1 - p) min(1, e / (E / 2)) in epoch e (from 0) of E, with p the probability that the
    teacher of its class' group gives to that class, among those of the group; of a mixed image, p is mixed as its labels.
    It multiplies the image's loss, as in the paper; in the released code, as far as we know, it multiplies the logits."""

    def __init__(self, networks: Sequence[nn.Module], groups: Mapping[str, np.ndarray]):
        """`networks`: of the many, the medium and the few classes, see `Teacher`; `groups`: {shot: (C,) bool}, each with a
        class."""
        super().__init__()
        self.teachers = nn.ModuleList([Teacher(network) for network in networks])
        order = np.concatenate([np.flatnonzero(groups[shot]) for shot in SHOTS])
        self.sizes = [int(groups[shot].sum()) for shot in SHOTS]
        # The classes, group by group, and the place of each class among them.
        self.register_buffer("by_group", torch.from_numpy(order), persistent=False)
        self.register_buffer("positions", torch.from_numpy(np.argsort(order)), persistent=False)
        # Changed in place from epoch to epoch: a step that is recorded as a CUDA graph reads their memory.
        self.register_buffer("group_weights", torch.ones(len(SHOTS)), persistent=False)
        self.register_buffer("pace", torch.zeros(()), persistent=False)
        self.accuracies: dict[str, float] = {}  # of each teacher, in percent: see `measure`

    def begin_epoch(self, epoch: int, epochs: int, accuracies: Mapping[str, float] | None) -> None:
        """Set the weights of an epoch (from 0). `epochs`: of the run; `accuracies`: {shot: accuracy} of the network that
        learns, in percent; None: it was not evaluated yet."""
        self.pace.fill_(min(1.0, epoch / max(PACED_EPOCHS * epochs, 1e-9)))
        for g, shot in enumerate(SHOTS):
            weight = 1.0 if accuracies is None else group_weight(accuracies[shot], self.accuracies[shot])
            self.group_weights[g].fill_(weight)

    def measure(self, loader: Loader, accelerator: Accelerator) -> None:
        """Find the accuracy of each teacher for its group's classes, in percent, on a validation list. Raises UserError for
        a group without an image there."""
        for teacher, shot, own in zip(self.teachers, SHOTS, self.by_group.split(self.sizes), strict=True):
            title = f"the teacher of the {shot} classes"
            found = evaluate(teacher, loader, accelerator, len(self.positions), title).per_class[0]
            of_group = found[own.cpu().numpy()]
            if np.isnan(of_group).all():
                raise UserError(
                    f"--teachers: {loader.images.file}: no validation image is of the {shot} classes, by whose accuracy their "
                    "teacher is weighted; add some, or give another --val-from-train"
                )
            self.accuracies[shot] = float(np.nanmean(of_group))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalized images -> (N, C) logits, the classes group by group, each group's of its teacher."""
        of_each = [teacher(images)[0] for teacher in self.teachers]
        classes = self.by_group.split(self.sizes)
        return torch.cat([logits[:, own] for logits, own in zip(of_each, classes, strict=True)], 1)

    def weighted(self, taught: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, C) of `forward`, targets (N,) or (N, C) -> (N, C) targets, each image's times its weight."""
        within = torch.cat([logits.softmax(1) for logits in taught.split(self.sizes, 1)], 1)[:, self.positions]
        if not targets.is_floating_point():
            targets = torch.zeros_like(within).scatter_(1, targets[:, None], 1.0)
        known = (within * targets).sum(1, keepdim=True)
        return targets * (known + (1 - known) * self.pace)

    def divergence(self, taught: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(N, C) of `forward`, (N, C) float32 fused logits of the network that learns -> scalar, the sum over images of the
        weighted terms of all groups."""
        total, learned = 0.0, logits[:, self.by_group]
        for weight, own, of_teacher in zip(
            self.group_weights, learned.split(self.sizes, 1), taught.split(self.sizes, 1), strict=True
        ):
            log_q, log_p = (own / TEMPERATURE).log_softmax(1), (of_teacher / TEMPERATURE).log_softmax(1)
            total = total + weight * (log_p.exp() * (log_p - log_q)).sum()
        return total


def group_weight(accuracy: float, of_teacher: float) -> float:
    """Return w_g of `Teachers` from the accuracies of the network that learns and of the teacher, in the same unit."""
    if not accuracy < of_teacher:
        return 0.0
    return min(1.0, (of_teacher - accuracy) / of_teacher / (1 - UNTAUGHT_BELOW))

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
from reslt.loading.batches import Loader
from reslt.models.fusion import fused_logits

TEMPERATURE = 2.0
UNTAUGHT_BELOW = 0.3  # share of the teacher's accuracy up to which it teaches with full weight
PACED_EPOCHS = 0.5  # share of the epochs after which every image has the weight 1


class Teacher(nn.Module):
    """A trained network in evaluation mode, with the output that `evaluate` expects: (N, 3, H, W) -> (1, N, C) logits."""

    logits_per_image = (1,)

    def __init__(self, network: nn.Module):
        """`network`: (N, 3, H, W) normalized images -> branch logits, or, if it is folded, (N, C) logits."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return (logits.float() if logits.ndim == 2 else fused_logits(logits))[None]


class Teachers(nn.Module):
    """The term that teachers add to a loss, and the weight that they give to an image in it.

    The term: sum over shot groups g of w_g KL(softmax(t_g / T) || softmax(z_g / T)), averaged over images. t_g are the
    logits of teacher g for the classes of its group, z_g those of the student (fused, as it predicts), and T = 2; there is
    no factor T^2. The group's weight w_g depends on the accuracies on the validation list, A of the teacher and a of the
    student: 1 while a < 0.3 A, then falling linearly to 0 at a = A; 1 before the first evaluation.

    The weight of an image: v = p + (1 - p) min(1, e / (E / 2)) in epoch e (from 0) of E. p is the probability of its class
    among the classes of the group, by the group's teacher; for a mixed image, p is mixed like its labels. The weight
    multiplies the image's loss, as in the paper; in the released code, to our knowledge, it multiplies the logits."""

    def __init__(self, networks: Sequence[nn.Module], groups: Mapping[str, np.ndarray]):
        """`networks`: those of the many, medium and few classes, as for `Teacher`; `groups`: {shot: (C,) bool}, none
        empty."""
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
        """Set the weights of an epoch (from 0). `epochs`: those of the run; `accuracies`: {shot: accuracy} of the student, in
        percent; None: it was not evaluated yet."""
        self.pace.fill_(min(1.0, epoch / max(PACED_EPOCHS * epochs, 1e-9)))
        for g, shot in enumerate(SHOTS):
            weight = 1.0 if accuracies is None else group_weight(accuracies[shot], self.accuracies[shot])
            self.group_weights[g].fill_(weight)

    def measure(self, loader: Loader, accelerator: Accelerator) -> None:
        """Measure the accuracy of each teacher on its group's classes, in percent, on a validation list. Raises UserError if
        a group has no image in the list."""
        for teacher, shot, own in zip(self.teachers, SHOTS, self.by_group.split(self.sizes), strict=True):
            title = f"the teacher of the {shot} classes"
            found = evaluate(teacher, loader, accelerator, len(self.positions), title).per_class[0]
            of_group = found[own.cpu().numpy()]
            if np.isnan(of_group).all():
                raise UserError(
                    f"--teachers: {loader.images.file}: no validation image belongs to the {shot} classes, and their "
                    "teacher is weighted by its accuracy on such images; add some, or give another --val-from-train"
                )
            self.accuracies[shot] = float(np.nanmean(of_group))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalized images -> (N, C) logits, with classes in order of groups; each group's are its teacher's."""
        of_each = [teacher(images)[0] for teacher in self.teachers]
        classes = self.by_group.split(self.sizes)
        return torch.cat([logits[:, own] for logits, own in zip(of_each, classes, strict=True)], 1)

    def weighted(self, taught: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, C) output of `forward`, (N,) or (N, C) targets -> (N, C) targets, multiplied by the images' weights."""
        within = torch.cat([logits.softmax(1) for logits in taught.split(self.sizes, 1)], 1)[:, self.positions]
        if not targets.is_floating_point():
            targets = torch.zeros_like(within).scatter_(1, targets[:, None], 1.0)
        known = (within * targets).sum(1, keepdim=True)
        return targets * (known + (1 - known) * self.pace)

    def divergence(self, taught: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(N, C) output of `forward`, (N, C) float32 fused logits of the student -> scalar, the weighted terms of all groups,
        summed over images."""
        total, learned = 0.0, logits[:, self.by_group]
        for weight, own, of_teacher in zip(
            self.group_weights, learned.split(self.sizes, 1), taught.split(self.sizes, 1), strict=True
        ):
            log_q, log_p = (own / TEMPERATURE).log_softmax(1), (of_teacher / TEMPERATURE).log_softmax(1)
            total = total + weight * (log_p.exp() * (log_p - log_q)).sum()
        return total


def group_weight(accuracy: float, of_teacher: float) -> float:
    """Return w_g of `Teachers` from the accuracies of the student and of the teacher, in the same unit."""
    if not accuracy < of_teacher:
        return 0.0
    return min(1.0, (of_teacher - accuracy) / of_teacher / (1 - UNTAUGHT_BELOW))

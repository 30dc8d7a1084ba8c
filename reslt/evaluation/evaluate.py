"""One pass over a list: every image once, hits per class, branch and expert."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from reslt.core.errors import Stopped, UserError
from reslt.core.log import progress_bar
from reslt.core.signals import StopRequests, signal_name
from reslt.core.waiting import Wait
from reslt.evaluation.metrics import ClassAccuracies, ClassHits
from reslt.loading.batches import Loader


class NotFiniteError(UserError):
    """An evaluation whose logits are not finite: it has no accuracies."""


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    num_classes: int,
    title: str = "",
    requests: StopRequests | None = None,
) -> ClassAccuracies:
    """Evaluate every image once, each process its part of the list -> accuracies per class, fused, branch and expert.

    `model` is a ResLT or Experts: it returns branch logits, and has `logits_per_image`.

    Raises Stopped, on all processes, if one of them received a signal, and NotFiniteError if a logit is not finite."""
    model.eval()
    hits = ClassHits(model.logits_per_image, num_classes, accelerator.device)
    with progress_bar(accelerator.is_main_process, title, len(loader)) as bar:
        for images, labels in loader.epoch(0):
            if requests and requests.number:
                break
            with accelerator.autocast():
                branch_logits = model(images)
            hits.update(branch_logits, labels)
            bar.update()
    came = torch.tensor([requests.number if requests else 0], device=accelerator.device)
    with Wait("the other processes to evaluate their part of the list"):
        number = int(accelerator.gather(came).max())
    if number:
        raise Stopped(number, f"stopped by {signal_name(number)} while evaluating")
    counts = (hits.hits, hits.images, hits.not_finite)
    with Wait("the other processes to add up their hits"):
        hits.hits, hits.images, hits.not_finite = (accelerator.reduce(of_process, "sum") for of_process in counts)
    if bad := int(hits.not_finite):
        raise NotFiniteError(
            f"{title + ': ' if title else ''}{loader.images.file}: the model's logits are not finite for {bad:,} of "
            f"{int(hits.images.sum()):,} images, so there are no accuracies; the weights have diverged (lower --lr), "
            "BatchNorm's statistics are of too few steps, or half precision overflows (--mixed-precision no)"
        )
    return hits.accuracies()

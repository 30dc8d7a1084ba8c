"""Train one epoch, evaluate one list. Everything needed is passed in."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from tqdm import tqdm

from reslt.errors import UserError
from reslt.images import mix
from reslt.loader import Loader
from reslt.metrics import ClassAccuracies, ClassHits, EpochStats, fused_logits
from reslt.mixing import Mixing
from reslt.models.experts import Experts
from reslt.models.reslt import ResLT

REFRESH_SECONDS = 1.0


def train_epoch(
    model: torch.nn.Module,
    loader: Loader,
    loss_fn: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    epoch: int,
    seed: int,
    mixing: Mixing | None = None,
    clip_grad: float | None = None,
    ema=None,
    title: str = "",
) -> EpochStats:
    """One pass over the training list. Mixing and dropout are drawn from (seed, step), so a resumed run draws the same.

    The loss is read back once a second, for the bar, and at the end; no step waits for the device. Raises UserError
    where the mean loss is not finite, before anything is saved."""
    model.train()
    raw_model = accelerator.unwrap_model(model)
    loss_sum, hits = torch.zeros(2, device=accelerator.device)
    images_seen, waited, start = 0, 0.0, time.perf_counter()
    shown = asked = start
    with tqdm(total=len(loader), desc=title, unit="batch", leave=False, disable=None, dynamic_ncols=True) as bar:
        for step, (images, labels) in enumerate(loader.epoch(epoch), start=epoch * len(loader)):
            waited += time.perf_counter() - asked
            targets = labels
            if mixing is not None:
                images, targets = mixing(images, labels, step)
            seed_dropout(mix(seed, step), accelerator.device)
            branch_logits = model(images)
            loss = loss_fn(branch_logits, targets)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            if clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            if ema is not None:
                ema.update(raw_model, step=step)
            loss_sum += loss.detach()
            if mixing is None:
                hits += (fused_logits(branch_logits.detach()).argmax(-1) == labels).sum()
            images_seen += len(labels)
            asked = time.perf_counter()
            bar.update()
            if not bar.disable and asked - shown > REFRESH_SECONDS:
                shown = asked
                bar.set_postfix_str(
                    f"loss {loss.item():.3f}, lr {optimizer.param_groups[0]['lr']:.3g}, "
                    f"{images_seen / (asked - start):.0f} img/s, waiting {waited / (asked - start):.0%}"
                )
    mean_loss = loss_sum.item() / len(loader)
    seconds = time.perf_counter() - start
    if mean_loss != mean_loss or mean_loss in (float("inf"), float("-inf")):
        raise UserError(
            f"epoch {epoch + 1}: the mean training loss is {mean_loss}; nothing of this epoch is kept. Lower --lr, give "
            "--clip-grad, or use --mixed-precision bf16 or no"
        )
    accuracy = 100 * hits.item() / images_seen if mixing is None else float("nan")
    return EpochStats(mean_loss, accuracy, images_seen / seconds, waited / seconds)


@torch.inference_mode()
def evaluate(
    model: ResLT | Experts, loader: Loader, accelerator: Accelerator, num_classes: int, title: str = ""
) -> ClassAccuracies:
    """Every image of the loader's list once -> accuracies per class, fused, per branch and per expert."""
    model.eval()
    hits = ClassHits(model.logits_per_image, num_classes, accelerator.device)
    batches = tqdm(loader.epoch(0), total=len(loader), desc=title, unit="batch", leave=False, disable=None)
    for images, labels in batches:
        with accelerator.autocast():
            branch_logits = model(images)
        hits.update(branch_logits, labels)
    return hits.accuracies()


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that the device's dropout and stochastic depth draw from; costs about a microsecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)

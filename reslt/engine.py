"""Train one epoch, evaluate one list. Everything needed is passed in."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from tqdm import tqdm

from reslt.errors import UserError
from reslt.images import mix
from reslt.loader import Loader
from reslt.metrics import ClassAccuracies, ClassHits, EpochStats

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
    clip_grad: float | None = None,
    ema=None,
    title: str = "",
) -> EpochStats:
    """One pass over the training list. Dropout is drawn from (seed, step), so a resumed run draws the same.

    The loss is read back once a second, for the bar, and at the end; no step waits for the device. Raises UserError
    where the mean loss is not finite, before anything is saved."""
    model.train()
    raw_model = accelerator.unwrap_model(model)
    loss_sum = torch.zeros((), device=accelerator.device)
    images_seen, waited, start = 0, 0.0, time.perf_counter()
    shown = asked = start
    with tqdm(total=len(loader), desc=title, unit="batch", leave=False, disable=None, dynamic_ncols=True) as bar:
        for step, (images, labels) in enumerate(loader.epoch(epoch), start=epoch * len(loader)):
            waited += time.perf_counter() - asked
            seed_dropout(mix(seed, step), accelerator.device)
            loss = loss_fn(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            if clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            if ema is not None:
                ema.update(raw_model, step=step)
            loss_sum += loss.detach()
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
    return EpochStats(mean_loss, images_seen / seconds, waited / seconds)


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, loader: Loader, accelerator: Accelerator, num_classes: int, title: str = ""
) -> ClassAccuracies:
    """Every image of the loader's list once -> accuracies per class, fused and per branch."""
    model.eval()
    hits = None
    batches = tqdm(loader.epoch(0), total=len(loader), desc=title, unit="batch", leave=False, disable=None)
    for images, labels in batches:
        with accelerator.autocast():
            branch_logits = model(images)
        if branch_logits.ndim == 4:  # (E, K, N, C): the prediction averages over experts
            branch_logits = branch_logits.mean(0)
        if hits is None:
            hits = ClassHits(len(branch_logits), num_classes, accelerator.device)
        hits.update(branch_logits, labels)
    return hits.accuracies()


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that the device's dropout and stochastic depth draw from; costs about a microsecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)

"""The opening lines and the final tables that a run prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from reslt.config.schema import AugmentSettings, MethodSettings, ModelSettings
from reslt.config.stages import OF_IMAGES, OF_LEARNING, OF_STEPS, Stage
from reslt.core.batch_shard import BatchShard
from reslt.core.log import logger
from reslt.core.text import counted
from reslt.data.datasets import Dataset
from reslt.data.groups import SHOTS, branch_sets
from reslt.evaluation.tables import COLUMNS, Evaluation, in_one_line, write_results
from reslt.models.complexity import Complexity
from reslt.runs.summary import Summary, best_on_test
from reslt.training.state import Progress


def opening(**texts: str) -> str:
    """{'data': text, ...} -> a line for each, with the names in a column."""
    return "\n".join(f"{name:<7} {text}" for name, text in texts.items())


def describe_data(dataset: Dataset, limit: int | None) -> str:
    """Return the images, classes, imbalance and shot groups of the training list in words. `limit`: --limit-train."""
    counts, groups = dataset.images_per_class, dataset.shot_groups["standard"]
    used = len(dataset.lists["train"])  # with --only-shots, those of its classes
    used = min(used, limit or used)
    limited = f" ({used:,} of them used)" if used < counts.sum() or limit else ""
    shots = " / ".join(str(int(groups[shot].sum())) for shot in SHOTS)
    return (
        f"{dataset.name}: {counts.sum():,} training images{limited}, {dataset.num_classes} classes with "
        f"{counts.max():,}..{counts.min():,} each (imbalance factor {counts.min() / counts.max():.3g}); "
        f"many / medium / few: {shots} classes; {_set_aside(dataset)}images in {dataset.image_root.folder}"
    )


def _set_aside(dataset: Dataset) -> str:
    """Return the number of images that --val-from-train has set aside, and of their classes, in words; '' if none."""
    if not dataset.val_is_set_aside:
        return ""
    labels = dataset.lists["val"].labels
    classes = len(np.unique(labels))
    return f"{counted(len(labels), 'image')} of {classes:,} class{'es' * (classes != 1)} set aside for validation; "


def describe_augmentation(augment: AugmentSettings) -> str:
    """Return the augmentation of training images in words."""
    crops = {
        "rrc": "random resized crop",
        "pad": f"{augment.crop_padding} px padding and crop",
        "center": "center crop",
    }
    parts = [crops[augment.crop]]
    parts += [f"flip {augment.hflip:g}"] * (augment.hflip > 0)
    if augment.aa:
        parts.append(f"AutoAugment {augment.aa}" + (f" on {augment.aa_fill}" if augment.aa_fill else ""))
    elif any(augment.color_jitter):
        parts.append("color jitter " + " ".join(f"{v:g}" for v in augment.color_jitter))
    parts += [f"rotation by up to {augment.rotate:g} degrees"] * bool(augment.rotate)
    parts += [f"erasing {augment.reprob:g} ({augment.remode})"] * (augment.reprob > 0)
    parts += [f"Cutout {augment.cutout} ({augment.cutout_fill})"] * (augment.cutout > 0)
    parts += [f"{name} {value:g}" for name, value in (("mixup", augment.mixup), ("CutMix", augment.cutmix)) if value]
    if (augment.mixup or augment.cutmix) and (augment.mixup_prob < 1 or augment.mixup_mode != "batch"):
        parts.append(f"mixed with probability {augment.mixup_prob:g} per {augment.mixup_mode}")
    return ", ".join(parts)


def describe_model(
    model: ModelSettings,
    img_size: int,
    complexities: tuple[Complexity, Complexity],
    accelerator: Accelerator,
    shard: BatchShard,
    trained: int,
) -> str:
    """Return model, input, device and precision in words, and, in a second line, the cost per image, with and without
    branches. `trained`: the number of parameters that train."""
    device, processes = accelerator.device.type, accelerator.num_processes
    where = f"{processes} processes on {device}" if processes > 1 else f"on {device}"
    if shard.micro_batches > 1:
        where += f", {shard.micro_batches} micro-batches per step"
    experts = f", {model.experts} experts" if model.experts > 1 else ""
    frozen = f", frozen: {' '.join(model.freeze)}" if model.freeze else ""
    if model.tune != "full":
        frozen = f", tune {model.tune}: {trained:,} of {complexities[0].parameters:,} parameters train{frozen}"
    whole, without_branches = map(str, complexities)
    plain = f" (without branches {without_branches})" if whole != without_branches else ""
    return (
        f"{model.model}{experts}, {img_size} x {img_size} px, {where}, precision {accelerator.mixed_precision}{frozen}\n"
        f"{'':8}{whole} per image{plain}"
    )


def describe_method(method: MethodSettings, images_per_class: np.ndarray, sam: float = 0.0) -> str:
    """Return the method in words: its parts, its branches with the sizes of their class sets, its convolutions, logit
    adjustment, and `sam`, the rho of sharpness-aware minimization."""
    text = method.method
    ordinary = {"cost": "ce", "class_weights": "uniform", "sampler": "instance", "head": "linear", "mutual": "off"}
    ordinary |= {"feature_loss": "off"}
    own = {name: getattr(method, name) for name in ordinary}
    text += "".join(f", {name.replace('_', ' ')} {own[name]}" for name in ordinary if own[name] != ordinary[name])
    if method.mutual != "off":
        hard = f", also on the {method.mutual_hard_classes} hardest classes" * bool(method.mutual_hard_classes)
        text += f" (weight {method.mutual_weight:g}{hard})"
    if method.feature_loss != "off":
        text += f" (weight {method.feature_loss_weight:g})"
    if method.head_init != "random":
        text += ", classifier starting at class means"
    if method.router_topk is not None:
        text += f", a router on the {min(method.router_topk, len(images_per_class))} largest logits"
    if method.network not in (method.described.network, "conv_stack"):
        text += f", network {method.network}"
    if method.network == "exits":
        text += f", images leave at a confidence above {method.exit_confidence:g}"
    if method.trains_on_pairs:
        until = f" of {method.cumulative_epochs} epochs" if method.cumulative_epochs else ""
        text += f", pairs with images of the {method.second_sampler} sampler, their weight growing to 1{until}"
    if method.views_in_training > 1:
        text += f", contrast of {counted(method.views - 1, 'further view')} of each image"
    if method.has_branches:
        sets = branch_sets(images_per_class, method.branches, method.branch_sizes, method.branch_sets).sum(1).tolist()
        kind = f"{'tied ' * method.tied_branches}{method.branch}"
        text += f", alpha {method.alpha:g}, {kind} branches on the {method.branch_at} over {sets} classes"
    if method.network == "conv_stack":
        text += f", {counted(method.branches, '1x1 convolution')} before the classifier"
    terms = (method.logit_adjust, "log(frequency)"), (method.logit_adjust_reversed, "-log(reversed frequency)")
    if stated := " and ".join(f"{_as_text(taus)} {term}" for taus, term in terms if taus):
        text += f", logits adjusted by {stated}" + " in the fusion loss only" * (method.logit_adjust_on == "fusion")
    text += f", sharpness-aware with rho {sam:g}" if sam else ""
    if method.prediction:
        text += f"; evaluated with {', '.join(f'{name} {value}' for name, value in method.prediction.items())}"
    return text


def describe_teachers(model: ModelSettings, accuracies: Mapping[str, float]) -> str:
    """Return the teachers of each shot group, with their accuracies on the validation list, in percent."""
    named = zip(model.teachers, accuracies.items(), strict=True)
    return "; ".join(f"{shot}: {place} ({accuracy:.1f} % of them right)" for place, (shot, accuracy) in named)


def _as_text(value: object) -> str:
    """(0.0, 1.0, 2.0) -> '0 1 2'"""
    if isinstance(value, tuple):
        return " ".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_stages(stages: tuple[Stage, ...]) -> dict[str, str]:
    """Return {'stage 2': its epochs and changed settings, ...} for each stage after the first, as lines of `opening`."""
    texts = {}
    for before, stage in itertools.pairwise(stages):
        first, last = stage.begin + 1, stage.end
        parts = [f"epochs {first} to {last}" if last > first else f"epoch {last}"]
        if stage.train != before.train:
            parts.append(
                "trains " + ", ".join(f"{part} (lr x {f:g})" * (f != 1) or part for part, f in stage.train.items())
            )
        parts += [f"new {', '.join(stage.reinit)}"] * bool(stage.reinit)
        now, then = stage.config.flat(), before.config.flat()
        exchanged = OF_IMAGES if stage.trains_router else OF_LEARNING
        parts += [f"{name} {_as_text(now[name])}" for name in (*exchanged, *OF_STEPS) if now[name] != then[name]]
        if stage.is_fresh:
            parts.append(f"lr {stage.config.optim.lr:g}, {stage.config.optim.sched}")
        parts += [f"BatchNorm {stage.bn}"] * (stage.bn != "train")
        if stage.config.optim.model_ema and (stage.ema == "restart") != stage.is_fresh:
            parts.append(f"moving average: {stage.ema}")
        texts[f"stage {stage.number}"] = "; ".join(parts)
    return texts


def describe_run(run: Path, progress: Progress, epochs: int) -> str:
    """Return the run's folder, and whether it resumes, and from which step, or trains nothing."""
    if epochs == 0:
        return f"{run}, without any epoch: the weights are only evaluated"
    if progress.epoch >= epochs:
        return f"{run}, all of its epochs are trained"
    if progress.epoch or progress.steps:
        return f"{run}, resuming in epoch {progress.epoch + 1}, after {progress.steps} of its steps"
    return str(run)


def conclude(run: Path, outcomes: list[Evaluation], summary: Summary, paper: list[dict]) -> str:
    """Print all tables, and write the last outcome (the best on validation if there is one) as the run's result. Return a
    line that names the files. The tables are printed even if the result cannot be written.

    If only a test list exists, the result by the paper's protocol, which selects the epoch on that list, is reported in
    addition to the last epoch."""
    names = ["the last epoch", "the best epoch on the validation list"]
    text = [f"{name}: {outcome.text()}" for name, outcome in zip(names, outcomes, strict=False)]
    row = best_on_test(summary) if "val" not in outcomes[0].dataset.lists else None
    if row:
        text.append(f"the paper's protocol, best epoch on test (epoch {row['epoch']}):  {in_one_line(row)}")
        if "paper_all" in row:
            text[-1] += f"\nin the shot split of the paper:  {in_one_line(row, 'paper_')}"
    text.append(outcomes[-1].classes_text())
    for stated in paper:
        if cells := "  ".join(f"{c} {stated[c]}" for c in COLUMNS if c in stated):
            place = f"table {stated['table']}" if "table" in stated else f"figure {stated['figure']}"
            note = f"  ({stated['split']} split)" if "split" in stated else ""
            text.append(f"the paper, {place}:  {cells}{note}")
    logger.info("\n\n".join(text))
    written = write_results(run, outcomes[-1], {"last": outcomes[0].fused(), "best_on_test": row, "paper": paper})
    return f"\n{written}"

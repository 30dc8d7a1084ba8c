"""What a run prints: its opening lines and its final tables."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from reslt.config.schema import Config
from reslt.data.datasets import Dataset
from reslt.data.groups import SHOTS, branch_sets
from reslt.evaluation.tables import COLUMNS, Evaluation, percent, write_results
from reslt.models.complexity import Cost
from reslt.runs.summary import Summary, best_on_test
from reslt.training.state import Progress


def opening(
    run: Path,
    dataset: Dataset,
    config: Config,
    costs: tuple[Cost, Cost],
    img_size: int,
    images_are: str,
    accelerator: Accelerator,
    progress: Progress,
) -> str:
    """What is about to be trained, for the console. `costs`: of the model, and of the plain one without branches;
    `images_are`: where the loader has them."""
    counts, groups = dataset.images_per_class, dataset.shot_groups["standard"]
    limited = f" ({min(config.limit_train, counts.sum()):,} of them used)" if config.limit_train else ""
    device, processes = accelerator.device.type, accelerator.num_processes
    where = f"{processes} processes on {device}" if processes > 1 else f"on {device}"
    if config.grad_accum_steps > 1:
        where += f", a batch in {config.grad_accum_steps} passes"
    experts = f", {config.experts} experts" if config.experts > 1 else ""
    shots = " / ".join(str(int(groups[shot].sum())) for shot in SHOTS)
    lines = [
        f"data    {dataset.name}: {counts.sum():,} training images{limited}, {dataset.num_classes} classes with "
        f"{counts.max():,}..{counts.min():,} each (imbalance factor {counts.min() / counts.max():.3g}); "
        f"many / medium / few: {shots} classes; images in {dataset.image_root.folder}",
        f"augment {augmentation(config)}; images are {images_are}",
        f"model   {config.model}{experts}, {img_size} x {img_size} px, {where}, precision {config.mixed_precision}",
        f"        {costs[0]} an image" + (f" (without branches {costs[1]})" if str(costs[0]) != str(costs[1]) else ""),
        f"method  {config.method}",
    ]
    if config.has_branches:
        sets = branch_sets(counts, config.branches, config.branch_sizes).sum(1).tolist()
        lines[-1] += f", alpha {config.alpha:g}, {config.branch} branches on the {config.branch_at} over {sets} classes"
    if config.logit_adjust:
        lines[-1] += f", logits adjusted by {config.logit_adjust:g} log(frequency)"
    going_on = ""
    if progress.epoch >= config.epochs:
        going_on = ", all of its epochs are trained"
    elif progress.epoch or progress.steps:
        going_on = f", going on in epoch {progress.epoch + 1}, behind {progress.steps} of its steps"
    lines.append(f"run     {run}{going_on}")
    return "\n".join(lines)


def augmentation(c: Config) -> str:
    """What training does to its images, in words."""
    said = ["random resized crop" if c.crop == "rrc" else f"{c.crop_padding} px padding and crop"]
    said += [f"flip {c.hflip:g}"] * (c.hflip > 0)
    if c.aa:
        said.append(f"AutoAugment {c.aa}")
    elif any(c.color_jitter):
        said.append("color jitter " + " ".join(f"{v:g}" for v in c.color_jitter))
    said += [f"erasing {c.reprob:g} ({c.remode})"] * (c.reprob > 0)
    said += [f"{name} {value:g}" for name, value in (("mixup", c.mixup), ("CutMix", c.cutmix)) if value]
    if (c.mixup or c.cutmix) and (c.mixup_prob < 1 or c.mixup_mode != "batch"):
        said.append(f"mixed with probability {c.mixup_prob:g} per {c.mixup_mode}")
    return ", ".join(said)


def conclude(run: Path, outcomes: list[Evaluation], summary: Summary, paper: list[dict]) -> str:
    """Write the last outcome (the best on validation where there is one) as the run's result, and return all tables.

    Where only a test list exists, the paper's protocol, which selects on it, is told beside the last epoch."""
    names = ["the last epoch", "the best epoch on the validation list"]
    text = [f"{name}: {outcome.text()}" for name, outcome in zip(names, outcomes, strict=False)]
    row = best_on_test(summary) if "val" not in outcomes[0].dataset.lists else None
    if row:
        cells = "  ".join(f"{c} {percent(row[c])}" for c in COLUMNS)
        text.append(f"the paper's protocol, best epoch on test (epoch {row['epoch']}):  {cells}")
    text.append(outcomes[-1].classes_text())
    for stated in paper:
        if cells := "  ".join(f"{c} {stated[c]}" for c in COLUMNS if c in stated):
            place = f"table {stated['table']}" if "table" in stated else f"figure {stated['figure']}"
            text.append(f"the paper, {place}:  {cells}")
    write_results(run, outcomes[-1], {"last": outcomes[0].fused(), "best_on_test": row, "paper": paper})
    return "\n\n".join(text) + f"\n\nresult.json and per_class.csv are in {run}"

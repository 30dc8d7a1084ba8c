"""The checkpoint from which a run resumes, and the settings that may change when it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.config.schema import DEFAULTS, Config
from reslt.config.stages import Stage, stage_at
from reslt.core.errors import UserError
from reslt.core.files import write_atomically
from reslt.data.classes import Classes

if TYPE_CHECKING:  # reports, which compare settings, import no torch
    from reslt.runs.checkpoint import Checkpoint

# Settings that change nothing, or no more than rounding. (With another number of micro-batches, as of processes, BatchNorm
# and dropout see other parts of a batch.)
RESUMABLE_CHANGES = {
    "bad_images",  # if other images are left out, the digests of the lists change
    "channels_last",
    "checkpoint_hist",
    "checkpoint_minutes",
    "checkpoint_seconds",
    "cuda_graph",
    "data_dir",
    "ddp_timeout",
    "experiment",
    "grad_accum_steps",
    "imports",
    "log_with",
    "output",
    "teachers",  # their digests must not change
    "torchcompile",
    "workers",
}
NOT_COMPARED = {"resume", "force_resume", "overwrite", "profile", "profile_trace"}
# Settings in RESUMABLE_CHANGES that all processes of a run must share, since they exchange gradients
SHARED = {"channels_last", "cuda_graph", "grad_accum_steps", "torchcompile"}


def to_resume(
    run: Path,
    settings: dict,
    classes: Classes,
    steps_per_epoch: int,
    stages: tuple[Stage, ...],
    force: bool = False,
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint (None if there is no checkpoint), and messages for the user: which checkpoints were
    skipped and why, and which settings have changed.

    `settings`: the current flat configuration; `classes`: those of the dataset; `stages`: those of the current
    configuration. If the number of steps per epoch has changed, which requires `force`, the newest checkpoint that ends an
    epoch is returned. Nothing is written: see `adopt`.

    Raises UserError if settings, classes or lists have changed in harmful ways without `force`, and if there are
    checkpoints, but none is valid."""
    skipped = []
    newest = _first_valid(run, skipped)
    if newest is None:
        if skipped:
            reasons = "; ".join(skipped)
            raise UserError(f"--resume: no checkpoint of {run} is valid ({reasons}); start again with --overwrite")
        return None, []
    messages = [f"skipped: {reason}" for reason in skipped]
    of_run = newest.state["config"]
    harmless = changed_settings(of_run, settings, harmless=True)
    if harmless:
        messages.append(f"resuming with changed settings: {'; '.join(harmless)}")
    if any(change.startswith("grad_accum_steps: ") for change in harmless):
        messages.append("BatchNorm and dropout see other parts of a batch than before")
    epochs = stages[-1].end
    if newest.epochs_done > epochs:
        more = settings["epochs"] + newest.epochs_done - epochs
        raise UserError(f"--resume: {run} has trained {newest.epochs_done} epochs; give --epochs {more} or more")
    changed = changed_settings(of_run | {"data_on_device": recorded_data_on_device(newest)}, settings)
    if settings["data_on_device"] == "auto":  # the recorded choice is kept
        changed = [change for change in changed if not change.startswith("data_on_device: ")]
    trained_on = newest.classes
    before, lists = trained_on.lists, classes.lists
    if before == lists:  # the same images by another name, or path
        changed = [change for change in changed if not change.startswith("data: ")]
    if trained_on.number != classes.number:
        changed.append(f"classes: {trained_on.number} -> {classes.number}")
    elif trained_on.names is not None and trained_on.names != classes.names:  # None: of an earlier version
        changed.append(_renamed(trained_on.names, classes.names))
    changed += [
        f"{split}.txt contains other images" for split in lists if before.get(split, lists[split]) != lists[split]
    ]
    changed += [f"{split}.txt is missing now" for split in before if split not in lists]
    if changed and not force:
        also = f"; harmless: {'; '.join(harmless)}" if harmless else ""
        raise UserError(
            f"--resume: {run} was started with other settings ({'; '.join(changed)}{also}); give the old values, start "
            "another run with --experiment NAME, or resume anyway with --force-resume"
        )
    if changed:
        messages.append(f"--force-resume: resuming a run that was started with other settings: {'; '.join(changed)}")
    if newest.steps_per_epoch not in (None, steps_per_epoch) and not newest.ended_an_epoch:
        newest = _first_valid(run, [], ends_an_epoch=True)
        if newest is None:
            raise UserError(
                f"--force-resume: {run} has no checkpoint of a whole epoch to resume from with another number of steps per "
                "epoch; start again with --overwrite"
            )
        messages.append(
            f"an epoch now has {steps_per_epoch} steps: resuming from the end of epoch {newest.epochs_done}"
        )
    epoch = newest.progress_in(steps_per_epoch).epoch
    if epoch < epochs and (stage := stage_at(stages, epoch).number) != newest.stage:
        raise UserError(
            f"--resume: {newest.folder} was written in stage {newest.stage}, but with these settings epoch {epoch + 1} "
            f"belongs to stage {stage}; give the old --epochs and stages, or start another run with --experiment NAME"
        )
    return newest, messages


def shared_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that all processes of a run must share: those that must not change when it resumes, those of
    SHARED, and whether it resumes. `data` is left out, since datasets are compared by their lists."""
    own = (RESUMABLE_CHANGES - SHARED) | NOT_COMPARED | {"data"}
    return {name: value for name, value in settings.items() if name not in own} | {"resume": bool(settings["resume"])}


def adopt(found: Checkpoint, steps_per_epoch: int) -> Checkpoint:
    """Point `last` at the checkpoint from which a run has resumed, and return the checkpoint at its present place.

    If the number of steps per epoch has changed, newer checkpoints are removed, and this one is renamed for the new number,
    so that the names of later checkpoints follow it."""
    from reslt.runs.folder import newest_first

    folder = found.folder
    if found.steps_per_epoch not in (None, steps_per_epoch):
        folders = newest_first(folder.parents[1])
        for newer in folders[: folders.index(folder)]:
            shutil.rmtree(newer)
        renamed = folder.with_name(f"{found.epochs_done}-{found.epochs_done * steps_per_epoch}")
        if renamed != folder:
            shutil.rmtree(renamed, ignore_errors=True)
            folder = folder.rename(renamed)
    write_atomically(folder.with_name("last"), folder.name + "\n")  # the run may have been killed before it did so
    return replace(found, folder=folder)


def _renamed(before: tuple[str, ...], now: tuple[str, ...] | None) -> str:
    """Return "class names: 0 'cat' -> 'dog' (and 2 more)", the first of the names that have changed, and their number."""
    if now is None:
        return "class names: the dataset no longer states them"
    different = [k for k, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    first, more = different[0], len(different) - 1
    return f"class names: {first} {before[first][:40]!r} -> {now[first][:40]!r}" + f" (and {more:,} more)" * (more > 0)


def recorded_data_on_device(found: Checkpoint) -> str:
    """Return "on" if the run of a checkpoint trains on resident images, else "off". (The first version did not record it, and
    augmented on the host.)"""
    return "on" if found.state["config"].get("data_on_device") == "on" else "off"


def recorded_pipeline(found: Checkpoint) -> str:
    """Return "features" if the run of a checkpoint trains on features instead of images, else the result of
    `recorded_data_on_device`."""
    return "features" if found.state["config"].get("on_features") is True else recorded_data_on_device(found)


def _first_valid(run: Path, skipped: list[str], ends_an_epoch: bool = False) -> Checkpoint | None:
    """Return a run's newest valid checkpoint, or, if `ends_an_epoch`, the newest valid one that ends an epoch. Appends the
    reason for each invalid checkpoint to `skipped`."""
    from reslt.runs import checkpoint
    from reslt.runs.folder import newest_first

    for folder in newest_first(run):
        try:
            found = checkpoint.load(folder)
        except UserError as fault:
            skipped.append(str(fault))
            continue
        if found.ended_an_epoch or not ends_an_epoch:
            return found
    return None


def changed_settings(before: dict, settings: dict, harmless: bool = False) -> list[str]:
    """Return ['lr: 0.1 -> 0.2', ...]: the differences between a run's stored settings, `before`, and the current ones, among
    the harmful or the harmless settings. Settings that the current method does not use are not compared."""
    defaults = Config.of(method=before.get("method", DEFAULTS["method"])).flat()
    before = json.loads(json.dumps(defaults)) | before  # an older run lacks settings that were added later
    now = json.loads(json.dumps(settings))
    compared = [k for k in now if k not in NOT_COMPARED and (k in RESUMABLE_CHANGES) == harmless]
    return [f"{k}: {before[k]!r} -> {now[k]!r}" for k in compared if before[k] != now[k]]

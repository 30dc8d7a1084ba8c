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

# Settings that change nothing, or no more than rounding. (Other micro-batches, like other processes, give BatchNorm and
# dropout other parts of a batch.)
RESUMABLE_CHANGES = {
    "bad_images",  # if it leaves out images, the lists' digests change
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
    "teachers",  # their digests may not change
    "torchcompile",
    "workers",
}
NOT_COMPARED = {"resume", "force_resume", "overwrite", "profile", "profile_trace"}
# Of these, the settings that processes must share, since they exchange gradients.
SHARED = {"channels_last", "cuda_graph", "grad_accum_steps", "torchcompile"}


def to_resume(
    run: Path,
    settings: dict,
    classes: Classes,
    steps_per_epoch: int,
    stages: tuple[Stage, ...],
    force: bool = False,
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint (None if there is none), and messages for the user: which checkpoints were
    skipped and why, and which settings have changed.

    `settings`: the current flat configuration; `classes`: those of the dataset; `stages`: of the current
    configuration. With another number of steps per
    epoch, which requires `force`, it is the last one that ends an epoch. Nothing is written: see `adopt`. Raises UserError
    if settings, classes or lists have changed in harmful ways without `force`, and if no checkpoint is valid."""
    skipped = []
    newest = _first_valid(run, skipped)
    if newest is None:
        if skipped:
            reasons = "; ".join(skipped)
            raise UserError(f"--resume: no checkpoint of {run} is valid ({reasons}); --overwrite starts again")
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
        changed.append(renamed(trained_on.names, classes.names))
    changed += [f"{s}.txt contains other images" for s in lists if s in before and before[s] != lists[s]]
    changed += [f"{s}.txt is gone" for s in before if s not in lists]
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
                "epoch; --overwrite starts again"
            )
        messages.append(
            f"an epoch now has {steps_per_epoch} steps: resuming from the end of epoch {newest.epochs_done}"
        )
    epoch = newest.progress_in(steps_per_epoch).epoch
    if epoch < epochs and (stage := stage_at(stages, epoch).number) != newest.stage:
        raise UserError(
            f"--resume: {newest.folder} was written in stage {newest.stage}, but with these settings epoch {epoch + 1} belongs "
            f"to stage {stage}; give the old --epochs and stages, or start another run with --experiment NAME"
        )
    return newest, messages


def shared_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that all processes of a run must share: those that may not change when it resumes, some more,
    and whether it resumes. Datasets are compared by their lists."""
    own = (RESUMABLE_CHANGES - SHARED) | NOT_COMPARED | {"data"}
    return {name: value for name, value in settings.items() if name not in own} | {"resume": bool(settings["resume"])}


def adopt(found: Checkpoint, steps_per_epoch: int) -> Checkpoint:
    """Point `last` at the checkpoint that a run has resumed from -> the checkpoint at its place.

    After a change of the number of steps per epoch, those after it are removed, and it is renamed for the new number, so
    that those to follow are newer by name."""
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
    write_atomically(folder.with_name("last"), folder.name + "\n")  # the run may have been killed before it could
    return replace(found, folder=folder)


def renamed(before: tuple[str, ...], now: tuple[str, ...] | None) -> str:
    """Return 'class names: 0 'cat' -> 'dog' (and 2 more)': the first of the names that have changed, and their number."""
    if now is None:
        return "class names: they are gone from the dataset"
    different = [k for k, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    first, more = different[0], len(different) - 1
    return f"class names: {first} {before[first][:40]!r} -> {now[first][:40]!r}" + f" (and {more:,} more)" * (more > 0)


def recorded_data_on_device(found: Checkpoint) -> str:
    """Return "on" if the run of a checkpoint trains on resident images, else "off". (Runs of the first version did not
    record it, and augmented on the host.)"""
    return "on" if found.state["config"].get("data_on_device") == "on" else "off"


def recorded_pipeline(found: Checkpoint) -> str:
    """Return "features" if the run of a checkpoint trains on features in place of images, else as
    `recorded_data_on_device`."""
    return "features" if found.state["config"].get("on_features") is True else recorded_data_on_device(found)


def _first_valid(run: Path, skipped: list[str], ends_an_epoch: bool = False) -> Checkpoint | None:
    """Return a run's newest valid checkpoint, or the newest that ends an epoch; append the reasons against those that are
    not valid to `skipped`."""
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
    """Return ['lr: 0.1 -> 0.2', ...]: the differences between a run's stored settings and the current ones, among the
    harmful settings or the harmless ones. Settings that the current method does not use are not compared."""
    defaults = Config.of(method=before.get("method", DEFAULTS["method"])).flat()
    before = json.loads(json.dumps(defaults)) | before  # an older run lacks the settings that were added since
    now = json.loads(json.dumps(settings))
    compared = [k for k in now if k not in NOT_COMPARED and (k in RESUMABLE_CHANGES) == harmless]
    return [f"{k}: {before[k]!r} -> {now[k]!r}" for k in compared if before[k] != now[k]]

"""Where a run resumes, and which settings may change when it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from reslt.config.checks import as_plain
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.core.files import write_atomically
from reslt.runs import checkpoint
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.folder import newest_first

# How a run is carried out, which changes nothing, or no more than rounding. (Other passes, as other processes, give BatchNorm
# and dropout other parts of a batch.)
RESUMABLE_CHANGES = {
    "bad_images",  # what it leaves out changes the lists' digests
    "channels_last",
    "checkpoint_hist",
    "checkpoint_minutes",
    "cuda_graph",
    "data_dir",
    "experiment",
    "grad_accum_steps",
    "log_with",
    "output",
    "torchcompile",
    "workers",
}


NOT_COMPARED = {"resume", "force_resume", "overwrite"}


def to_resume(
    run: Path, config: Config, num_classes: int, lists: Mapping[str, str]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (None where there is none), and what the user is told: those that were skipped and
    why, and the settings that have changed.

    Raises UserError where the configuration, the classes or a list have changed in more than harmless ways and
    --force-resume was not given, and where there are checkpoints but none verifies."""
    skipped = []
    for folder in newest_first(run):
        try:
            newest = checkpoint.load(folder)
            break
        except UserError as fault:
            skipped.append(str(fault))
    else:
        if skipped:
            reasons = "; ".join(skipped)
            raise UserError(f"--resume: no checkpoint of {run} verifies ({reasons}); --overwrite starts again")
        return None, []
    messages = [f"skipped: {reason}" for reason in skipped]
    of_run = {"data_on_device": "off"} | newest.state["config"]  # older runs augmented on the host
    harmless = changed_settings(of_run, config, harmless=True)
    if harmless:
        messages.append(f"going on with other settings than before: {'; '.join(harmless)}")
    if any(change.startswith("grad_accum_steps: ") for change in harmless):
        messages.append("BatchNorm and dropout see other parts of a batch than before")
    if newest.epochs_done > config.epochs:
        raise UserError(
            f"--resume: {run} has trained {newest.epochs_done} epochs; give --epochs {newest.epochs_done} or more"
        )
    before = newest.state.get("lists", {})
    changed = changed_settings(of_run, config)
    if before == lists:  # the same images by another name, or way
        changed = [change for change in changed if not change.startswith("data: ")]
    if newest.num_classes != num_classes:
        changed.append(f"classes: {newest.num_classes} -> {num_classes}")
    changed += [f"{s}.txt holds other images" for s in lists if s in before and before[s] != lists[s]]
    changed += [f"{s}.txt is gone" for s in before if s not in lists]
    if changed and not config.force_resume:
        also = f", and, without harm, {'; '.join(harmless)}" if harmless else ""
        raise UserError(
            f"--resume: {run} was started otherwise ({'; '.join(changed)}{also}); give the old values, start another run "
            "with --experiment NAME, or go on all the same with --force-resume"
        )
    if changed:
        messages.append(f"--force-resume: going on although the run was started otherwise: {'; '.join(changed)}")
    write_atomically(run / "checkpoints" / "last", newest.folder.name + "\n")  # the run may have died before it could
    return newest, messages


def recount(run: Path, resumed: Path, steps_per_epoch: int) -> None:
    """Where an epoch has another number of steps than before (--force-resume): name the checkpoints by the new count, the
    one that the run goes on from by the start of its epoch. What is newer, and did not verify, is removed."""
    folders = newest_first(run)
    names = [folder.name for folder in folders]
    for i, folder in enumerate(folders):
        epochs = int(folder.name.split("-")[0])
        counted_anew = folder.with_name(f"{epochs}-{epochs * steps_per_epoch}")
        if i < names.index(resumed.name) or (counted_anew != folder and counted_anew.exists()):
            shutil.rmtree(folder)
        else:
            folder.rename(counted_anew)
    write_atomically(run / "checkpoints" / "last", newest_first(run)[0].name + "\n")


def changed_settings(before: dict, config: Config, harmless: bool = False) -> list[str]:
    """['lr: 0.1 -> 0.2', ...]: what a run's stored configuration and this one differ in, of the harmful settings or of the
    harmless ones."""
    before = as_plain(Config()) | before  # an older run lacks the settings that were added since
    now = json.loads(json.dumps(as_plain(config)))
    compared = [k for k in now if k not in NOT_COMPARED and (k in RESUMABLE_CHANGES) == harmless]
    return [f"{k}: {before[k]!r} -> {now[k]!r}" for k in compared if before[k] != now[k]]

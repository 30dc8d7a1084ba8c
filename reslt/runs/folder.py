"""A run's folder on disk: config.yaml and the checkpoints.

checkpoints/<epochs done>-<steps done>/  a checkpoint; the steps are those of the whole run
checkpoints/last, checkpoints/best       text files with the name of one of these folders
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml
from accelerate import Accelerator

from reslt.augment.transfers import begin_copies
from reslt.core.errors import Stopped, UserError
from reslt.core.files import flush, named, write_atomically
from reslt.core.locks import locked, sweep
from reslt.core.log import logged_to, warn_once
from reslt.data.classes import Classes
from reslt.evaluation.outputs import is_outputs, lines_of
from reslt.models.finite import not_finite
from reslt.models.fold import is_folded
from reslt.runs import checkpoint
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.contents import require_replaceable
from reslt.training.accelerator import broadcast_from_main, end_training
from reslt.training.state import Progress, TrainState

SAVE_SECONDS = 60.0  # after a stop signal, the other processes wait this long for a checkpoint
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")


@contextmanager
def open_run(folder: Path, description: dict, overwrite: bool, accelerator: Accelerator) -> Iterator[None]:
    """Create a run's folder, or open it to resume. Within the block, messages also go to its train.log. If the run fails
    before its first checkpoint, a new folder is removed, and a replaced one is restored. Raises UserError if another run is
    using the folder.

    `description`: the content of config.yaml. Only the main process touches the disk; the others wait for it."""
    with ExitStack() as main_alone:
        broadcast_from_main(lambda: main_alone.enter_context(_opened(folder, description, overwrite)), accelerator)
        if accelerator.is_main_process:
            main_alone.enter_context(logged_to(folder / "train.log"))
        try:
            yield
        except Stopped as stopped:  # on all processes, so they can disconnect in order
            end_training(accelerator)
            remedy = f"continue it with --resume {shlex.quote(str(folder))}"
            raise Stopped(stopped.signal_number, f"{stopped}; {remedy}") from None


@contextmanager
def _opened(folder: Path, description: dict, overwrite: bool) -> Iterator[None]:
    folder = folder.resolve()  # a link to a run's folder stays; its target is replaced
    with locked(folder):
        replaced, failed = (folder.with_name(f".{folder.name}.{state}") for state in ("replaced", "failed"))
        shutil.rmtree(failed, ignore_errors=True)
        if overwrite and ((folder / "config.yaml").exists() or newest_first(folder)):
            for run in [folder, *([replaced] if replaced.exists() else [])]:  # the second was left by a killed process
                require_replaceable(run)
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        _refuse_links(folder)
        is_new = not folder.exists()
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            for place in (folder, folder / "checkpoints"):
                sweep(place)
            nothing_is_trained = not newest_first(folder)
            if nothing_is_trained or not (folder / "config.yaml").exists():
                describe(folder, description)
            yield
        except BaseException:
            if is_new and not _has_checkpoint(folder):
                _discard(folder, replaced, failed)
            else:
                _remove_run(replaced)
            raise
        _remove_run(replaced)


def _has_checkpoint(folder: Path) -> bool:
    """Return whether a run has written a checkpoint. The pointer is checked first: that requires no file descriptor."""
    if (folder / "checkpoints/last").exists():
        return True
    try:
        return bool(newest_first(folder))
    except OSError:
        return False


def _remove_run(replaced: Path) -> None:
    """Remove a replaced run, unless its folder is missing or contains other files."""
    with suppress(UserError):
        require_replaceable(replaced)
        shutil.rmtree(replaced, ignore_errors=True)


def _discard(folder: Path, replaced: Path, failed: Path) -> None:
    """Remove a run that failed before its first checkpoint, and restore the run that it replaced, if any. The restoration
    comes first, since removing requires more (such as file descriptors) than renaming. If `failed` cannot be removed, the
    next start removes it."""
    with suppress(OSError):  # the error that ended the run is the one to report
        os.rename(folder, failed)
        if replaced.exists():
            os.rename(replaced, folder)
    shutil.rmtree(failed, ignore_errors=True)


def _refuse_links(folder: Path) -> None:
    """Raise UserError if links in a run's folder, which may come from a stranger, would redirect messages to another file,
    or let checkpoints of another run be removed as old ones."""
    log, checkpoints = folder / "train.log", (folder / "checkpoints").resolve()
    if log.is_symlink() or (log.exists() and not log.is_file()):
        raise UserError(
            f"{log}: it is a link, or not a file; remove it, so that messages are written to a file of the run"
        )
    if checkpoints.parent != folder and (checkpoints.parent / "config.yaml").exists():
        raise UserError(f"{folder / 'checkpoints'}: it is a link to the checkpoints of {checkpoints.parent}; remove it")


def describe(folder: Path, description: dict) -> None:
    """Write config.yaml: the configuration, its sources, and the versions of packages."""
    content = description | {"versions": {name: version(name) for name in PACKAGES}}
    write_atomically(folder / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def begin_save(
    folder: Path,
    state: TrainState,
    settings: dict,
    accelerator: Accelerator,
    progress: Progress,
    steps_per_epoch: int,
    classes: Classes,
    keep: int = 2,
    stage: int = 1,
) -> Callable[[], None]:
    """Begin to copy the present state to the host, without waiting for a GPU, and return a function that completes the
    checkpoint. Called on all processes. `settings`: the flat configuration; `stage`: its number, from 1.

    The returned function, to be called on the main process from any thread, writes the checkpoint, points `last` at it, and
    removes all but the `keep` newest. It raises UserError if the weights are not finite, or if writing fails."""
    tensors, described = state.saved(accelerator)
    epochs_done = progress.epoch + (progress.steps == steps_per_epoch)
    steps_done = progress.epoch * steps_per_epoch + progress.steps
    counters = {"epochs_done": epochs_done, "steps_done": steps_done, "steps_per_epoch": steps_per_epoch}
    counters["stage"] = stage
    content = counters | {"progress": asdict(progress)} | classes.stored() | described
    final = folder / "checkpoints" / f"{epochs_done}-{steps_done}"
    begun = {part: begin_copies(of_part) for part, of_part in tensors.items()} if accelerator.is_main_process else {}

    def write() -> None:
        copies = {part: finish() for part, finish in begun.items()}
        modules = [part for part in ("model", "ema") if part in copies]
        if bad := [f"{part}: {name}" for part in modules if (name := not_finite(copies[part], state.model))]:
            raise UserError(
                f"epoch {progress.epoch + 1}, after step {progress.steps} of {steps_per_epoch}: the weights are not finite "
                f"({bad[0]}), so no checkpoint is written and the earlier ones are kept; lower --lr, or give --clip-grad"
            )
        if (folder / "summary.csv").is_file():  # the rows of epochs that will not be trained again reach the disk first
            with named(folder / "summary.csv"):
                flush(folder / "summary.csv")
        if not _verifies(final):  # a valid one is the same, and would be missing while it is replaced
            checkpoint.write(final, copies, content | {"config": settings}, replaces=True)
        write_atomically(final.parent / "last", final.name + "\n")
        prune(folder, keep)

    return write


def _verifies(folder: Path) -> bool:
    try:
        checkpoint.load(folder)
    except UserError:
        return False
    return True


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints except the `keep` newest and those that a pointer names."""
    pointers = [pointer for name in ("last", "best") if (pointer := run / "checkpoints" / name).is_file()]
    named = {pointer.read_text(encoding="utf-8", errors="replace").strip() for pointer in pointers}
    for folder in newest_first(run)[keep:]:
        if folder.name not in named:
            try:
                shutil.rmtree(folder)
            except OSError as fault:
                warn_once("old checkpoints", f"{folder}: this old checkpoint cannot be removed: {fault.strerror}")


def newest_first(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first."""
    found = []
    for folder in (run / "checkpoints").glob("*-*"):
        counts = folder.name.split("-")
        if folder.is_dir() and len(counts) == 2 and all(count.isdecimal() for count in counts):
            found.append(folder)
    return sorted(found, key=lambda folder: [int(count) for count in folder.name.split("-")], reverse=True)


def find(ckpt: Path, which: str | None = None) -> Checkpoint:
    """Load the checkpoint that a user names: a run's folder, a checkpoint's folder or a file in it. Raises UserError.

    `which`, for a run's folder: 'last', 'best', or None for the best if a validation list chose one, else the last."""
    if ckpt.is_file() and ckpt.name in ("last", "best"):  # .../checkpoints/best
        return find(ckpt.parents[1], ckpt.name)
    if ckpt.is_file() or (ckpt / "state.json").is_file():
        if which:
            raise UserError(
                f"--which {which} chooses among the checkpoints of a run, but {ckpt} is a single one; drop it"
            )
        return checkpoint.at(ckpt)
    return checkpoint.load(pointed_at(ckpt, which))


def pointed_at(run: Path, which: str | None = None) -> Path:
    """Return the folder of a checkpoint of a run; `which`: see `find`. Raises UserError if there is none."""
    pointers = run / "checkpoints"
    if which is None:
        which = "best" if (pointers / "best").is_file() else "last"
    if (pointers / which).is_file():
        name = (pointers / which).read_text(encoding="utf-8", errors="replace").strip()
        if name not in [folder.name for folder in newest_first(run)]:
            raise UserError(
                f"{pointers / which}: it names {name[:40]!r}, which does not exist; give a checkpoint in {pointers}"
            )
        return pointers / name
    if which == "best" and (pointers / "last").is_file():
        raise UserError(f"{run} has no best checkpoint, since only a validation list chooses one; use --which last")
    raise UserError(
        f"{run}: there is no checkpoint; give the folder of a run (output/NAME), or of one of its checkpoints"
    )


def require_safe_outputs(
    output: Path | None, own: Path | None = None, files: Mapping[str, Path | None] | None = None
) -> None:
    """Raise UserError if writing results into the folder `output`, or the `files` of --fold, --features and --logits, would
    change a checkpoint, or replace the results of a run other than `own`, the evaluated one, or any other file."""
    if output:
        require_outside_checkpoints(output, "--output")
        is_run = (output / "config.yaml").is_file() and (output / "checkpoints").is_dir()
        if is_run and not (own and own.exists() and output.samefile(own)):
            raise UserError(
                f"--output {output}: the results of another run in it would be replaced; give another folder"
            )
    for flag, file in (files or {}).items():
        if file is None:
            continue
        require_outside_checkpoints(file, flag)
        is_folding = flag == "--fold"
        if file.exists() and not (is_folded(file) if is_folding else is_outputs(file)):
            kind = "of folded weights" if is_folding else "that this flag has written"
            raise UserError(f"{flag} {file}: it exists and is not a file {kind}; give another name")
        if not is_folding and lines_of(file).exists() and not file.exists():
            raise UserError(f"{flag} {file}: {lines_of(file)}, which exists, would be replaced; give another name")


def require_outside_checkpoints(path: Path, flag: str) -> None:
    """Raise UserError if a path to write, given with `flag`, is inside the checkpoints of a run."""
    for place in (path.resolve(), *path.resolve().parents):
        of_run = place.name == "checkpoints" and newest_first(place.parent)
        if of_run or (place / checkpoint.SUMS).is_file():
            raise UserError(f"{flag} {path}: this is inside {place}, which only training writes to; give another place")


def choose_best(run: Path, scores: Mapping[int, float], verify: bool = False) -> None:
    """Point `best` at the valid checkpoint of the epoch (from 1) with the highest score, the earliest if scores are equal. If
    there is none, remove the pointer. The checkpoint that `best` already names is read again only with `verify`."""
    pointer, of_epoch = run / "checkpoints" / "best", {}
    for folder in newest_first(run):
        of_epoch.setdefault(int(folder.name.partition("-")[0]), []).append(folder)
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    for epoch in sorted(scores, key=lambda epoch: (-scores[epoch], epoch)):
        # The oldest ends the epoch; the others are from within the next.
        for folder in reversed(of_epoch.get(epoch, [])):
            if folder.name == named and not verify:
                return
            try:
                if not checkpoint.load(folder).ended_an_epoch:
                    continue
            except UserError:
                continue
            write_atomically(pointer, folder.name + "\n")
            return
    pointer.unlink(missing_ok=True)

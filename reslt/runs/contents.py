"""The files that a run's folder consists of: `--overwrite` deletes these and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.files import UNFINISHED
from reslt.core.text import one_line
from reslt.runs.checkpoint import PARTS, SUMS

OF_RUN = re.compile(
    r"config\.yaml|summary\.csv|train\.log|result[^/]*\.json|per_class[^/]*\.csv|sweep-[^/]*\.(csv|png)|"
    r"calibration\.json|predictions[^/]*\.safetensors|report\.html"
)
OF_REPORT = re.compile(r"(classes|reliability|confusion|loss|accuracy|learning_rate)\.png")  # in a folder of its own
OF_CHECKPOINTS = re.compile(r"last|best")
CHECKPOINT = re.compile(r"\d+-\d+")
OF_CHECKPOINT = re.compile(rf"({'|'.join(PARTS)})\.safetensors|state\.json|{SUMS}")
OF_TENSORBOARD = re.compile(r"events\.out\.tfevents\..+|hparams\.yml")
OF_WANDB = re.compile(r"(offline-)?run-\w+-\w+|latest-run|debug[\w-]*\.log")
NAMED = 3


def require_replaceable(run: Path) -> None:
    """Raise UserError if a folder contains files that neither a run nor its trackers write (the message names up to NAMED of
    them), or if it is not the folder of a run. Changes nothing."""
    if not _is_run(run):
        raise UserError(f"{run}: --overwrite replaces runs only, and this is not the folder of one; remove it yourself")
    if others := _others(run):
        named = ", ".join(one_line(name) for name in others[:NAMED])
        more = f" and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
        raise UserError(
            f"{run}: --overwrite deletes only what a run writes, but the folder also contains {named}{more}; move that away, "
            "or start another run with --experiment NAME"
        )


def _is_run(folder: Path) -> bool:
    try:
        content = read_yaml(folder / "config.yaml")
    except UserError:
        return False
    return isinstance(content.get("config"), dict) and isinstance(content.get("versions"), dict)


def _others(run: Path) -> list[str]:
    """Return the paths in a run's folder that no run writes, relative to the folder. All links are among them."""
    others = []
    for path in sorted(run.iterdir()):
        if not path.is_symlink() and path.is_dir():
            if path.name == "checkpoints":
                others += [f"checkpoints/{name}" for name in _others_of_checkpoints(path)]
            elif not (
                _is_of_tensorboard(path)
                or (path.name == "wandb" and all(OF_WANDB.fullmatch(inside.name) for inside in path.iterdir()))
                or (path.name == "report" and all(_is_file(file, OF_REPORT) for file in path.iterdir()))
            ):
                others.append(f"{path.name}/")
        elif not _is_file(path, OF_RUN):
            others.append(path.name)
    return others


def _others_of_checkpoints(folder: Path) -> list[str]:
    others = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and _is_named(path, CHECKPOINT):
            others += [
                f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if not _is_file(file, OF_CHECKPOINT)
            ]
        elif not _is_file(path, OF_CHECKPOINTS):
            others.append(path.name)
    return others


def _is_of_tensorboard(folder: Path) -> bool:
    """Return whether a folder contains event files and nothing else, except folders of hyperparameters."""
    inside = list(folder.iterdir())
    return bool(inside) and all(
        _is_file(path, OF_TENSORBOARD)
        or (path.is_dir() and not path.is_symlink() and all(_is_file(file, OF_TENSORBOARD) for file in path.iterdir()))
        for path in inside
    )


def _is_file(path: Path, pattern: re.Pattern) -> bool:
    return _is_named(path, pattern) and path.is_file() and not path.is_symlink()


def _is_named(path: Path, pattern: re.Pattern) -> bool:
    """Return whether a name matches, or is that of a matching file left unfinished by a killed process."""
    unfinished = UNFINISHED.fullmatch(path.name)
    return pattern.fullmatch(unfinished["target"] if unfinished else path.name) is not None

"""The files of an evaluation. No other evaluation replaces the result.json that training wrote."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from reslt.config.places import dataset_folder
from reslt.config.schema import PREDICTION, Config
from reslt.core.errors import UserError
from reslt.core.files import read_json
from reslt.core.text import counted
from reslt.data.datasets import Dataset, read_info
from reslt.data.paths import find_image_root
from reslt.evaluation.curve import Curve
from reslt.evaluation.predictions import SavedPredictions
from reslt.evaluation.tables import STATED, Evaluation, write_results
from reslt.runs.calibration import validity
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.folder import pointed_at
from reslt.runs.released import ReleasedCheckpoint

OF_TRAINING = ("last", "best_on_test", "paper", "init_digest", "teacher_digests")  # keys that only training writes
COMPARED = (*PREDICTION, "eval_branch_at", "bad_images", "mixed_precision")
LONGEST_PART = 60


def is_other_dataset(named: str | None, trained_on: str) -> bool:
    """Return whether `named`, of --data, is another folder of lists than the one that a run was trained on."""
    if named is None:
        return False
    try:
        return dataset_folder(named).resolve() != dataset_folder(trained_on).resolve()
    except UserError:  # one of them is missing, which is reported when it is read
        return named != trained_on


def changed_evaluation(own: Config, now: Config, dataset: Dataset, use_experts: int | None, by_index: bool) -> dict:
    """Return {setting: value} of those settings in which an evaluation differs from that of training. `own`: as trained;
    `now`: with the changes of the command line; `dataset`: the evaluated one."""
    changed = {name: now[name] for name in COMPARED if now[name] != own[name]}
    if now.data.data == own.data.data and not _reads_from(dataset, own.data.data_dir):
        changed["data_dir"] = now.data.data_dir
    if use_experts is not None and use_experts < now.model.experts:
        changed["use_experts"] = use_experts
    return changed | ({"classes": "index"} if by_index else {})


def _reads_from(dataset: Dataset, data_dir: str | None) -> bool:
    """Return whether a dataset's images are those found with this --data-dir."""
    root = find_image_root(dataset.folder, read_info(dataset.folder), data_dir)
    return root.folder.resolve() == dataset.image_root.folder.resolve()


def write_evaluation(
    found: Checkpoint | ReleasedCheckpoint,
    evaluation: Evaluation,
    changes: Mapping[str, object],
    is_other: bool,
    which: str | None,
    output: Path | None,
    saves_predictions: bool = False,
) -> str:
    """Write result.json and per_class.csv of an evaluation, and, if requested, predictions.safetensors from its collected
    outputs, into `output`, else into the run's folder. Return a line that names the files.

    In the run's folder, these names belong to the run's own evaluation: its checkpoint and list, unchanged since training,
    without `changes` of settings; keys that training added to result.json are kept. The names of other evaluations contain
    -<data>-<list>[-<which>][-<setting>=<value>]. `which`: as given on the command line; `is_other`: of another dataset. A
    file of the authors' code has no run, so only a run of the same name is protected."""
    folder = output or found.run
    stated = {name: value for name, value in changes.items() if name in STATED} | _other_weights(found)
    suffix = _suffix(found, evaluation, changes, is_other, which, folder)
    if suffix == "":
        own = _own_result(found.run)
        stated = {name: own[name] for name in OF_TRAINING if name in own}
    elif suffix is not None:
        before = read_json(found.run / f"result{suffix}.json").get("list_digest", evaluation.list_digest)
        if before != evaluation.list_digest:  # another folder of this name, or the list has changed since
            suffix += f"-{evaluation.list_digest}"
    suffix = suffix or ""
    written = write_results(folder, evaluation, stated, suffix)
    if not saves_predictions:
        return written
    file = folder / f"predictions{suffix}.safetensors"
    if isinstance(found, Checkpoint):  # so that a temperature that is fitted later can be matched to them
        stated |= validity(found, evaluation.method, evaluation.settings.get("use_experts"))
    SavedPredictions.of(evaluation, stated).write(file)
    return f"{written}\n{file}: predictions of {counted(len(evaluation.outputs['labels']), 'image')}"


def write_curve(
    found: Checkpoint | ReleasedCheckpoint,
    curve: Curve,
    changes: Mapping[str, object],
    is_other: bool,
    which: str | None,
    output: Path | None,
) -> str:
    """Write the curve of a sweep into `output`, else into the run's folder, and return a line that names the files. Their
    names contain the differences from the run's own evaluation, as in `write_evaluation`, except the swept setting."""
    folder, others = output or found.run, {name: value for name, value in changes.items() if name != curve.key}
    return curve.write(folder, _suffix(found, curve.evaluations[0], others, is_other, which, folder) or "")


def _suffix(
    found: Checkpoint | ReleasedCheckpoint,
    evaluation: Evaluation,
    changes: Mapping[str, object],
    is_other: bool,
    which: str | None,
    folder: Path,
) -> str | None:
    """Return the suffix of the names of an evaluation's files, "" for the run's own evaluation; None if `folder` is not that
    of the run, so that there is nothing to protect."""
    is_of_no_run = isinstance(found, ReleasedCheckpoint) and not (folder / "config.yaml").exists()
    if is_of_no_run or folder.resolve() != found.run.resolve():
        return None
    checkpoint = _name_of_other_checkpoint(found, _own_result(found.run), which)
    if not (is_other or changes or checkpoint or _is_other_list(found, evaluation)):
        return ""
    parts = [evaluation.dataset.name, evaluation.split, *checkpoint, *(f"{k}={_text(v)}" for k, v in changes.items())]
    return "".join(f"-{_plain(part)}" for part in parts)


def _own_result(run: Path) -> dict:
    """Return the content of the result.json that training wrote; {} before the end of training."""
    result = read_json(run / "result.json")
    return result if "last" in result else {}


def _name_of_other_checkpoint(found: Checkpoint | ReleasedCheckpoint, own: dict, which: str | None) -> list[str]:
    """Return the parts of a name for a checkpoint other than that of the run's own result; [] for that one."""
    if isinstance(found, ReleasedCheckpoint):
        return ["released"]
    try:
        is_default = pointed_at(found.run).resolve() == found.folder.resolve()
    except UserError:
        is_default = found.run == found.folder  # it was copied out of its run
    weights = list(_other_weights(found).values())
    if not is_default:
        return [which or found.folder.name, *weights]
    steps = found.steps_of_the_next.get("steps_of_the_next")
    if own and (own.get("epoch"), own.get("steps_of_the_next")) != (found.epochs_done, steps):
        return [found.folder.name, *weights]  # the run was continued after that result
    return weights


def _other_weights(found: Checkpoint | ReleasedCheckpoint) -> dict[str, str]:
    """Return {'weights': 'model'} if these are evaluated although the run has a moving average; else {}."""
    is_named = isinstance(found, Checkpoint) and found.weights not in (None, found.evaluated)
    return {"weights": found.weights} if is_named else {}


def _is_other_list(found: Checkpoint | ReleasedCheckpoint, evaluation: Evaluation) -> bool:
    """Return whether an evaluated list differs from the list of the final tables of training, by name or content."""
    dataset, split = evaluation.dataset, evaluation.split
    config = found.state["config"] if isinstance(found, Checkpoint) else {}
    final = dataset.final_split(config.get("final_split"))
    return split != final or found.classes.lists.get(split, dataset.digests[split]) != dataset.digests[split]


def _text(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Return a text as a part of a file's name; a digest makes long texts, which are cut, distinct."""
    plain = re.sub(r"[^\w.+=-]", "_", text)
    if len(plain.encode()) <= LONGEST_PART:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{plain.encode()[:LONGEST_PART].decode(errors='ignore')}-{digest}"

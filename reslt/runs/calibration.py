"""calibration.json of a run: temperatures, each with the weights and settings of prediction for which it was fitted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reslt.config.schema import PREDICTION, MethodSettings
from reslt.core.files import regular_file, write_atomically
from reslt.core.log import logger
from reslt.core.text import counted, shown
from reslt.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities_of,
)
from reslt.evaluation.tables import Evaluation, percent
from reslt.models.finite import is_temperature
from reslt.runs.checkpoint import Checkpoint
from reslt.runs.released import ReleasedCheckpoint

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A temperature, the weights and settings for which it is valid (`weights_digest`, `prediction`), and the list on which
    it was fitted."""

    temperature: float
    data: str
    list: str
    list_digest: str
    images: int
    epoch: int
    steps_of_the_next: int  # 0 at the end of an epoch
    weights_digest: str
    prediction: dict  # of `prediction_settings`
    ece_before: float  # on that list, in percent
    ece_after: float
    nll_before: float  # each class counts the same
    nll_after: float

    @property
    def text(self) -> str:
        """One line for the console."""
        before, after = percent(self.ece_before), percent(self.ece_after)
        return (
            f"temperature {self.temperature:.3g}, fitted on {self.list} of {self.data} ({counted(self.images, 'image')}): "
            f"there, ECE {before} % before and {after} % after, NLL {self.nll_before:.3f} and {self.nll_after:.3f}"
        )

    def list_for(self, evaluation: Evaluation) -> str:
        """Return the name of the list that it was fitted on, for the table of an evaluation."""
        if self.list_digest == evaluation.list_digest:
            return "this list itself"
        return shown(self.list if self.data == evaluation.dataset.name else f"{self.list} of {self.data}")


def prediction_settings(found: Checkpoint, method: MethodSettings, use_experts: int | None = None) -> dict:
    """Return the settings that determine a checkpoint's logits, as JSON represents them. `use_experts`: None for all."""
    settings = {name: getattr(method, name) for name in PREDICTION}
    settings |= {name: settings[name] or None for name in ("prior_tau", "tde")}  # 0 has no effect
    settings["eval_branch_at"] = (method.eval_branch_at or method.branch_at) if method.has_branches else None
    settings["use_experts"] = use_experts if use_experts != found.state["config"].get("experts") else None
    return settings


def validity(found: Checkpoint, method: MethodSettings, use_experts: int | None = None) -> dict:
    """Return the entries of a calibration that determine for which evaluations it is valid: the digest of the weights, and
    the settings of prediction."""
    return {"weights_digest": found.weights_digest, "prediction": prediction_settings(found, method, use_experts)}


def fit_calibration(found: Checkpoint, evaluation: Evaluation) -> Calibration | None:
    """Fit the temperature on an evaluated list with collected outputs. Return None, with a warning, if the likelihood has no
    maximum, for example because every image is predicted correctly."""
    logits, labels = evaluation.outputs["logits"], evaluation.outputs["labels"]
    temperature = fit_temperature(logits, labels)
    images = evaluation.dataset.lists[evaluation.split]
    if not LOWEST < temperature < HIGHEST:
        why = (
            "every image is predicted correctly, so the smallest one would fit best: list more images"
            if temperature == LOWEST
            else "the logits do not separate its classes, so the largest one would fit best: train longer"
        )
        logger.warning(
            f"{images.file}: the {counted(len(labels), 'image')} of {evaluation.split} determine no temperature, and "
            f"probabilities are not calibrated; {why}"
        )
        return None
    probabilities = probabilities_of(logits, temperature)
    hits = (logits.argmax(1) == labels).numpy()
    settings = evaluation.settings
    return Calibration(
        temperature,
        data=evaluation.dataset.name,
        list=evaluation.split,
        list_digest=evaluation.list_digest,
        images=len(labels),
        epoch=found.epochs_done,
        steps_of_the_next=found.steps_of_the_next.get("steps_of_the_next", 0),
        **validity(found, evaluation.method, settings.get("use_experts")),
        ece_before=100 * evaluation.accuracies.calibration_errors[0],
        ece_after=100 * expected_calibration_error(probabilities.max(1), hits),
        nll_before=negative_log_likelihood(logits, labels),
        nll_after=negative_log_likelihood(logits, labels, temperature),
    )


def write_calibration(run: Path, calibration: Calibration) -> str:
    """Add a calibration to those of a run, replacing one of the same weights and settings. Return a line that describes it."""
    others = [other for other in _stored(run) if _key(other) != _key(calibration)]
    entries = [dataclasses.asdict(entry) for entry in (*others, calibration)]
    write_atomically(run / FILE, json.dumps({"temperatures": entries}, indent=1, ensure_ascii=False))
    return f"{run / FILE}: {calibration.text}"


def read_calibration(
    found: Checkpoint | ReleasedCheckpoint, method: MethodSettings, use_experts: int | None = None
) -> Calibration | None:
    """Return the calibration of a checkpoint with these settings of prediction. None if its run has no calibration, and,
    with a warning, if those of the run are for other weights or settings, or if the file is damaged."""
    if isinstance(found, ReleasedCheckpoint) or not (stored := _stored(found.run)):
        return None
    valid_for = validity(found, method, use_experts)
    if calibration := _valid(stored, valid_for):
        return calibration
    settings = valid_for["prediction"]
    of_weights = [entry for entry in stored if entry.weights_digest == valid_for["weights_digest"]]
    differing = sorted(name for name in settings if any(e.prediction.get(name) != settings[name] for e in of_weights))
    fitted = f"with other settings ({', '.join(differing)})" if of_weights else "for other weights of the run"
    logger.warning(
        f"{found.run / FILE}: its temperatures were fitted {fitted}, so probabilities are not calibrated; fit one with "
        "evaluate.py --calibrate and the same --ckpt and settings"
    )
    return None


def stored_temperature(
    found: Checkpoint | ReleasedCheckpoint, method: MethodSettings, use_experts: int | None = None
) -> float | None:
    """Return the temperature of `read_calibration`; None: not calibrated."""
    calibration = read_calibration(found, method, use_experts)
    return calibration and calibration.temperature


def calibration_of(run: Path, described: Mapping[str, object]) -> Calibration | None:
    """Return the calibration of a run for an evaluation. `described`: its description, with the entries of `validity`. None
    if these are missing, as in earlier versions, or if the run has no calibration for them."""
    return _valid(_stored(run), described)


def _valid(stored: list[Calibration], described: Mapping[str, object]) -> Calibration | None:
    sought = (described.get("weights_digest"), described.get("prediction"))
    return next((entry for entry in stored if _key(entry) == sought), None)


def _key(calibration: Calibration) -> tuple[str, dict]:
    return calibration.weights_digest, calibration.prediction


def _stored(run: Path) -> list[Calibration]:
    """Return the calibrations of a run; [] if it has none. A damaged file, which may come from a stranger, costs a warning
    only, since no accuracy depends on it: []."""
    file = run / FILE
    if not file.exists():
        return []
    try:
        entries = json.loads(regular_file(file).read_text(encoding="utf-8"))["temperatures"]
        found = [Calibration(**entry) for entry in entries]
        for entry in found:
            texts = (entry.data, entry.list, entry.list_digest, entry.weights_digest)
            is_valid = all(isinstance(text, str) for text in texts) and isinstance(entry.prediction, dict)
            if not is_valid or not is_temperature(entry.temperature):
                raise ValueError
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        logger.warning(f"{file}: it is damaged and ignored; fit temperatures again with evaluate.py --calibrate")
        return []

"""The predictions of one evaluation for every image of a list, as a file that reports read: `evaluate.py
--save-predictions`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reslt.core.errors import UserError
from reslt.core.files import atomic_file, regular_file
from reslt.evaluation.outputs import listed_lines
from reslt.evaluation.tables import Evaluation, result_of

WRITER = "reslt predictions"


@dataclass(frozen=True)
class SavedPredictions:
    """One evaluation, a row per image in the order of the list.

    `logits`: (N, C) float32, fused, as the predictor ranks classes, without a temperature; `predicted`: (R, N) int32, the
    predicted classes for each row of the table, the first of which is the argmax of `logits`; `described`: the description of
    the evaluation in result.json (data, split, list_digest, epoch, ...), `row_names`, and `temperature` (None: not
    calibrated)."""

    labels: np.ndarray
    logits: np.ndarray
    predicted: np.ndarray
    lines: list[str]  # of the list, without line breaks
    described: dict

    @classmethod
    def of(cls, evaluation: Evaluation, extra: dict | None = None) -> SavedPredictions:
        """Return the predictions of an evaluation with collected outputs, including `of_rows`. `extra`: see `result_of`."""
        found, images = evaluation.outputs, evaluation.dataset.lists[evaluation.split]
        lines = [line.decode("utf-8", "surrogateescape") for line in listed_lines(images)]
        described = result_of(evaluation, extra) | {"row_names": evaluation.row_names}
        described["temperature"] = evaluation.accuracies.temperature
        return cls(found["labels"].numpy(), found["logits"].numpy(), found["predicted"].numpy(), lines, described)

    def write(self, file: Path) -> None:
        """Write a safetensors file, completely or not at all."""
        tensors = {"labels": self.labels, "logits": self.logits, "predicted": self.predicted}
        text = "\n".join(self.lines).encode("utf-8", "surrogateescape")
        tensors["lines"] = np.frombuffer(text, np.uint8)  # a tensor, since safetensors limits the size of metadata
        metadata = {"writer": WRITER, "described": json.dumps(self.described, ensure_ascii=False)}
        with atomic_file(file) as temporary:
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary, metadata)

    @classmethod
    def read(cls, file: Path) -> SavedPredictions:
        """Read a file that `write` wrote. Raises UserError."""
        try:
            with safe_open(regular_file(file), "np") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("writer") != WRITER:
                    raise ValueError("not written by evaluate.py --save-predictions")
                tensors = {name: opened.get_tensor(name) for name in ("labels", "logits", "predicted", "lines")}
            described = json.loads(metadata["described"])
            lines = tensors.pop("lines").tobytes().decode("utf-8", "surrogateescape").split("\n")
            found = cls(**tensors, lines=lines, described=described)
            found._require_valid()
        except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as fault:
            raise UserError(
                f"{file}: not the predictions of an evaluation ({fault}); write them again with evaluate.py --ckpt RUN "
                "--save-predictions"
            ) from None
        return found

    def _require_valid(self) -> None:
        """Raise ValueError if the parts do not describe the same images and classes."""
        images, classes = self.logits.shape if self.logits.ndim == 2 else (-1, -1)
        names = self.described.get("row_names") if isinstance(self.described, dict) else None
        fits = self.labels.shape == (images,) and len(self.lines) == images and isinstance(names, list)
        if not fits or self.predicted.shape != (len(names), images) or images == 0:
            raise ValueError("its parts do not belong together")
        if not np.isfinite(self.logits).all():
            raise ValueError("it contains a logit that is not finite")
        for rows in (self.labels, self.predicted):
            if rows.dtype.kind != "i" or rows.min() < 0 or rows.max() >= classes:
                raise ValueError("it contains a class that has no logit")

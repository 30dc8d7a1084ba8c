"""Features and logits of every image of a list, as files for other tools: `evaluate.py --features OUT --logits OUT`.

A safetensors file contains a float32 row per image, in the order of the list, and metadata. A text file next to it, OUT with
the suffix .txt, contains the lines of the list in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reslt.core.errors import UserError
from reslt.core.files import atomic_file
from reslt.core.waiting import Wait
from reslt.data.lists import ImageList
from reslt.evaluation.metrics import logits_of_rows, table_rows
from reslt.methods.predictors import Predictor
from reslt.models.router import Routed, is_routed

WRITER, PREDICT_WRITER = "reslt evaluate.py", "reslt.predict"
ROWS_AT_ONCE = 4096  # that processes exchange


class Outputs:
    """The outputs of a model for this process's images, collected batch by batch in host memory: labels, fused logits, and
    further parts on request."""

    def __init__(
        self,
        model: torch.nn.Module,
        num_classes: int,
        predictor: Predictor,
        *,
        of_branches: bool = False,
        of_features: bool = False,
        of_rows: bool = False,
    ):
        """`model`: a ResLT or Experts; `predictor`: its logits are collected; `of_branches`: whether the logits of each branch
        are too; `of_features`: features; `of_rows`: the predicted class of each row of the table."""
        self.experts, self.branches = (1, *model.logits_per_image)[-2:]
        self.predictor, self.of_branches, self.of_features, self.of_rows = predictor, of_branches, of_features, of_rows
        each = (0, self.experts, self.branches)  # no image yet: a process may have none
        self.parts = {
            "labels": [torch.empty(0, dtype=torch.int64)],
            "logits": [torch.empty(0, num_classes)],
        }
        if of_branches:
            self.parts["branch_logits"] = [torch.empty(*each, num_classes)]
        if of_features:
            widths = {head.in_features for head in model.classifiers}
            if len(widths) > 1:
                raise UserError("--features: the features of early exits have different widths; leave it out")
            self.parts["branch_features"] = [torch.empty(*each, *widths)]
        if of_rows:
            rows = table_rows(model.logits_per_image, is_routed(model))
            self.parts["predicted"] = [torch.empty(0, rows, dtype=torch.int32)]

    def add(self, branch_logits: torch.Tensor | Routed, features: list[torch.Tensor], labels: torch.Tensor) -> None:
        """Add a batch: (K, N, C) or (E, K, N, C) branch logits, perhaps of a router; (K N, D) features per expert, if
        collected; (N,) labels."""
        rows = logits_of_rows(branch_logits, self.predictor.fusion, self.predictor.prior)
        found, shape = {"labels": labels, "logits": rows[0][0]}, (self.experts, self.branches, len(labels), -1)
        if self.of_branches:
            of_branches = branch_logits.branch_logits if isinstance(branch_logits, Routed) else branch_logits
            found["branch_logits"] = of_branches.float().reshape(shape).permute(2, 0, 1, 3)
        if self.of_features:
            found["branch_features"] = torch.stack(features).float().reshape(shape).permute(2, 0, 1, 3)
        if self.of_rows:
            found["predicted"] = torch.cat([logits.argmax(-1) for logits in rows]).int().T
        for name, part in found.items():
            # Copied, since labels of a worker process may occupy an open file.
            self.parts[name].append(part.to("cpu", copy=True))

    def gathered(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Return the outputs for the images of all processes, in the order of the list: labels (N,), logits (N, C), and, if
        collected, branch_logits (E, K, N, C), features (N, E D) and branch_features (E, K, N, D), predicted (R, N).

        `logits`: fused, as the predictor ranks classes. `branch_logits`: before a prior is subtracted. `features`: the inputs
        of the classifier, summed over branches and concatenated over experts. `predicted`: rows as in `logits_of_rows`."""
        with Wait("the other processes to send their features and logits"):
            found = {name: _of_all(torch.cat(parts), accelerator) for name, parts in self.parts.items()}
        if self.of_features:
            found["features"] = found["branch_features"].sum(2).flatten(1)
        if self.of_rows:
            found["predicted"] = found["predicted"].T.contiguous()
        by_branch = {name: rows.permute(1, 2, 0, 3).contiguous() for name, rows in found.items() if rows.ndim == 4}
        return found | by_branch


def _of_all(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Concatenate the rows of all processes, (N, ...) with an N of their own, in order of rank."""
    if accelerator.num_processes == 1:
        return rows
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    parts: list[list[torch.Tensor]] = [[] for _ in counts]
    for begin in range(0, max(counts), ROWS_AT_ONCE):
        own = rows[begin : begin + ROWS_AT_ONCE].to(accelerator.device)
        padded = own.new_zeros(min(ROWS_AT_ONCE, max(counts) - begin), *rows.shape[1:])
        padded[: len(own)] = own
        every = accelerator.gather(padded).cpu().unflatten(0, (len(counts), -1))
        for part, of_process, count in zip(parts, every, counts, strict=True):
            part.append(of_process[: max(count - begin, 0)])
    return torch.cat([rows for part in parts for rows in part])


def write_outputs(
    outputs: Mapping[str, torch.Tensor], kind: str, images: ImageList, described: Mapping[str, object], out: Path
) -> str:
    """Write the features or the logits (`kind`) of a list, and its lines, each file completely or not at all. Return a line
    that describes the files. `outputs` contains the tensors of each branch; they are written if there are several branches
    or experts. `described`: the metadata."""
    experts, branches = outputs[f"branch_{kind}"].shape[:2]
    names = ["labels", kind, *([f"branch_{kind}"] if experts * branches > 1 else [])]
    metadata = {"format": "pt", "writer": WRITER} | {name: str(value) for name, value in described.items()}
    lines = lines_of(out)
    with atomic_file(lines) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in listed_lines(images)))
    with atomic_file(out) as temporary:
        save_file({name: outputs[name] for name in names}, temporary, metadata=metadata)
    shapes = ", ".join(f"{name} {tuple(outputs[name].shape)}" for name in names)
    return f"{out}: {shapes}; {lines}: the list's lines"


def listed_lines(images: ImageList) -> list[bytes]:
    """Return the line of each image in the file of a list, without line breaks."""
    listed = images.file.read_bytes().split(b"\n")
    return [listed[line - 1].rstrip(b"\r") for line in images.line(np.arange(len(images))).tolist()]


def lines_of(out: Path) -> Path:
    """Return the file for the lines of the list, next to `out`."""
    return out.with_suffix(".txt")


def is_outputs(file: Path) -> bool:
    """Return whether a file was written by `write_outputs`, or by `python -m reslt.predict`."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("writer") in (WRITER, PREDICT_WRITER)
    except (OSError, SafetensorError):
        return False

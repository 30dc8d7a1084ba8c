"""Features and logits of every image of a list as files, for other tools: `evaluate.py --features OUT --logits OUT`.

A file of safetensors has a row per image, in the order of the list, in float32, and metadata; beside it, OUT with the suffix
.txt contains the lines of the list in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reslt.core.files import atomic_file
from reslt.core.waiting import Wait
from reslt.data.lists import ImageList
from reslt.evaluation.metrics import fused_logits
from reslt.methods.predictors import Predictor
from reslt.models.router import Routed

WRITER = "reslt evaluate.py"
ROWS_AT_ONCE = 4096  # of what processes exchange


class Outputs:
    """What a model returns for this process's images, collected batch by batch in the host's memory."""

    def __init__(self, model: torch.nn.Module, num_classes: int, predictor: Predictor, of_features: bool):
        """`model`: a ResLT or Experts; `predictor`: the one whose logits are collected; `of_features`: features too."""
        self.experts, self.branches = (1, *model.logits_per_image)[-2:]
        self.predictor, self.of_features = predictor, of_features
        each = (0, self.experts, self.branches)  # of no image yet: a process may have none
        self.parts = {
            "labels": [torch.empty(0, dtype=torch.int64)],
            "logits": [torch.empty(0, num_classes)],
            "branch_logits": [torch.empty(*each, num_classes)],
        }
        if of_features:
            self.parts["branch_features"] = [torch.empty(*each, model.classifiers[0].in_features)]

    def add(self, branch_logits: torch.Tensor | Routed, features: list[torch.Tensor], labels: torch.Tensor) -> None:
        """Add a batch: (K, N, C) or (E, K, N, C) branch logits, with a router's; per expert (K N, D) features, if
        collected; (N,) labels."""
        logits = fused_logits(branch_logits, self.predictor.fusion)
        if self.predictor.prior is not None:
            logits = logits - self.predictor.prior
        if isinstance(branch_logits, Routed):
            branch_logits = branch_logits.branch_logits
        shape = (self.experts, self.branches, len(labels), -1)
        found = {"labels": labels, "logits": logits, "branch_logits": branch_logits.reshape(shape).permute(2, 0, 1, 3)}
        if self.of_features:
            found["branch_features"] = torch.stack(features).reshape(shape).permute(2, 0, 1, 3)
        for name, rows in found.items():
            self.parts[name].append((rows if name == "labels" else rows.float()).cpu())

    def gathered(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Return the outputs for the images of all processes, in the order of the list: labels (N,), logits (N, C),
        branch_logits (E, K, N, C), and, if collected, features (N, E D), branch_features (E, K, N, D).

        `logits`: fused, as the predictor ranks classes. `branch_logits`: before a prior is subtracted. `features`: what
        enters the classifier, summed over branches; those of the experts one after the other."""
        with Wait("the other processes to send their features and logits"):
            found = {name: _of_all(torch.cat(parts), accelerator) for name, parts in self.parts.items()}
        if self.of_features:
            found["features"] = found["branch_features"].sum(2).flatten(1)
        by_branch = {name: rows.permute(1, 2, 0, 3).contiguous() for name, rows in found.items() if rows.ndim == 4}
        return found | by_branch


def _of_all(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Concatenate (N of this process, ...) rows of all processes, in the order of their ranks."""
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
    """Write the features or the logits (`kind`) of a list and its lines, each file completely or not at all. Return a line
    that describes the file. The tensors of each branch are written if there are several branches or experts; `described`:
    the metadata."""
    experts, branches = outputs["branch_logits"].shape[:2]
    names = ["labels", kind, *([f"branch_{kind}"] if experts * branches > 1 else [])]
    metadata = {"format": "pt", "writer": WRITER} | {name: str(value) for name, value in described.items()}
    lines, listed = lines_of(out), images.file.read_bytes().split(b"\n")
    with atomic_file(lines) as temporary:
        own = (listed[line - 1].rstrip(b"\r") for line in images.line(np.arange(len(images))).tolist())
        temporary.write_bytes(b"".join(line + b"\n" for line in own))
    with atomic_file(out) as temporary:
        save_file({name: outputs[name] for name in names}, temporary, metadata=metadata)
    shapes = ", ".join(f"{name} {tuple(outputs[name].shape)}" for name in names)
    return f"{out}: {shapes}; {lines}: the list's lines"


def lines_of(out: Path) -> Path:
    """Return the file beside `out` for the lines of the list."""
    return out.with_suffix(".txt")


def is_outputs(file: Path) -> bool:
    """Return whether a file was written by `write_outputs`."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("writer") == WRITER
    except (OSError, SafetensorError):
        return False

"""Export of a module as a program that runs without this suite and without timm: ONNX, or torch.export. Both map any number
of normalized images to logits and probabilities, and are compared with the module before they are written."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from reslt.core.errors import UserError

LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: one ONNX file is limited to 2 GiB
COMPARED_BATCHES = (1, 3)
# Other libraries compute in another order. The first is relative to the largest logit.
SAME_LOGIT, SAME_PROBABILITY = 1e-3, 1e-4
OUTPUTS = ("logits", "probabilities")
# Entries of a module's description that the metadata of an ONNX file and description.json of a .pt2 file contain
STATED = (
    "model",
    "method",
    "epoch",
    "num_classes",
    "class_names",
    "img_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
)


class Program(nn.Module):
    """A module and its temperature: (N, 3, H, W) normalized images -> (N, C) logits, (N, C) probabilities."""

    def __init__(self, module: nn.Module, temperature: float | None):
        super().__init__()
        self.module, self.temperature = module, temperature or 1.0

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.module(images)
        return logits, (logits / self.temperature).softmax(-1)


def stated(described: dict) -> dict:
    """Return the part of a module's description that users of the program need, with its inputs and outputs."""
    found = {name: described[name] for name in STATED if described.get(name) is not None}
    size = described["img_size"]
    found |= {"temperature": described.get("temperature") or 1.0, "exported_by": "reslt"}
    found["is_calibrated"] = described.get("temperature") is not None
    return found | {
        "input": f"images: float32 (N, 3, {size}, {size}), (pixel / 255 - mean) / std, RGB",
        "outputs": OUTPUTS,
    }


def to_onnx(module: nn.Module, described: dict) -> tuple[bytes, str]:
    """Return the content of an ONNX file, with its description in `metadata_props` as JSON values, and a sentence on the
    comparison. Raises UserError if the module cannot be translated, or the file predicts differently."""
    import onnx

    if (size := sum(t.numel() * t.element_size() for t in module.state_dict().values())) > LARGEST_ONNX:
        raise UserError(
            f"--format onnx: {size:,} bytes of weights exceed the 2 GiB of an ONNX file; use --format torch"
        )
    program = Program(module, described.get("temperature")).eval()
    with _quiet(), torch.no_grad(), _explained("onnx"):
        exported = torch.onnx.export(
            program,
            (_images(2, described["img_size"]),),
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    model = exported.model_proto
    entries = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in stated(described).items()}
    onnx.helper.set_model_props(model, entries)
    with _explained("onnx"):
        onnx.checker.check_model(model)
    content = model.SerializeToString()
    if find_spec("onnxruntime") is None:
        return content, "not compared with the run: onnxruntime is not installed (pip install onnxruntime)"
    import onnxruntime

    with _explained("onnx"):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = _difference(
        program, lambda images: session.run(list(OUTPUTS), {"images": images.numpy()}), described["img_size"], "onnx"
    )
    return content, f"onnxruntime's {difference}"


def to_torch(module: nn.Module, described: dict) -> tuple[bytes, str]:
    """Return the content of a file of `torch.export.save`, with its description in description.json, and a sentence on the
    comparison. Raises UserError if the module cannot be exported, or the program predicts differently."""
    program = Program(module, described.get("temperature")).eval()
    content, text = io.BytesIO(), json.dumps(stated(described), ensure_ascii=False)
    with _quiet(), torch.no_grad(), _explained("torch"):
        exported = torch.export.export(
            program,
            (_images(2, described["img_size"]),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
        torch.export.save(exported, content, extra_files={"description.json": text})
        content.seek(0)
        loaded = torch.export.load(content).module()
    return content.getvalue(), f"the loaded program's {_difference(program, loaded, described['img_size'], 'torch')}"


def _images(number: int, size: int) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def _difference(program: Program, other: Callable, size: int, format: str) -> str:
    """Return a sentence on the largest difference between the probabilities of two programs. Raises UserError if it exceeds
    rounding."""
    largest = 0.0
    for number in COMPARED_BATCHES:
        images = _images(number, size)
        with _explained(format):
            ours, theirs = program(images), [torch.as_tensor(np.asarray(values)) for values in other(images)]
        if any(own.shape != found.shape for own, found in zip(ours, theirs, strict=True)):
            raise UserError(f"--format {format}: the exported program rejects a batch of {number}; use another format")
        of_logits, of_probabilities = ((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        largest = max(largest, of_probabilities)
        if not (of_logits <= SAME_LOGIT * ours[0].abs().max() and largest <= SAME_PROBABILITY):  # false for NaN
            raise UserError(
                f"--format {format}: the exported program predicts differently (probabilities differ by "
                f"{of_probabilities:.2g}, logits by {of_logits:.2g}); use another format"
            )
    batches = " and ".join(map(str, COMPARED_BATCHES))
    return f"probabilities differ by at most {largest:.1g} from the run's (batches of {batches} random images)"


@contextmanager
def _explained(format: str) -> Iterator[None]:
    """Within the block, raise errors of the libraries that translate a module as UserError, in one line."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as fault:
        reason = next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)[:300]
        raise UserError(
            f"--format {format}: torch cannot translate this model ({type(fault).__name__}: {reason}); use another format"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, silence warnings of the libraries that translate a module: most concern their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)

"""Files of folded models, which `evaluate.py --fold OUT.safetensors` writes.

If everything folds into the classifier, the file contains a plain timm model, and
`timm.create_model(NAME, checkpoint_path=OUT)` loads it; otherwise, `load_folded` does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reslt.augment.settings import ImageSettings
from reslt.config.checks import build, raise_all
from reslt.config.command_line import key_values
from reslt.config.imports import naming_imports
from reslt.config.model_arguments import trusted_arguments
from reslt.config.parts import HEADS
from reslt.config.schema import MethodSettings, ModelSettings
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, regular_file
from reslt.data.classes import Classes
from reslt.data.classes import fault_of as fault_of_classes
from reslt.models.adapters import has_adapters
from reslt.models.create import create_model
from reslt.models.experts import Experts
from reslt.models.finite import is_temperature, not_finite
from reslt.models.folding import FoldedExperts, fold, fold_unchecked
from reslt.models.heads import DeconfoundedLinear

__all__ = ["fold", "is_folded", "load_folded", "read_folded", "save_folded", "unfolded_names"]

OF_MODEL = ("model", "model_kwargs", "experts", "expert_width", "expert_stages", "expert_gates")
OF_HEADS = ("head_groups", "head_gamma", "head_scale", "tde")
OF_ADAPTERS = ("tune", "adapter_dim")
OF_EXITS = ("exit_confidence",)
OF_BRANCHES = ("branches", "branch", "branch_at", "eval_branch_at", "tied_branches")
# The settings in a folded file that determine its model. They state every part, even the method's default.
OF_METHOD = ("method", "network", "head", *OF_HEADS, "part_kwargs", *OF_BRANCHES, *OF_EXITS)
STORED = (*OF_MODEL, *OF_ADAPTERS, *OF_METHOD, "img_size")


def save_folded(
    folded: nn.Module,
    model: ModelSettings,
    method: MethodSettings,
    images: ImageSettings,
    classes: Classes,
    out: Path,
    imports: Iterable[str] = (),
    temperature: float | None = None,
) -> None:
    """Write folded weights to `out`, a .safetensors file. Its metadata contains, as JSON, what `load_folded` and a user of
    the file need to know.

    `classes`: of the run, which give the logits their meaning; `imports`: the modules that the run was trained with;
    `temperature`: of the calibration of these logits."""
    described = {name: getattr(model, name) for name in (*OF_MODEL, *(OF_ADAPTERS if has_adapters(folded) else ()))}
    exits = OF_EXITS if method.network == "exits" else ()
    branches = OF_BRANCHES if method.has_branches else ("branches",) if method.network == "conv_stack" else ()
    head = "linear" if method.head == "scaled" else method.head  # its scales are folded
    heads = OF_HEADS if head != "linear" else ()
    described |= {name: getattr(method, name) for name in ("method", "network", *heads, *branches, *exits)} | {
        "head": head
    }
    if method.fusion == "main":
        described["branches"] = 1  # the other branches are not used, and not in the file
    if arguments := method.arguments_of(HEADS[head]):
        described["part_kwargs"] = arguments
    described |= {"img_size": images.size, "mean": images.mean, "std": images.std}
    described |= {"interpolation": images.interpolation, "crop_pct": images.crop_pct}
    described |= classes.stored() | ({"imports": list(imports)} if imports else {})
    if temperature is not None:
        described["temperature"] = temperature
    if isinstance(folded, FoldedExperts):
        described["use_experts"] = len(folded.experts)
    tensors = {k: t.detach().cpu().contiguous() for k, t in folded.state_dict().items()}
    with atomic_file(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "reslt": json.dumps(described, ensure_ascii=False)})


def is_folded(file: Path) -> bool:
    """Return whether a file was written by `save_folded`."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return "reslt" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_folded(file: Path, model_kwargs: dict | None = None) -> tuple[nn.Module, dict]:
    """Load a file that `save_folded` wrote. Return the module (N, 3, H, W) -> (N, C) in evaluation mode, and the file's
    description. Its `temperature` is that of softmax(logits / temperature), None if the logits are not calibrated.

    The file, which may be a stranger's, chooses a model that timm knows by the arguments that describe its architecture,
    and nothing else; `model_kwargs`: arguments that are not accepted from a file, as in training. The caller imports
    modules that register the file's model or method; this function never does. Raises UserError if the file cannot be
    read, or if its weights are not finite or do not fit its model."""
    typed, faults = key_values(model_kwargs or {})
    weights, described = read_folded(file)
    values = {name: described[name] for name in STORED if name in described}
    values |= {"stages": [], "mutual": "off", "feature_loss": "off"}  # of a method's training
    values["model_kwargs"], more = trusted_arguments(values.get("model_kwargs", {}), typed, file)
    with naming_imports(described.get("imports")):
        config, invalid = build(values, dict.fromkeys(values, str(file)))
        raise_all(faults + more + invalid)
        model = create_model(config.model, config.method, described["num_classes"], config.augment.img_size)
    if isinstance(model, Experts):
        used = described.get("use_experts")
        if not isinstance(used, int) or not 1 <= used <= config.model.experts:
            raise UserError(f"{file}: not a folded model: its use_experts is {str(used)[:40]!r}")
        model.use(used)
    for head in model.classifiers:
        if isinstance(head, DeconfoundedLinear):
            head.alpha = config.method.tde or 0.0
    folded, _ = fold_unchecked(model, described["img_size"])
    if bad := not_finite(weights, folded):
        raise UserError(f"{file}: {bad} is not finite; write the file again with evaluate.py --fold")
    try:
        folded.load_state_dict(weights)
    except RuntimeError as fault:
        raise UserError(
            f"{file}: its weights do not fit the model that it names: {str(fault)[:400]}; write the file again with "
            "evaluate.py --fold"
        ) from None
    return folded.eval(), described


def read_folded(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a file that `save_folded` wrote. Return its weights and its description, in which the classes are valid. Raises
    UserError for a file of another kind."""
    try:
        with safe_open(regular_file(file), "pt") as opened:
            described = json.loads((opened.metadata() or {}).get("reslt", "null"))
        if not isinstance(described, dict):
            raise ValueError("not written by evaluate.py --fold")
        for name in ("num_classes", "img_size"):
            if not isinstance(described.get(name), int) or not 0 < described[name] < 2**31:
                raise ValueError(f"its {name} is {str(described.get(name))[:40]!r}")
        if fault := fault_of_classes(described):
            raise ValueError(fault)
        described.setdefault("temperature", None)  # not calibrated, or written by an earlier version
        if described["temperature"] is not None and not is_temperature(described["temperature"]):
            raise ValueError(f"its temperature is {str(described['temperature'])[:40]!r}")
        weights = load_file(file)
    except (OSError, ValueError, RecursionError, SafetensorError) as fault:
        raise UserError(f"{file}: not a folded model: {fault}") from None
    return weights, described | Classes.read(described).stored()  # files of earlier versions lack the training counts


def unfolded_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a folded file under the names of ResLT and Experts. Values are not changed: branches lack a
    folded BatchNorm, and a classifier includes what is folded into it."""

    def unfolded(name: str) -> str:
        expert, rest = re.fullmatch(r"(experts\.\d+\.)?(.*)", name, re.DOTALL).groups(default="")
        rest = re.sub(r"^model\.(?=backbone\.|branches\.|exits\.)", "", rest)  # of Fused, FoldedExits
        is_plain = not rest.startswith(("backbone.", "branches.", "shared.", "gates.", "exits."))
        return f"{expert}backbone.{rest}" if is_plain else f"{expert}{rest}"

    return {unfolded(name): tensor for name, tensor in weights.items()}

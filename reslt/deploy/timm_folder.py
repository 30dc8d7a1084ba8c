"""A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: config.json and model.safetensors, as on
the Hugging Face hub. If timm lacks the architecture, the folder also contains the file that registers it."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from torch import nn

from reslt.core.errors import UserError
from reslt.deploy import modeling_reslt
from reslt.models import cifar_resnet
from reslt.models.adapters import adapter_dims
from reslt.models.branches import BatchNormBranches, ConvBranches, ConvStack, ModulatedAttention
from reslt.models.experts import stages
from reslt.models.fold import unfolded_names
from reslt.models.folding import FoldedExits, FoldedExperts, FoldedResLT, Fused
from reslt.models.heads import CosineLinear, DeconfoundedLinear, Head
from reslt.models.reslt import ResLT

# The files that register an architecture, by their names in the folder; they import only torch and timm.
MODULES = {"modeling_reslt": modeling_reslt, "modeling_cifar_resnet": cifar_resnet}
SAME_OPERATIONS = (
    1e-5  # relative to the largest logit, and for probabilities: above the rounding of the same operations
)
# Entries of timm's description that concern the architecture; others, such as the license, concern timm's weights.
KEPT = ("fixed_input_size", "min_input_size", "first_conv", "classifier")
OTHERWISE = "export it with --format onnx or --format torch"


@dataclass(frozen=True)
class TimmModel:
    """A module as timm creates it: an architecture, its arguments, its weights under the names of the architecture, and the
    `MODULES` that register it, if timm lacks it. `backbone`: the timm model in it; `prefix`: of the names of its weights."""

    architecture: str
    arguments: dict
    weights: dict[str, torch.Tensor]
    modules: tuple[str, ...]
    backbone: nn.Module
    prefix: str = ""

    @classmethod
    def of(cls, module: nn.Module, described: dict) -> TimmModel:
        """Return a module from `load_run` or `load_folded` as a timm model. Raises UserError if timm cannot express it."""
        is_of_experts = isinstance(module, FoldedExperts)
        if isinstance(module, FoldedExits):
            raise UserError(f"--format timm: it cannot express early exits (exits); {OTHERWISE}")
        networks = [_Network.of(one) for one in (module.experts if is_of_experts else [module])]
        backbone = module.shared if is_of_experts else networks[0].backbone
        name = backbone.pretrained_cfg["architecture"]
        arguments = dict(described.get("model_kwargs") or {})
        if backbone.pretrained_cfg.get("fixed_input_size"):
            arguments.setdefault("img_size", described["img_size"])
        modules = _modules_of(name)
        of_network = networks[0].arguments()
        if not of_network and not is_of_experts:
            weights = dict(networks[0].backbone.state_dict())
            return cls(name, arguments, weights, modules, backbone)
        settings = {"backbone": name, "backbone_args": arguments} | of_network
        weights, modules = unfolded_names(module.state_dict()), (*modules, "modeling_reslt")
        if not is_of_experts:
            return cls("reslt_network", settings, weights, modules, backbone, "backbone.")
        settings |= {"experts": len(networks), "expert_args": arguments | _widths(networks[0].backbone, backbone)}
        own_stages = [name for name in stages(backbone) if isinstance(getattr(backbone, name), nn.Identity)]
        if len(own_stages) != modeling_reslt.LATE_STAGES:
            settings["late_stages"] = len(own_stages)
        if len(module.gates):
            of_gate = ("stage", "channels", "strides")
            settings["gates"] = [{name: getattr(gate, name) for name in of_gate} for gate in module.gates]
        return cls("reslt_experts", settings, weights, modules, backbone, "shared.")

    def config(self, described: dict, license: str | None = None) -> dict:
        """Return the content of config.json. `license`: that of these weights, None: unknown."""
        own = {k: v for k, v in self.backbone.pretrained_cfg.items() if k in KEPT}
        for key in ("first_conv", "classifier"):
            if self.prefix and own.get(key):
                names = own[key] if isinstance(own[key], (tuple, list)) else [own[key]]
                own[key] = [f"{self.prefix}{name}" for name in names]
        if self.prefix == "shared.":  # each expert has a classifier
            own["classifier"] = [name for name in self.weights if name.endswith(".backbone.fc.weight")]
            own["classifier"] = [name.removesuffix(".weight") for name in own["classifier"]]
        own |= {"num_classes": described["num_classes"], "crop_mode": "center", "license": license}
        own |= {"input_size": [3, described["img_size"], described["img_size"]]}
        own |= {name: described[name] for name in ("mean", "std", "interpolation", "crop_pct")}
        config = {"architecture": self.architecture, "num_classes": described["num_classes"]}
        config |= {"num_features": self.backbone.num_features}
        if described.get("class_names"):
            config["label_names"] = described["class_names"]
        if self.arguments:
            config["model_args"] = self.arguments
        config |= {"temperature": described.get("temperature"), "exported_by": "reslt"}
        return config | {"pretrained_cfg": {key: value for key, value in own.items() if value is not None}}

    def write(self, folder: Path, described: dict, license: str | None = None) -> None:
        """Write config.json, model.safetensors, and the modules into an empty folder. Raises UserError for an argument of the
        model that JSON cannot express."""
        try:
            config = json.dumps(self.config(described, license), indent=2, ensure_ascii=False)
        except TypeError as fault:
            raise UserError(
                f"--format timm: config.json cannot state the model's arguments: {fault}; {OTHERWISE}"
            ) from None
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.weights.items()}
        (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        for name in self.modules:
            (folder / f"{name}.py").write_text(inspect.getsource(MODULES[name]), encoding="utf-8")


@dataclass(frozen=True)
class _Network:
    """One folded network: a timm model, with or without branches."""

    backbone: nn.Module
    branches: nn.Module | None = None
    place: str = "map"
    added: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> _Network:
        if isinstance(module, FoldedResLT):
            return cls(module.backbone, module.branches, module.branch_at, True)
        if not isinstance(module, Fused):
            return cls(module)
        if not isinstance(module.model, ResLT):
            raise UserError(f"--format timm: it cannot express a network with two last blocks (bbn); {OTHERWISE}")
        network = module.model
        return cls(
            network.backbone,
            network.branches,
            "map" if isinstance(network.branches, ConvStack) else network.eval_branch_at,
        )

    def arguments(self) -> dict:
        """Return the arguments of `modeling_reslt.Network` besides those of the timm model; {} for a plain timm model."""
        found, head = {}, self.backbone.get_classifier()
        if isinstance(head, CosineLinear):
            found["head"] = {"kind": "cosine", "scale": head.scale}
        elif isinstance(head, DeconfoundedLinear):
            found["head"] = {"kind": "deconfounded", "scale": head.scale, "groups": head.groups}
            found["head"] |= {"gamma": head.gamma, "alpha": head.alpha}
        elif isinstance(head, Head):
            raise UserError(f"--format timm: it cannot express a {type(head).__name__} head; {OTHERWISE}")
        if adapters := adapter_dims(self.backbone):
            found["adapters"] = adapters
        branches = self.branches
        if isinstance(branches, ModulatedAttention):
            raise UserError(f"--format timm: it cannot express attention on the feature map; {OTHERWISE}")
        if isinstance(branches, ConvStack):
            found["branches"] = {"kind": "stack", "number": len(branches.convs), "own": 1}
        elif branches is not None:
            kind = {ConvBranches: "conv", BatchNormBranches: "bn"}[type(branches)]
            found["branches"] = {"kind": kind, "number": branches.branches, "own": branches.own}
        return found | ({"place": self.place, "added": self.added} if branches is not None else {})


def _widths(expert: nn.Module, shared: nn.Module) -> dict:
    """Return {'channels': widths} if the late stages of an expert are narrower than those of `shared`, the model with the
    shared early stages; else {}."""
    block = getattr(expert, stages(expert)[-1])[-1]
    own, full = (
        [
            info["num_chs"] // getattr(block, "expansion", 1)
            for info in model.feature_info
            if info["module"] in stages(model)
        ]
        for model in (expert, shared)
    )
    return {} if own == full else {"channels": own}


def _modules_of(architecture: str) -> tuple[str, ...]:
    """Return the names of the `MODULES` that register an architecture; () if timm has it. Raises UserError if some other
    module registers it."""
    place = timm.model_entrypoint(architecture).__module__
    if place.partition(".")[0] == "timm":
        return ()
    for name, module in MODULES.items():
        if module.__name__ == place:
            return (name,)
    raise UserError(f"--format timm: {architecture} is registered by the module {place}, which timm lacks; {OTHERWISE}")


@torch.no_grad()
def require_same(folder: Path, module: nn.Module, size: int) -> float:
    """Load a folder with timm, and return the largest difference between its probabilities and those of the module for two
    random images. Raises UserError if timm cannot load the folder, or if it predicts differently."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as fault:  # third-party constructors may raise anything
        reason = " ".join(str(fault).split())[:200]
        raise UserError(f"--format timm: timm cannot load this model ({reason}); {OTHERWISE}") from None
    finally:
        log.setLevel(level)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = module(images), loaded(images)
    difference = (ours.softmax(-1) - theirs.softmax(-1)).abs().max().item()
    of_logits, largest = (ours - theirs).abs().max(), ours.abs().max()
    if not (of_logits <= SAME_OPERATIONS * largest and difference <= SAME_OPERATIONS):  # false for NaN
        raise UserError(
            f"--format timm: the model that timm loads predicts differently (probabilities differ by {difference:.2g}); "
            f"{OTHERWISE}"
        )
    return difference

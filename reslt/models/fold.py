"""Exact folding for inference: a trained model -> a module that maps images to (N, C) fused logits.

`bn` branches are affine at inference. If the path from them to the logits is affine too, the whole ResLT head is one
linear classifier, and the file of `evaluate.py --fold OUT.safetensors` contains a plain timm model:
`timm.create_model(NAME, checkpoint_path=OUT)`. `conv` branches: BN folds into the convolution, and the K branches are
added before the classifier. Experts are folded one by one. Low-rank updates are merged into the weights; adapters, which
are not linear, stay as they are."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

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
from reslt.models.bbn import BBN
from reslt.models.branches import BatchNormBranches, ConvBranches, ConvStack, ModulatedAttention
from reslt.models.create import create_model
from reslt.models.exits import Exits, exited_logits
from reslt.models.experts import Experts, Gate, Network, maps_and_gates
from reslt.models.finite import is_temperature, not_finite
from reslt.models.heads import DeconfoundedLinear, ScaledLinear
from reslt.models.lora import merge_updates
from reslt.models.reslt import ResLT, is_channels_last

SAME = 1e-2  # of the largest logit: far more than float32, or TF32 on a GPU, rounds, and far less than a wrong fold
OF_MODEL = ("model", "model_kwargs", "experts", "expert_width", "expert_stages", "expert_gates")
OF_HEADS = ("head_groups", "head_gamma", "head_scale", "tde")
OF_ADAPTERS = ("tune", "adapter_dim")
OF_EXITS = ("exit_confidence",)
OF_BRANCHES = ("branches", "branch", "branch_at", "eval_branch_at", "tied_branches")
# The settings that a folded file states for its own model. The parts are stated whatever the method's are.
OF_METHOD = ("method", "network", "head", *OF_HEADS, "part_kwargs", *OF_BRANCHES, *OF_EXITS)
STORED = (*OF_MODEL, *OF_ADAPTERS, *OF_METHOD, "img_size")


class FoldedResLT(nn.Module):
    """A backbone, `conv` branches with BN folded in, on its map or its pooled features, averaged over space and added,
    and one classifier: (N, 3, H, W) -> (N, C)."""

    def __init__(self, backbone: nn.Module, branches: ConvBranches, branch_at: str):
        super().__init__()
        self.backbone, self.branches, self.branch_at = backbone, branches, branch_at

    def forward(self, images: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        features = self.backbone.forward_features(images)
        if gate is not None:
            features = features * gate
        if self.branch_at == "pooled":
            features = self.backbone.forward_head(features, pre_logits=True)
        pooled = self.branches(as_map(features, is_channels_last(self.backbone))).mean((3, 4))  # (K, N, D)
        return self.backbone.get_classifier()(pooled.sum(0))


class FoldedExperts(nn.Module):
    """Shared stages and folded experts, whose logits are averaged, with gates that are not folded: (N, 3, H, W) -> (N, C)."""

    def __init__(self, shared: nn.Module, experts: list[nn.Module], gates: Sequence[Gate] = ()):
        super().__init__()
        self.shared, self.experts, self.gates = shared, nn.ModuleList(experts), nn.ModuleList(gates)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, gates = maps_and_gates(self.shared, list(self.gates), images)
        if not gates:
            return torch.stack([expert(features) for expert in self.experts]).mean(0)
        return torch.stack(
            [_gated(expert, features, gate) for expert, gate in zip(self.experts, gates, strict=True)]
        ).mean(0)


class Fused(nn.Module):
    """A ResLT or BBN model that cannot be folded further, with its branch logits added up: (N, 3, H, W) -> (N, C)."""

    def __init__(self, model: ResLT | BBN):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, *gate: torch.Tensor) -> torch.Tensor:
        return self.model(images, *gate).sum(0)


class FoldedExits(nn.Module):
    """A network with early exits, of which the first confident one predicts: (N, 3, H, W) -> (N, C)."""

    def __init__(self, model: Exits):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits, asks = self.model.route(images)
        return exited_logits(logits[:, 0], asks)


def _gated(expert: nn.Module, features: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the logits of a folded expert, a plain timm model or one with branches, whose last map a gate multiplies."""
    if isinstance(expert, (Fused, FoldedResLT)):
        return expert(features, gate)
    return expert.forward_head(expert.forward_features(features) * gate)


def as_map(features: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Features in a timm model's layout -> (N, D, H, W) (tokens: L x 1, pooled: 1 x 1)."""
    if features.ndim == 4:
        return features.movedim(-1, 1) if channels_last else features
    number, *_, width = features.shape  # `len` would fix the number of images of a program that is exported
    return features.reshape(number, -1, 1, width).movedim(-1, 1)


@torch.no_grad()
def fold(model: Network, img_size: int) -> tuple[nn.Module, str]:
    """A trained model -> a module that maps images to (N, C) fused logits, and one sentence on how far it folded.

    The arithmetic is done in float64; the model is not changed. Raises UserError if the module's logits of random images
    are not those of the model, or not finite."""
    folded, how = _folded(model, img_size)
    _require_same_logits(model, folded, img_size)
    return folded, how


@torch.no_grad()
def _folded(model: Network, img_size: int) -> tuple[nn.Module, str]:
    """Fold as `fold` does, without the comparison, for a model whose weights are not loaded yet."""
    like = next(model.parameters())
    copied = copy.deepcopy(model).eval()
    if isinstance(copied, ResLT):
        copied.projection = None  # only training uses it
    merged = "low-rank updates merged; " * merge_updates(copied)
    example = torch.zeros(1, 3, img_size, img_size, dtype=like.dtype, device=like.device)
    if isinstance(copied, Experts):
        example = copied.shared.forward_features(example)
        heads, hows = zip(*(_fold(expert, example) for expert in list(copied.experts)[: copied.used]), strict=True)
        how = f"{merged}{len(heads)} experts, each one's head: {hows[0]}; reslt.models.fold.load_folded reads the file"
        gates = list(copied.gates)[: copied.used]
        return FoldedExperts(copied.shared, [head.to(like.dtype) for head in heads], gates), how
    if isinstance(copied, Exits):
        for i, head in enumerate(copied.exits):
            copied.exits[i] = head.folded() if isinstance(head, ScaledLinear) else head
        has_scales = _fold_scales(copied.backbone)
        kept = "all exits are kept; reslt.models.fold.load_folded reads the file"
        return FoldedExits(copied), f"{merged}{'scales folded into the classifiers; ' * has_scales}{kept}"
    folded, how = _fold(copied, example)
    is_plain = folded is copied.backbone and not has_adapters(folded)
    is_plain = is_plain and isinstance(folded.get_classifier(), (nn.Linear, nn.Conv2d, tuple, nn.ModuleList))
    use = "the file contains the plain timm model" if is_plain else "reslt.models.fold.load_folded reads the file"
    kept = "; adapters are kept" * has_adapters(folded)
    return folded.to(like.dtype), f"{merged}{how}{kept}; {use}"


def _require_same_logits(model: Network, folded: nn.Module, img_size: int) -> None:
    """Raise UserError unless a folded module computes, up to rounding, the fused logits of its model."""
    like = next(model.parameters())
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)).to(like)
    evaluated = copy.deepcopy(model).eval()
    of_branches = evaluated(images).double()  # (K, N, C), or (E, K, N, C)
    if isinstance(model, Exits):
        fused = FoldedExits(evaluated)(images)
    else:
        fused = of_branches.sum(-3) if of_branches.ndim == 3 else of_branches.sum(-3).mean(0)
    difference, largest = (folded.eval()(images) - fused).abs().max().item(), of_branches.abs().max().item()
    rounding = max(SAME, 16 * torch.finfo(like.dtype).eps)
    if not difference <= rounding * largest:  # NaN is not
        raise UserError(
            f"the folded weights do not compute the model's logits: they differ by {difference:.3g}, and the largest logit "
            f"is {largest:.3g}; use the model without folding it"
        )


def _fold(model: ResLT | BBN, example: torch.Tensor) -> tuple[nn.Module, str]:
    """A model in evaluation mode, which is modified -> its folded module, in float64; how far it folded.
    `example`: an input of its backbone."""
    backbone, has_scales = model.backbone, _fold_scales(model.backbone)
    if isinstance(model, BBN):
        how = "scales folded into the classifier; both last blocks are kept"
        return Fused(model), how if has_scales else "not folded: it has two last blocks, and the plain model has one"
    branches, place = model.branches, model.eval_branch_at
    if branches is None:
        return (
            backbone,
            "scales folded into the classifier" if has_scales else "the plain model: there is nothing to fold",
        )
    if isinstance(branches, ModulatedAttention):
        return Fused(model), "not folded: attention on the feature map is not linear"
    shape = backbone.forward_features(example).shape[1:]  # in its own precision: not every model supports another
    model.double()
    if isinstance(branches, ConvStack):
        branches.convs = nn.ModuleList(map(fuse_conv_bn_eval, branches.convs, branches.bns))
        branches.bns = nn.ModuleList(nn.Identity() for _ in branches.convs)
        return Fused(model), "BN folded into the convolutions before the head"
    follows_directly, classifier = classifies_alone(backbone, shape, place), backbone.get_classifier()
    if isinstance(branches, ConvBranches):
        branches.conv, branches.bn = fuse_conv_bn_eval(branches.conv, branches.bn), nn.Identity()
        if not follows_directly:
            reason = (
                "BN folded into the branches' convolution; the head is not just pooling and one linear layer, so the "
            )
            return Fused(model), f"{reason}{branches.branches} branches pass through it one by one"
        if classifier.bias is not None:
            classifier.bias.mul_(branches.branches)
        return FoldedResLT(backbone, branches, place), "BN folded; branches added before the classifier"
    if not follows_directly:
        return Fused(model), "not folded: the head is not just pooling and one linear layer; all branches are kept"
    _into_classifier(classifier, branches)
    return backbone, "folded into the classifier, at no extra cost"


def _fold_scales(backbone: nn.Module) -> bool:
    """Replace a classifier with a scale per class by the linear one with the same logits -> whether it was one."""
    head = backbone.get_classifier()
    if not isinstance(head, ScaledLinear):
        return False
    name = next(name for name, module in backbone.named_modules() if module is head)
    backbone.set_submodule(name, head.folded())
    return True


def _into_classifier(classifier: nn.Linear, branches: BatchNormBranches) -> None:
    """Fold K affine maps B_k(x) = g_k x + c_k, whose logits are added, into the classifier after them:
    W' = W diag(sum g_k), b' = K b + W sum c_k, with g = gamma / sqrt(var + eps), c = beta - g mean."""
    gamma, beta = (p.expand(branches.branches, -1) for p in (branches.weight, branches.bias))  # (K, D)
    gain = gamma / torch.sqrt(branches.bn.running_var + branches.bn.eps)
    offset = beta - gain * branches.bn.running_mean
    bias = classifier.weight @ offset.sum(0)
    if classifier.bias is not None:
        bias += branches.branches * classifier.bias
    classifier.weight = nn.Parameter(classifier.weight * gain.sum(0))
    classifier.bias = nn.Parameter(bias)


@torch.no_grad()
def classifies_alone(backbone: nn.Module, shape: tuple[int, ...], place: str) -> bool:
    """Return whether only the linear classifier (and, on the 'map', averaging) comes between branches and logits.
    `backbone`: in float64 and evaluation mode; `shape`: that of one image's features.

    timm does not state this, so it is tested: random features through the head and through the short path agree up to
    rounding or not at all. The classifier's weights are random meanwhile: if they were 0, as in some new models, any
    two paths would agree."""
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return False
    generator = torch.Generator().manual_seed(0)
    trained = classifier.weight
    classifier.weight = nn.Parameter(torch.randn(trained.shape, generator=generator, dtype=torch.float64).to(trained))
    features = 10 * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(trained)
    if place == "pooled":
        reached = backbone.forward_head(features, pre_logits=True)
    else:
        reached = as_map(features, is_channels_last(backbone)).mean((2, 3))
    agree = reached.shape[1:] == (classifier.in_features,)
    if agree:
        head, direct = backbone.forward_head(features), classifier(reached)
        agree = bool((head - direct).abs().max() <= 1e-6 * direct.abs().max())
    classifier.weight = trained
    return agree


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
    """Write folded weights. The metadata contains, as JSON, what `load_folded` and a user of the file need; `classes`:
    those of the run, which give the logits their meaning; `imports`: the modules that the run was trained with;
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
        described["branches"] = 1  # the others are not used, and not in the file
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
    """Load a file of `save_folded` -> the module in evaluation mode, (N, 3, H, W) -> (N, C), and its description.
    Its `temperature`: of softmax(logits / temperature); None: not calibrated.

    The file, which may be a stranger's, chooses a model that timm knows, by the arguments that describe its
    architecture, and nothing else; `model_kwargs`: arguments that are not accepted from a file, as in training. A
    module that registers its model or method is imported by the caller before, never by this function. Raises
    UserError."""
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
    folded, _ = _folded(model, described["img_size"])
    if bad := not_finite(weights, folded):
        raise UserError(f"{file}: {bad} is not finite; write the file again with evaluate.py --fold")
    try:
        folded.load_state_dict(weights)
    except RuntimeError as fault:
        raise UserError(f"{file}: its weights do not fit the model that it names: {str(fault)[:400]}") from None
    return folded.eval(), described


def read_folded(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a file of `save_folded` -> its weights and its description, in which the classes are valid. Raises UserError."""
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
        described.setdefault("temperature", None)  # not calibrated, or of an earlier version
        if described["temperature"] is not None and not is_temperature(described["temperature"]):
            raise ValueError(f"its temperature is {str(described['temperature'])[:40]!r}")
        weights = load_file(file)
    except (OSError, ValueError, RecursionError, SafetensorError) as fault:
        raise UserError(f"{file}: not a folded model: {fault}") from None
    return weights, described | Classes.read(described).stored()  # files of earlier versions lack the training counts


def unfolded_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a folded file under the names of ResLT and Experts. Values are not changed: branches whose
    BatchNorm is folded lack it, and a classifier contains what is folded into it."""

    def unfolded(name: str) -> str:
        expert, rest = re.fullmatch(r"(experts\.\d+\.)?(.*)", name, re.DOTALL).groups(default="")
        rest = re.sub(r"^model\.(?=backbone\.|branches\.|exits\.)", "", rest)  # of Fused, FoldedExits
        is_plain = not rest.startswith(("backbone.", "branches.", "shared.", "gates.", "exits."))
        return f"{expert}backbone.{rest}" if is_plain else f"{expert}{rest}"

    return {unfolded(name): tensor for name, tensor in weights.items()}

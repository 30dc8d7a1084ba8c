"""Matching of trained weights with a new model, and of the rows of its classifiers, class by class.

Trained weights and model have the names of `ResLT` (backbone, branches) or of `Experts` (shared, experts.0.backbone,
experts.0.branches, ...). A model consists of parts, and each is taken as a whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from reslt.core.errors import UserError
from reslt.core.text import shown
from reslt.models.exits import Exits
from reslt.models.experts import Experts, Network
from reslt.models.names import added_by, plain_names

PART = re.compile(r"((?:experts\.\d+\.)?(?:backbone|branches)|shared|router|projection)\.(.+)", re.DOTALL)

OF_THE_LAST_EPOCH = "projection.classes"  # of a contrastive loss: describes the classes of the other training


@dataclass
class Fitting:
    """The trained tensors that fit a model, under the model's names, and the parts that stay as initialized."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # in classifiers, unknown classes keep the new rows
    weights: int = 0  # number of fitting tensors in backbones and branches, without BatchNorm's counters
    new_weights: dict[str, int] = field(default_factory=dict)  # {new part: its number of tensors}
    classifiers: int = 0  # number of classifiers with the rows of the known classes
    new_classifiers: int = 0
    new_in_classifier: set[str] = field(default_factory=set)  # parameters that the trained one lacks, such as scales
    left_out: set[str] = field(default_factory=set)  # trained parts that the model lacks


def fitting(model: Network, trained: Mapping[str, torch.Tensor], model_class: np.ndarray | None) -> Fitting:
    """Match trained tensors with a model by names and shapes; nothing is loaded. The backbone must fit as a whole, or, with
    experts, the stages that they share. Both last blocks of BBN can be taken from the last block of another network.
    `trained` has the names of plain timm models (`plain_tensors`), whatever `--tune` adds to the model.

    `model_class`: the (C,) rows of the classes in the trained classifier, -1: none; None: unknown. The classifiers of
    several experts are taken only from experts: taken from one network, all of them would start, and remain, equal.

    Raises UserError, which names the first weight that does not fit."""
    own, plain, found = model.state_dict(), plain_names(model), Fitting()
    heads = {f"{place}.{name}" for place, backbone in _backbones(model) for name in classifier_names(backbone)}
    if isinstance(model, Exits):
        heads |= {f"exits.{i}" for i in range(len(model.exits))}
    parts: dict[str, dict[str, str]] = {}  # {part: {its tensor: the trained one}}
    for name in own:
        if not _is_within(name, heads | {OF_THE_LAST_EPOCH}):
            source = _source_of(name, trained)
            source = source if source in trained else _source_of(plain[name], trained)
            parts.setdefault(_part(name), {})[name] = source
    for part, sources in parts.items():
        fit = {name: trained[source] for name, source in sources.items() if _fits(own[name], trained.get(source))}
        needed = _weights_of(sources)
        if wrong := [name for name in needed if name not in fit]:
            if part in ("backbone", "shared"):
                raise UserError(_misfit(wrong, len(needed), own[wrong[0]], trained.get(sources[wrong[0]])))
            found.new_weights[part] = len(needed)
        else:
            found.weights += len(needed)
            found.tensors |= fit
    known = {known for sources in parts.values() for name in sources for known in (name, plain[name])}
    _require_no_surplus(known, heads, trained)
    experts, of_model = _experts(trained), _experts(own)
    if model_class is not None and (experts or not of_model):
        for head in sorted(heads):
            _fit_classifier(head, model.get_submodule(head), trained, model_class, found)
    found.new_classifiers = len(heads) - found.classifiers
    taken = {_kind(_part(source)) for sources in parts.values() for source in sources.values()}
    taken |= {_kind(_part(head)) for head in heads}
    found.left_out |= {_kind(_part(name)) for name in trained} - taken - {"backbone", "shared"}
    if experts > max(of_model, 1):
        found.left_out.add(f"{experts - max(of_model, 1)} of {experts} experts")
    return found


def classifier_names(backbone: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are a timm model's classifier: one, or two in a distilled model."""
    classifier = backbone.get_classifier()
    modules = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    return tuple(name for name, module in backbone.named_modules() if any(module is one for one in modules))


def _backbones(model: Network) -> list[tuple[str, nn.Module]]:
    """Return (name, backbone) of the networks that end in a classifier."""
    if isinstance(model, Experts):
        return [(f"experts.{e}.backbone", expert.backbone) for e, expert in enumerate(model.experts)]
    return [("backbone", model.backbone)]


def _split(name: str) -> tuple[str, str]:
    """Split a name into part and rest: experts.0.backbone.layer3.0.conv1.weight -> experts.0.backbone,
    layer3.0.conv1.weight."""
    part = PART.fullmatch(name)
    return part.groups() if part else tuple(name.split(".", 1)) if "." in name else (name, "")


def _part(name: str) -> str:
    """Return the part that a tensor belongs to: experts.0.backbone.layer3.0.conv1.weight -> experts.0.backbone. Low-rank
    updates and adapters are parts of their own, backbone.updates and backbone.adapters."""
    return ".".join(filter(None, (_split(name)[0], added_by(name))))


def _kind(part: str) -> str:
    """Return the kind of a part: experts.0.backbone -> backbone."""
    return part.rpartition(".")[2]


def _weights_of(names: Iterable[str]) -> list[str]:
    """Return the names of tensors except BatchNorm's counters, which are not used."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def _is_within(name: str, modules: set[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _experts(names: Iterable[str]) -> int:
    """Return the number of experts among tensors with these names; 0: one network."""
    return len({name.split(".")[1] for name in names if name.startswith("experts.")})


def _source_of(name: str, trained: Mapping[str, torch.Tensor]) -> str:
    """Return the name of the trained tensor for a model's tensor: the same name, or, between experts and one network, the
    network's name for any expert, and the name in the shared stages or in the first expert for the network."""
    part, rest = _split(name)
    kind = "backbone" if part == "shared" else _kind(part)
    others = [kind, f"experts.0.{kind}"] if part in (kind, "shared") else [kind]
    others += ["shared"] * (kind == "backbone")
    return next((other for place in (part, *others) if (other := f"{place}.{rest}") in trained), name)


def _fits(own: torch.Tensor, trained: torch.Tensor | None) -> bool:
    return trained is not None and trained.shape == own.shape


def _misfit(wrong: list[str], needed: int, own: torch.Tensor, trained: torch.Tensor | None) -> str:
    there = "is not in it" if trained is None else f"has shape {tuple(trained.shape)} there"
    return (
        f"{len(wrong)} of {needed} weights do not fit the model: {wrong[0]} {tuple(own.shape)} {there}; does it belong to "
        "another --model or --network?"
    )


def _require_no_surplus(names: set[str], heads: set[str], trained: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if trained backbones contain weights that no backbone of the model has: otherwise, a part of a deeper
    model would fit. `names`: the model's tensors outside its classifiers `heads`."""
    known, of_heads = {_split(name)[1] for name in names}, {_split(head)[1] for head in heads}
    surplus = [
        name
        for name in _weights_of(trained)
        if _kind(_part(name)) in ("backbone", "shared")
        and _split(name)[1] not in known
        and not _is_within(_split(name)[1], of_heads)
    ]
    if surplus:
        raise UserError(
            f"it contains {len(surplus)} weights that the model lacks, first {shown(surplus[0], 80)}; does it belong to "
            "another --model?"
        )


def _fit_classifier(
    head: str, module: nn.Module, trained: Mapping[str, torch.Tensor], model_class: np.ndarray, found: Fitting
) -> None:
    """Add the tensors of one classifier, unless a shape differs. Its parameters with a row per class, such as weight and
    bias, get the rows of the known classes; other tensors, such as statistics of the features, are taken whole."""
    known = torch.from_numpy(model_class >= 0)
    rows = torch.from_numpy(model_class[model_class >= 0]).long()
    own, parameters, taken = module.state_dict(), dict(module.named_parameters()), {}
    for name, tensor in own.items():
        source = trained.get(_source_of(f"{head}.{name}", trained))
        if source is None:
            continue
        if name in parameters and tensor.shape[:1] == known.shape:
            if source.ndim != tensor.ndim or source.shape[1:] != tensor.shape[1:] or (rows >= len(source)).any():
                return
            by_class = tensor.clone()
            by_class[known] = source[rows].to(tensor)
            source = by_class
        elif source.shape != tensor.shape:
            return
        taken[name] = source
    if len(rows) and taken.keys() & parameters.keys():
        found.tensors |= {f"{head}.{name}": tensor for name, tensor in taken.items()}
        found.classifiers += 1
        found.new_in_classifier |= parameters.keys() - taken.keys()
        inside = {name.removeprefix(f"{head}.") for name in trained if name.startswith(f"{head}.")}
        found.left_out |= {f"{name} of the classifier" for name in inside - own.keys()}

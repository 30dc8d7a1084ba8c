"""The choice of the part of the timm model that trains: `--tune`."""

from __future__ import annotations

import torch
from timm.data import resolve_model_data_config
from torch import nn

from reslt.config.schema import ModelSettings
from reslt.core.errors import UserError
from reslt.models.adapters import add_adapters
from reslt.models.bbn import BBN
from reslt.models.exits import Exits
from reslt.models.experts import Experts, Network
from reslt.models.lora import add_updates
from reslt.models.names import added_by, classifier_layers, timm_names
from reslt.models.reslt import ResLT
from reslt.models.router import Router


def add_parts(model: Network, settings: ModelSettings, num_classes: int, img_size: int | None) -> None:
    """Add the low-rank updates or adapters of `--tune` to a new network, in place, with weights from torch's global
    generator. The network's function does not change. `img_size`: pixels per side; None: the timm model's own.

    Raises UserError if the model has no layers for them."""
    if settings.tune not in ("lora", "adapter"):
        return
    size = img_size or resolve_model_data_config(model.backbone)["input_size"][-1]
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        if settings.tune == "lora":
            add_updates(model, settings.lora_rank, settings.lora_alpha, example)
        else:
            add_adapters(model.backbone, settings.adapter_dim, num_classes, example)
    except UserError:
        raise
    except Exception as fault:  # third-party models raise anything for an input that they do not accept
        name = type(model.backbone).__name__
        raise UserError(
            f"--tune {settings.tune}: {name} does not work with {size} x {size} pixel inputs: {fault}; see --img-size"
        ) from None


def tune(model: Network, settings: ModelSettings) -> None:
    """Let only the part of the timm model that `--tune` names require gradients, in place. Classifiers and branches always
    train, including those of all experts.

    BatchNorm's statistics still follow the images, as with `--freeze`, except with `--tune head` (see `held_modules`).
    Raises UserError if the model has no such part."""
    if settings.tune == "full":
        return
    parameters, of_timm = dict(model.named_parameters()), timm_names(model)
    of_classifiers = {parameter for layer in classifier_layers(model) for parameter in layer.parameters()}
    below = [name for name in of_timm if parameters[name] not in of_classifiers]
    trained = _trained(model, settings.tune) & set(below)
    if not trained and settings.tune == "norm":
        name = type(model.backbone).__name__
        raise UserError(f"--tune norm: {name} has no normalization layer with parameters; use --tune head or full")
    for name in below:
        parameters[name].requires_grad_(name in trained)


def _trained(model: Network, tune: str) -> set[str]:
    """Return the names of the parameters in the part that `--tune` names."""
    if tune == "norm":
        return {
            f"{place}.{name}"
            for place, module in model.named_modules()
            if is_norm(module)
            for name, _ in module.named_parameters(recurse=False)
        }
    return {name for name, _ in model.named_parameters() if added_by(name)}


def is_norm(module: nn.Module) -> bool:
    """Return whether a layer is a normalization, judged by the name of its class, which fits all of torch's and timm's."""
    return "norm" in type(module).__name__.lower()


def held_modules(model: Network, settings: ModelSettings) -> list[nn.Module]:
    """Return the modules that stay in evaluation mode in training: with `--tune head`, those of the timm models except their
    classifiers, so that BatchNorm's statistics are fixed and nothing is dropped."""
    if settings.tune != "head":
        return []
    own = [m for m in model.modules() if isinstance(m, (ResLT, BBN, Experts, Exits, Router))]
    trained = [*classifier_layers(model)]
    trained += [m.branches for m in own if isinstance(m, ResLT) and m.branches is not None]
    trained += [m for m in own if isinstance(m, Router)]
    trained += [gate for m in own if isinstance(m, Experts) for gate in m.gates]
    excluded = {*own, *(m for part in trained for m in part.modules())}
    return [m for m in model.modules() if m not in excluded]

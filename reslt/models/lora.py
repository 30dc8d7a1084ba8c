"""Low-rank updates of a network's layers (LoRA, Hu et al. 2022) with peft, and the plain weights after merging them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from reslt.core.errors import UserError
from reslt.core.log import logger
from reslt.models.adapters import Calls
from reslt.models.names import added_by, classifier_layers, plain_name, timm_names

KINDS = (nn.Linear, nn.Conv2d)


def add_updates(network: nn.Module, rank: int, alpha: float, example: torch.Tensor) -> None:
    """Add an update B A alpha / rank to the weight of every linear layer of the timm models except the classifier, in place.
    If a model has no such layer, as most convolutional models, every convolution without groups gets an update. B starts at
    0, so the network's function does not change.

    Layers that the model does not call because it reads their weights itself (BEiT's qkv) get no update, with a warning.
    `example`: (1, 3, H, W) images. Raises UserError if there is no layer to update."""
    from peft import LoraConfig, inject_adapter_in_model

    below, training = _layers_below_the_classifiers(network), network.training
    kind = next((kind for kind in KINDS if any(type(layer) is kind for layer in below.values())), None)
    if kind is None:
        raise UserError(
            f"--tune lora: {type(network.backbone).__name__} has neither linear layers nor convolutions without groups below "
            "its classifier; use --tune norm or full"
        )
    layers = {name: layer for name, layer in below.items() if type(layer) is kind}
    with torch.no_grad(), Calls(list(layers.values())) as seen:
        network.eval()(example)
    called = [name for name, layer in layers.items() if seen.of(layer)]
    if uncalled := [name for name in layers if name not in called]:
        logger.warning(
            f"--tune lora: {len(uncalled)} of {len(layers)} layers get no update because the model reads their weights "
            f"without calling them: {uncalled[0]}" + ", ..." * (len(uncalled) > 1)
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="|".join(map(re.escape, called)))
    inject_adapter_in_model(config, network)
    network.requires_grad_(True).train(training)  # peft freezes everything else


def _layers_below_the_classifiers(network: nn.Module) -> dict[str, nn.Module]:
    """Return {name: layer} for the layers of the timm models that can get an update."""
    names, heads = timm_names(network), {module for head in classifier_layers(network) for module in head.modules()}
    return {
        name: module
        for name, module in network.named_modules()
        if f"{name}.weight" in names and module not in heads and getattr(module, "groups", 1) == 1
    }


@torch.no_grad()
def merge_updates(network: nn.Module) -> bool:
    """Merge the updates into the weights that they belong to, in place. Return whether there were any."""
    wrapped = {name: module for name, module in network.named_modules() if hasattr(module, "get_base_layer")}
    for name, module in wrapped.items():
        module.merge()
        network.set_submodule(name, module.get_base_layer())
    return bool(wrapped)


def plain_tensors(tensors: Mapping[str, torch.Tensor], alpha: object = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a network under the names of plain timm models. Low-rank updates, with the LORA_ALPHA `alpha`,
    are merged into the weights; adapters keep their names. Raises UserError if updates are incomplete."""
    plain = {plain_name(name): tensor for name, tensor in tensors.items() if added_by(name) != "updates"}
    for name, down in tensors.items():
        layer, is_update, _ = name.partition(".lora_A.")
        if is_update:
            up, weight = tensors.get(name.replace(".lora_A.", ".lora_B.")), plain.get(f"{layer}.weight")
            try:
                update = (up.flatten(1) @ down.flatten(1)).view_as(weight) * (alpha / len(down))
            except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):
                raise UserError("its low-rank updates do not fit its weights; use another checkpoint") from None
            plain[f"{layer}.weight"] = weight + update.to(weight)
    return plain

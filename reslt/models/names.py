"""Names of a network's tensors as if its timm models were unchanged. Users' names and patterns refer to these."""

from __future__ import annotations

import re

from torch import nn

from reslt.models.bbn import BBN

OF_TIMM = re.compile(r"(?:shared|(?:experts\.\d+\.)?backbone)\.(.+)", re.DOTALL)
WRAPPED = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)|\.mlp\.base(?=\.)")  # by peft, by `reslt.models.adapters`
ADDED = re.compile(r"\.lora_(?P<updates>[AB])\.|\.mlp\.(?P<adapters>adapter)\.")


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return {name of a network's tensor: its name if the timm models were plain}. For BBN, branches.1.bn1.weight ->
    backbone.layer4.2.bn1.weight, likewise for experts. Tensors that a plain model lacks keep their names."""
    last = next((module.last_block for module in model.modules() if isinstance(module, BBN)), None)
    names = {name: plain_name(name) for name in model.state_dict()}
    if last is not None:
        names = {
            name: re.sub(r"\bbranches\.\d+\.", f"backbone.{last}.", plain, count=1) for name, plain in names.items()
        }
    return names


def plain_name(name: str) -> str:
    """Return the name that a tensor of a model with low-rank updates or adapters has in the model without them:
    blocks.0.attn.qkv.base_layer.weight -> blocks.0.attn.qkv.weight, blocks.0.mlp.base.norm2.bias -> blocks.0.norm2.bias"""
    return WRAPPED.sub("", name)


def added_by(name: str) -> str | None:
    """Return 'updates' or 'adapters' for a tensor that belongs to those, and that a plain model lacks; else None."""
    found = ADDED.search(name)
    return found and found.lastgroup


def timm_names(model: nn.Module) -> dict[str, str]:
    """Return {full name of each parameter of the timm models within a network: its name in the timm model}. Both last
    blocks of BBN have the names of the backbone's last block."""
    plain = plain_names(model)
    found = {name: OF_TIMM.fullmatch(plain[name]) for name, _ in model.named_parameters()}
    return {name: match[1] for name, match in found.items() if match}


def classifier_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are the classifiers of a network: one per expert or exit, or two in a distilled model."""
    found = model.classifiers
    return [layer for one in found for layer in (one if isinstance(one, (tuple, list)) else (one,))]

"""Files of pretrained weights, read into timm models."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from timm.models import load_state_dict
from torch import nn

from reslt.core.errors import UserError
from reslt.core.files import regular_file
from reslt.models.names import added_by, plain_name


def load_pretrained_file(backbone: nn.Module, file: str) -> None:
    """Load the weights of a file, as `read_weights` reads them, into a timm model. A classifier for other classes is left
    out.

    timm itself would ignore keys that do not match. Raises UserError if the file lacks a weight of the model, or has one
    that the model lacks."""
    own, of_classifier, wanted = backbone.state_dict(), _of_classifier(backbone), _below_the_classifier(backbone)
    state = read_weights(Path(file), backbone, "--pretrained-file")
    fit = _fitting(state, own)
    if missing := sorted(wanted - set(fit)):
        there = f"has shape {tuple(state[missing[0]].shape)} there" if missing[0] in state else "is not in it"
        raise UserError(
            f"--pretrained-file {file}: {len(missing)} of {len(wanted)} weights do not fit {type(backbone).__name__}: "
            f"{missing[0]} {tuple(own[missing[0]].shape)} {there}; does the file belong to another --model?"
        )
    if surplus := sorted(k for k in state if k not in own and not k.startswith(of_classifier)):
        raise UserError(
            f"--pretrained-file {file}: it contains {len(surplus)} weights that {type(backbone).__name__} lacks, first "
            f"{surplus[0]}; does the file belong to another --model?"
        )
    backbone.load_state_dict(fit, strict=False)


def read_weights(file: Path, backbone: nn.Module, flag: str) -> dict[str, torch.Tensor]:
    """Read the weights of a file (.safetensors, or .pth with weights_only) for a timm model. Its keys are timm's, which are
    torchvision's for ResNets and ResNeXts, or others that timm converts for the model's family; the conversion also adapts
    position embeddings of another input size.

    Raises UserError, which names `flag`, if the file cannot be read or converted."""
    own = {plain_name(name): tensor for name, tensor in backbone.state_dict().items()}
    wanted = _below_the_classifier(backbone)
    try:
        state = load_state_dict(regular_file(file), device="cpu", weights_only=True)
        convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        if convert is not None and not wanted <= set(_fitting(state, own)):
            state = convert(state, backbone)
        if strange := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(f"{str(strange[0])[:40]!r} is not a tensor")
    except Exception as fault:  # readers of weights, and conversions of another model's, raise anything
        raise UserError(f"{flag} {file}: {type(fault).__name__}: {fault}; give a file of weights") from None
    return state


def _of_classifier(backbone: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of the weights in a timm model's classifier."""
    names = backbone.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _below_the_classifier(backbone: nn.Module) -> set[str]:
    """Return the plain names of a timm model's weights outside its classifier, without BatchNorm's counters."""
    of_classifier = _of_classifier(backbone)
    names = {plain_name(k) for k in backbone.state_dict() if not added_by(k)}
    return {k for k in names if not k.startswith(of_classifier) and not k.endswith("num_batches_tracked")}


def _fitting(state: dict, own: dict) -> dict:
    return {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}

"""The frozen part of a network as a function that is computed once per image: `--tune head`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
import torch
from accelerate import Accelerator

from reslt.config.schema import ModelSettings
from reslt.config.stages import Stage
from reslt.loading.features import FrozenPart, why_views_change
from reslt.models.digest import weights_digest
from reslt.models.experts import Network
from reslt.models.reslt import ResLT

SAME = 1e-2  # of the largest logit: above the rounding of half precision, below the effect of an unknown layer


def frozen_part(
    model: Network, settings: ModelSettings, stages: Sequence[Stage], size: int, accelerator: Accelerator
) -> FrozenPart | None:
    """Return the frozen part of a network on its device, or the reason why its features cannot replace the images; None
    without `--tune head`. `size`: pixels a side of the input.

    The features depend on the image, the weights and the precision as they are now, also if the run resumes."""
    if settings.tune != "head":
        return None
    why_not = why_no_pooled_features(model, size) or why_views_change(
        (stage.config.augment, stage.config.method) for stage in stages
    )
    if why_not:
        return FrozenPart(lambda images: images, 0, "", "", why_not)

    @torch.inference_mode()
    def features(images: torch.Tensor) -> torch.Tensor:
        model.backbone.eval()  # each epoch of training sets the mode
        with accelerator.autocast():
            return model.pooled(images).float()

    described = f"{settings.model} {sorted(settings.model_kwargs.items())}"
    head = {id(tensor) for tensor in model.classifiers[0].state_dict(keep_vars=True).values()}
    below = {
        name: tensor.detach().cpu()
        for name, tensor in model.backbone.state_dict(keep_vars=True).items()
        if id(tensor) not in head
    }
    first = next(model.parameters())
    is_channels_last = any(tensor.ndim == 4 and not tensor.is_contiguous() for tensor in below.values())
    layout = "channels last" if is_channels_last else "contiguous"
    kind = (
        accelerator.device.type,
        accelerator.mixed_precision,
        first.dtype,
        layout,
        timm.__version__,
        torch.__version__,
    )
    return FrozenPart(features, model.classifiers[0].in_features, described, f"{weights_digest(below)} {kind}")


@torch.no_grad()
def why_no_pooled_features(model: Network, size: int) -> str:
    """Return the reason why a network's logits cannot be computed from pooled features; "" if they can."""
    if not isinstance(model, ResLT):
        return "the network has several last stages or exits (--experts, --network bbn or exits)"
    if model.branches is not None and {model.branch_at, model.eval_branch_at} != {"pooled"}:
        return "the branches are on the feature map (--branch-at pooled)"
    head, name = model.classifiers[0], type(model.backbone).__name__
    width = getattr(head, "in_features", None)
    if width is None:
        return f"{name} has no single linear classifier"
    model = copy.deepcopy(model).eval()
    for parameter in model.classifiers[0].parameters():  # zeros, as some models start with, would hide any difference
        torch.nn.init.normal_(parameter)
    image = torch.linspace(-2, 2, 3 * size * size, device=next(model.parameters()).device).view(1, 3, size, size)
    try:
        expected, pooled = model(image), model.pooled(image)
        if pooled.shape == (1, width) and not (model(pooled) - expected).abs().max() > SAME * expected.abs().max():
            return ""
    except Exception:  # a third-party head may raise anything if its input is not what it expects
        pass
    return f"the logits of {name} are not those of one classifier on pooled features"

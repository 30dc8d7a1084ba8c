"""Predictors: other predictions of a trained model, from the features that enter its classifier and from its logits.

A predictor requires no training code and does not change the model, so it applies to any finished run. The formulas are in
`normalized_rows` (tau), `NearestMean` (ncm), `DeconfoundedLinear` (tde), `class_prior` (prior_tau) and
`fused_branches` (fusion)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reslt.config.schema import MethodSettings
from reslt.core.errors import UserError
from reslt.loading.pipeline import SMALL  # not worth compiling for; the same bound as in `reslt.training.execution`
from reslt.methods.costs import class_prior
from reslt.models.branches import main_branch
from reslt.models.exits import Exits
from reslt.models.experts import Experts, Network
from reslt.models.heads import DeconfoundedLinear, ScaledLinear, normalized_rows
from reslt.models.router import Routed, is_routed

NEVER = -1e30  # score of a class without an image: below any other, and finite in a sum over branches
SAME = 1e-2  # of the largest logit: above rounding in half precision, and below the effect of an unknown layer


class NearestMean(nn.Module):
    """Nearest class mean (Kang et al. 2020): (K N, D) features of K branches -> (K N, C) scores, which are minus the squared
    distances to the class means of the branch; in float32, even under autocast."""

    def __init__(self, form: str, means: torch.Tensor, counts: torch.Tensor, center: torch.Tensor | None):
        """`form`, `center` (K, D): as for `transformed`; `means`: (K, C, D); `counts`: (C,) numbers of images in the
        means. A class without images is never predicted."""
        super().__init__()
        self.form, self.means, self.center = form, means, center
        self.offset = torch.where(counts > 0, -means.square().sum(-1), NEVER)[:, None]  # (K, 1, C)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            seen = transformed(features.unflatten(0, (len(self.means), -1)), self.form, self.center)
            scores = 2 * seen @ self.means.mT + self.offset - seen.square().sum(-1, keepdim=True)
        return scores.flatten(0, 1)


def transformed(features: torch.Tensor, form: str, center: torch.Tensor | None) -> torch.Tensor:
    """(..., K, N, D) features -> the same in float32, in the form that distances are taken of. raw: unchanged; l2: scaled to
    norm 1; cl2: minus `center`, the (..., K, D) mean of all training images, then scaled to norm 1."""
    features = features.float()
    if form == "cl2":
        features = features - center[..., None, :]
    return features if form == "raw" else F.normalize(features, dim=-1)


@dataclass(frozen=True)
class Predictor:
    """A way to predict with a trained model.

    `heads`: one per expert, (K N, D) features -> (K N, C) logits, in place of the model's classifiers; None: its own.
    `prior`: (C,), subtracted from the logits of every row of the table before classes are ranked. `flips`: whether
    logits are averaged over the image and its mirror image. `fusion`: how the branches become one prediction; None: by
    their sum."""

    heads: tuple[nn.Module, ...] | None = None
    prior: torch.Tensor | None = None
    flips: bool = False
    fusion: str | None = None


AS_TRAINED = Predictor()


def create_predictor(
    method: MethodSettings,
    model: Network,
    images_per_class: np.ndarray,
    nearest_means: Sequence[NearestMean] | None = None,
) -> Predictor:
    """Return the predictor of a method's settings for a model. `images_per_class`: (C,) training counts; `nearest_means`:
    for `ncm`, one per expert. Raises UserError if the model's classifier lacks what a setting requires."""
    heads, prior = None, class_prior(images_per_class, method.prior_tau or 0.0)
    if method.ncm is not None:
        heads = tuple(nearest_means)
    elif method.tau is not None:
        heads = tuple(normalized_rows(head, method.tau) for head in model.classifiers)
    elif method.tde is not None:
        heads = tuple(_with_alpha(head, method.tde) for head in model.classifiers)
    if prior is not None:
        prior = prior.to(next(model.parameters()).device)
    return Predictor(heads, prior, method.tta == "flip", method.fusion)


def _with_alpha(head: nn.Module, alpha: float) -> DeconfoundedLinear:
    """Return a head that shares its tensors with a deconfounded head and predicts the total direct effect. It is in
    evaluation mode even if the model is not yet: in training mode, it would add up the features that it sees."""
    if not isinstance(head, DeconfoundedLinear):
        raise UserError(
            f"--tde {alpha:g} requires a deconfounded head, and the model has a {type(head).__name__}; leave it out, or train "
            "with --head deconfounded"
        )
    shared = copy.copy(head).eval()
    shared.alpha = alpha
    return shared


class Predictions:
    """The branch logits of several predictors, from one pass of images through a model in evaluation mode (two passes
    if a predictor averages over mirror images). It is a context, in which the features that enter the classifiers are
    recorded."""

    def __init__(self, model: Network, predictors: Sequence[Predictor], keep_features: bool = False):
        """`keep_features`: record the features even if no predictor uses them, and keep those of the last images, not
        mirrored, in `features`: (K N, D) per expert."""
        self.model, self.predictors = model, predictors
        self.flips = any(predictor.flips for predictor in predictors)
        self.recorder = Features(model) if keep_features or any(p.heads for p in predictors) else None
        self.features: list[torch.Tensor] = []
        self.compiled_for: int | None = None  # images of a batch

    def __enter__(self) -> Predictions:
        if self.recorder:
            self.recorder.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.recorder:
            self.recorder.__exit__(*raised)

    def __call__(self, images: torch.Tensor, count: int | None = None) -> list[torch.Tensor | Routed]:
        """(M, 3, H, W) -> for each predictor, the (K, N, C) or (E, K, N, C) branch logits of the last N = `count` images
        (None: of all), and the router's logits if there is one; it sees the logits of the model as trained. The host waits
        for the device only at the first images."""
        views = [self._view(images, count), *([self._view(images.flip(-1), count)] if self.flips else [])]
        predicted, self.features = [], views[0][1]
        for predictor in self.predictors:
            seen = [_logits(predictor, *view) for view in views[: 1 + predictor.flips]]
            predicted.append(_mean(seen) if predictor.flips else seen[0])
        return predicted

    def _view(self, images: torch.Tensor, count: int | None) -> tuple[torch.Tensor | Routed, list[torch.Tensor]]:
        """Return the branch logits, with a router's logits if there is one, and the recorded (K N, D) features per
        expert."""
        if self.recorder:
            return self.recorder(images, count)
        if is_routed(self.model):
            return _of_last(self.model.route(images), count), []
        return _of_last((self.model if self._is_compiled_for(images) else self.model.forward)(images), count), []

    def _is_compiled_for(self, images: torch.Tensor) -> bool:
        """Return whether a model with torch.compile runs compiled for these images. For small images, and for a smaller
        batch at the end of a list, compiling takes longer than it saves."""
        self.compiled_for = self.compiled_for or len(images)
        return images.shape[-1] > SMALL and len(images) == self.compiled_for


def _of_last(logits: torch.Tensor | Routed, count: int | None) -> torch.Tensor | Routed:
    """Return the logits of the last `count` images; None: of all."""
    if isinstance(logits, Routed):
        return type(logits)(_of_last(logits.branch_logits, count), logits.asks[..., -(count or 0) :])
    return logits[..., -(count or 0) :, :]


def _mean(seen: Sequence[torch.Tensor | Routed]) -> torch.Tensor | Routed:
    """Return the mean over several views, in float32."""
    if isinstance(seen[0], Routed):
        return type(seen[0])(*(_mean(parts) for parts in zip(*seen, strict=True)))
    return torch.stack(list(seen)).float().mean(0)


def _logits(predictor: Predictor, logits: torch.Tensor | Routed, features: list[torch.Tensor]) -> torch.Tensor | Routed:
    if predictor.heads is None:
        return logits
    own = torch.stack([head(seen) for head, seen in zip(predictor.heads, features, strict=True)])
    if isinstance(logits, Routed):
        return logits._replace(branch_logits=own.view_as(logits.branch_logits))
    return own.view_as(logits)


class Features:
    """A context that records the features before a model's classifiers: images -> branch logits, with a router's logits if
    there is one, and the (K N, D) features per expert."""

    def __init__(self, model: Network):
        self.model, self.recorded, self.hooks, self.is_checked = model, [], [], False

    def __enter__(self) -> Features:
        self.hooks = [head.register_forward_pre_hook(self._record) for head in self.model.classifiers]
        return self

    def __exit__(self, *raised: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def __call__(
        self, images: torch.Tensor, count: int | None = None
    ) -> tuple[torch.Tensor | Routed, list[torch.Tensor]]:
        """Return the logits and features of the last `count` images; None: of all."""
        self.recorded.clear()
        forward = self.model.route if is_routed(self.model) else self.model.forward
        logits = forward(images)  # not compiled, because compiled code ignores new hooks
        features = list(self.recorded)
        if not self.is_checked:
            self._require_last_layer(logits.branch_logits if isinstance(logits, Routed) else logits, features)
            self.is_checked = True
        if count is not None and count < len(images):
            features = [seen.unflatten(0, (-1, len(images)))[:, -count:].flatten(0, 1) for seen in features]
        return _of_last(logits, count), features

    def _record(self, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.recorded.append(inputs[0])

    def _require_last_layer(self, branch_logits: torch.Tensor, features: list[torch.Tensor]) -> None:
        """Raise UserError unless the model's logits are those of its classifiers for these features: some timm models add
        other logits."""
        heads, rows = self.model.classifiers, branch_logits.shape[-3] * branch_logits.shape[-2]
        if len(features) == len(heads) and all(seen.ndim == 2 and len(seen) == rows for seen in features):
            own = torch.stack([head.forward(seen) for head, seen in zip(heads, features, strict=True)])
            difference = (own.view_as(branch_logits) - branch_logits).abs().max()
            if not difference > SAME * branch_logits.abs().max():  # non-finite logits pass, and are reported later
                return
        name = type(self.model.backbone).__name__
        raise UserError(
            f"--tau, --ncm, --tde and --features require a model whose logits are those of one classifier; {name} computes "
            "them from more; leave the flag out"
        )


def why_not_foldable(method: MethodSettings, model: Network) -> list[str]:
    """Return the parts of a prediction that `fold_predictor` cannot put into a model's classifiers, each with the reason."""
    reasons = []
    if method.prior_tau and method.ncm is None and not all(map(_has_bias, model.classifiers)):
        reasons.append(f"--prior-tau {method.prior_tau:g} (the classifier has no bias to subtract it from)")
    if method.ncm is not None:
        reasons.append(f"--ncm {method.ncm} (distances to class means are no linear classifier)")
    if method.tta is not None:
        reasons.append(f"--tta {method.tta} (it is a second pass)")
    if method.fusion not in (None, "main"):
        reasons.append(f"--fusion {method.fusion} (folded branches are added up)")
    if isinstance(model, Exits):
        changed = [
            name for name in ("tau", "prior_tau", "tde") if getattr(method, name) is not None and method.ncm is None
        ]
        reasons += [f"--{name.replace('_', '-')} (it would change which exit predicts)" for name in changed]
    elif is_routed(model):
        reasons.append(f"the router (each image would use all {model.used} experts)")
    return reasons


@torch.no_grad()
def fold_predictor(method: MethodSettings, model: Network, images_per_class: np.ndarray | None) -> None:
    """Change a model's classifiers so that its own fused logits are those of the method's predictor, exactly, except for the
    parts that `why_not_foldable` returns. A prior is subtracted from the biases: 1 / K of it, for each of K branches.
    Branches that the prediction does not use are removed. `images_per_class`: (C,) training counts, for a prior."""
    if method.fusion == "main":
        for network in model.experts if isinstance(model, Experts) else [model]:
            network.branches = main_branch(network.branches)
    if method.ncm is None and (method.tau is not None or method.tde is not None):
        _replace(model, create_predictor(replace(method, prior_tau=None), model, np.ones(1)).heads)
    if method.prior_tau and method.ncm is None and all(map(_has_bias, model.classifiers)):
        _replace(model, [head.folded() if isinstance(head, ScaledLinear) else head for head in model.classifiers])
        prior = class_prior(images_per_class, method.prior_tau) / model.logits_per_image[-1]
        for head in model.classifiers:
            head.bias.sub_(prior.to(head.bias))


def _replace(model: Network, heads: Sequence[nn.Module]) -> None:
    for old, new in zip(model.classifiers, heads, strict=True):
        if new is not old:
            name = next(name for name, module in model.named_modules() if module is old)
            model.set_submodule(name, new)


def _has_bias(head: nn.Module) -> bool:
    return isinstance(head, (nn.Linear, ScaledLinear)) and head.bias is not None

"""ResLT on any timm model: its backbone, K branches on its features, its head shared by all branches."""

from __future__ import annotations

import torch
from torch import nn

from reslt.models.branches import apply_branches
from reslt.models.contrastive import Projection, of_views
from reslt.models.featured import Featured


class ResLT(nn.Module):
    """A timm model with branches between its features and its head; without branches, the plain model with K = 1.

    `branch_at` 'map': branches on `forward_features`, then the model's whole head (pooling, norm, classifier) on each.
    'pooled': branches on the pooled features that enter the classifier, then the classifier on each.
    `eval_branch_at`: the place of the branches in evaluation mode. For `conv` branches another place is another function:
    the released large-scale code trains on the map and evaluates on the pooled features."""

    def __init__(
        self, backbone: nn.Module, branches: nn.Module | None, branch_at: str = "map", eval_branch_at: str | None = None
    ):
        super().__init__()
        self.backbone, self.branches = backbone, branches
        self.branch_at, self.eval_branch_at = branch_at, eval_branch_at or branch_at
        self.gives_features = False  # whether it returns features in training, for a loss that sees them
        self.projection: Projection | None = None  # for a loss that sees several views of an image

    @property
    def logits_per_image(self) -> tuple[int, ...]:
        """(K,)."""
        return (1 if self.branches is None else self.branches.branches,)

    @property
    def classifiers(self) -> list[nn.Module]:
        """The only classifier."""
        return [self.backbone.get_classifier()]

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalized images -> (N, D) pooled features, the input of pooled branches or of the classifier."""
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def forward(self, images: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor | Featured:
        """(N, 3, H, W) normalized images, or their (N, D) pooled features if no branch is on the map -> (K, N, C) branch
        logits. The prediction is their sum over K.

        In training with `gives_features`, the result includes the features. With a projection, the images are V views of N
        images, view by view, and the result is the logits of the first view and the embeddings of the others. `gate`: of an
        expert, a factor for the map."""
        if self.training and self.gives_features:
            if self.projection is not None:
                return of_views(self.projection, self.backbone.get_classifier(), self._classified(images))
            return Featured(*self.with_features(images, gate))
        features, is_pooled = self._branched(images, gate)
        logits = self.backbone.get_classifier()(features) if is_pooled else self.backbone.forward_head(features)
        return logits.unflatten(0, (*self.logits_per_image, -1))

    def with_features(
        self, images: torch.Tensor, gate: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the branch logits of `forward`, and the (N, D) features that enter the classifier, added over branches. The
        backbone's head must be pooling and one classifier, as in ResNets."""
        features = self._classified(images, gate)
        logits = self.backbone.get_classifier()(features.flatten(0, 1))
        return logits.unflatten(0, (*self.logits_per_image, -1)), features.sum(0)

    def _classified(self, images: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Return the (K, N, D) features that enter the classifier, for each branch."""
        features, is_pooled = self._branched(images, gate)
        pooled = features if is_pooled else self.backbone.forward_head(features, pre_logits=True)
        return pooled.unflatten(0, (*self.logits_per_image, -1))

    def _branched(self, images: torch.Tensor, gate: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
        """Return the features of K N images, branch by branch, in the backbone's layout, and whether they are pooled."""
        if images.ndim == 2:
            return (images if self.branches is None else apply_branches(self.branches, images, False)), True
        features = self.backbone.forward_features(images)
        if gate is not None:
            features = features * gate
        if self.branches is None:
            return features, False
        if (self.branch_at if self.training else self.eval_branch_at) == "map":
            return apply_branches(self.branches, features, is_channels_last(self.backbone)), False
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return apply_branches(self.branches, pooled, False), True


def is_channels_last(backbone: nn.Module) -> bool:
    """Return whether a 4-d feature map is (N, H, W, D), as in Swin."""
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"

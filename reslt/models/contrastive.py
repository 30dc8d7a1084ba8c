"""A projection head for contrastive losses, with a distribution for each class. Only training uses these parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from reslt.models.featured import Featured

HIDDEN, WIDTH = 512, 128  # widths of the projection's hidden layer and of its embeddings
LARGEST_CONCENTRATION = 1e5


class ClassDirections(nn.Module):
    """A von Mises-Fisher distribution of the embeddings of each class, estimated during training (ProCo, Du et al. 2024).

    There are two sets of sums of unit vectors: the set in use, from the last epoch and still updated, and the set collected
    in this epoch. They are buffers, so they are part of checkpoints, and every process has the sums over the global
    batches. Without `track_running_stats`, they do not change."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.track_running_stats = True
        for name in ("used", "collected"):
            self.register_buffer(f"{name}_sums", torch.zeros(classes, width))
            self.register_buffer(f"{name}_counts", torch.zeros(classes))

    @torch.no_grad()
    def begin_epoch(self) -> None:
        """Use the sums that the last epoch collected, except for classes without an image in it, and begin to collect again.
        Called before the first step of an epoch."""
        is_seen = self.collected_counts > 0
        self.used_sums.copy_(torch.where(is_seen[:, None], self.collected_sums, self.used_sums))
        self.used_counts.copy_(torch.where(is_seen, self.collected_counts, self.used_counts))
        self.collected_sums.zero_()
        self.collected_counts.zero_()

    @torch.no_grad()
    def observe(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Add (M, P) unit vectors with (M,) labels to both sets."""
        if not self.track_running_stats:
            return
        classes = torch.arange(len(self.used_counts), device=labels.device)
        members = (labels == classes[:, None]).to(embeddings.dtype)  # (C, M); a product has a fixed order of sums
        sums, counts = members @ embeddings, members.sum(1)
        for name in ("used", "collected"):
            self.get_buffer(f"{name}_sums").add_(sums)
            self.get_buffer(f"{name}_counts").add_(counts)

    @torch.no_grad()
    def estimates(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (C, P) mean directions and (C,) concentrations kappa = P R / (1 - R^2), at most LARGEST_CONCENTRATION,
        where R is the length of the mean of unit vectors. A class without images so far is uniform on the sphere, with
        kappa 0."""
        means = self.used_sums.to(dtype) / self.used_counts.to(dtype).clamp(min=1)[:, None]
        lengths = means.norm(dim=1).clamp(max=1)
        kappas = means.shape[1] * lengths / (1 - lengths.square()).clamp(min=1e-12)
        return F.normalize(means, dim=1), kappas.clamp(max=LARGEST_CONCENTRATION)


class Projection(nn.Module):
    """Two layers with BatchNorm between them: (N, D) features -> (N, WIDTH) embeddings, unit vectors in float32 at least.

    In training, a network with a projection sees `views` views of each image."""

    def __init__(self, width: int, classes: int, views: int):
        super().__init__()
        self.views = views
        self.hidden, self.norm, self.out = nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.classes = ClassDirections(classes, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        embeddings = self.out(F.relu(self.norm(self.hidden(features))))
        return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)


def of_views(projection: Projection, classifier: nn.Module, features: torch.Tensor) -> Featured:
    """(K, V N, D) features of V views of N images, view by view -> (K, N, C) branch logits of the first view and
    ((V - 1) N, WIDTH) embeddings of the other views. The projection's BatchNorm sees all views."""
    images = features.shape[1] // projection.views
    logits = classifier(features[:, :images].flatten(0, 1))
    return Featured(logits.unflatten(0, (-1, images)), projection(features.sum(0))[images:])

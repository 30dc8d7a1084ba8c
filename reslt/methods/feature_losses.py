"""Losses of features: of pairs of images, of the classes in a batch, of class centroids.

Each is a function of the whole global batch, (N, D) features in full precision and (N,) labels -> scalar (see
`reslt.methods.losses.LossWithFeatures`). All are matrix operations of fixed shape, without a loop over images or classes,
and without a value that the host would have to wait for."""

from __future__ import annotations

import torch
from torch import nn

ABSENT = -1e30  # logarithm of an empty sum: below any other, and with a finite gradient
TINY = 1e-12  # smallest squared distance that is divided by


class LiftedStructured(nn.Module):
    """The lifted structured loss (Song et al. 2016). With the Euclidean distances D_ij and the pairs P of the same class,

        J_ij = log(sum_{k: y_k != y_i} e^(a - D_ik) + sum_{l: y_l != y_j} e^(a - D_jl)) + D_ij
        L = 1 / (2 |P|) sum_{(i, j) in P} max(0, J_ij)^2

    It is 0 for a batch without such a pair, and for one class alone, which has no negatives."""

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        same, distances = _same_class(labels), _distances(features)
        negatives = (self.margin - distances).masked_fill(same, ABSENT).logsumexp(1)  # (N,)
        lifted = torch.logaddexp(negatives[:, None], negatives[None]) + distances
        pairs = same.triu(1)
        return (lifted.relu().square() * pairs).sum() / (2 * pairs.sum().clamp(min=1))


class Range(nn.Module):
    """Range loss (Zhang et al. 2017): alpha L_intra + beta L_inter. L_intra sums, over the classes in the batch, the
    harmonic mean of the k largest squared distances between two images of the class (of all distances if there are
    fewer). L_inter is max(0, m - d), where d is the smallest squared distance between the mean features of two classes
    in the batch.

    A class with one image adds nothing to L_intra; for one class alone, L_inter is 0."""

    def __init__(self, alpha: float, beta: float, margin: float, largest: int):
        """`largest`: k."""
        super().__init__()
        self.alpha, self.beta, self.margin, self.largest = alpha, beta, margin, largest

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        same = _same_class(labels)
        return self.alpha * self._within(features, same) + self.beta * self._between(features, same)

    def _within(self, features: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """Return L_intra. Pairs are sorted by class, and within a class by distance, so that the k largest are adjacent."""
        number = len(features)
        first, second = torch.triu_indices(number, number, 1, device=features.device)
        squared = _distances(features).square()[first, second]  # (P,)
        # A class is numbered by its first image in the batch; pairs of two classes have number N and come last
        of_class = torch.where(same[first, second], same.int().argmax(1)[first], number)
        by_distance = squared.detach().argsort(descending=True)
        order = by_distance[of_class[by_distance].argsort(stable=True)]
        squared, of_class = squared[order], of_class[order]
        classes = torch.arange(number, device=features.device)
        begin = torch.searchsorted(of_class, classes)  # (N,) the first pair of each class
        taken = begin[:, None] + torch.arange(self.largest, device=features.device)
        within = taken.clamp(max=len(squared) - 1)
        counted = (taken == within) & (of_class[within] == classes[:, None])  # (N, k)
        inverse = counted / squared[within].clamp(min=TINY)
        return (counted.sum(1) / inverse.sum(1).clamp(min=TINY)).sum()

    def _between(self, features: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """Return L_inter."""
        members = same.to(features.dtype)
        centers = members @ features / members.sum(1, keepdim=True)  # (N, D), for each image's class
        closest = _distances(centers).square().masked_fill(same, torch.inf).amin()
        return (self.margin - closest).relu()


class CentroidLoss(nn.Module):
    """The loss of OLTR's features (Liu et al. 2019, in its released code). With class centroids M (C, D),

        mean_i |f_i - M_{y_i}|^2 / 2 + 0.01 max(0, 10 - 1 / (N C) sum_i sum_{c != y_i} |f_i - M_c|^2)

    For M_c, the gradient of the first term is sum_i (M_c - f_i) / ((1 + n_c) N) over the n_c images of class c; the loss's
    weight does not multiply it."""

    REPULSION, MARGIN = 0.01, 10.0

    def __init__(self, centroids: nn.Parameter, weight: float):
        """`centroids`: of the network's head, with which they are trained and stored; `weight`: of this loss."""
        super().__init__()
        self.of_head, self.weight = [centroids], weight  # in a list: not a parameter of the loss

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        centroids, number = self.of_head[0], len(features)
        own = centroids[labels]
        to_own = (features - own.detach()).square().sum()
        images = _same_class(labels).sum(1, keepdim=True)  # (N, 1), in each image's class
        moving = ((features.detach() - own).square() / (1 + images)).sum() / (2 * number * self.weight)
        # sum_i sum_c |f_i - M_c|^2, without the N C D differences
        to_all = len(centroids) * features.square().sum() - 2 * features.sum(0) @ centroids.sum(0)
        to_all = to_all + number * centroids.square().sum()
        to_others = (to_all - (features - own).square().sum()) / (number * len(centroids))
        repulsion = (self.MARGIN - to_others).relu()
        return to_own / (2 * number) + self.REPULSION * repulsion + (moving - moving.detach())


def _same_class(labels: torch.Tensor) -> torch.Tensor:
    """(N,) labels -> (N, N) bool: whether two images are of the same class."""
    return labels[:, None] == labels


def _distances(features: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N, N) Euclidean distances, exact even between close points; a distance of 0 has the gradient 0."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")

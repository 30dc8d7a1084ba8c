"""The losses of the named methods, whose settings are in `reslt.config.methods`."""

from __future__ import annotations

import numpy as np
from torch import nn

from reslt.config.schema import MethodSettings
from reslt.data.groups import branch_sets
from reslt.methods.costs import CrossEntropy, class_prior
from reslt.methods.losses import ExpertsLoss, FusionLoss, ResLTLoss


def create_cost(method: MethodSettings, images_per_class: np.ndarray) -> nn.Module:
    """Return the cost of a method, (..., C) logits -> (..., C) costs; (C,) training counts determine its prior."""
    return CrossEntropy(method.smoothing, class_prior(images_per_class, method.logit_adjust))


def create_loss(method: MethodSettings, images_per_class: np.ndarray, experts: int = 1) -> nn.Module:
    """Return the loss of a method; (C,) training counts determine the nested class sets and the prior."""
    cost = create_cost(method, images_per_class)
    if method.has_branches:
        sets = branch_sets(images_per_class, method.branches, method.branch_sizes)
        loss = ResLTLoss(sets, method.alpha, method.branch_loss, cost)
    else:
        loss = FusionLoss(cost)
    return ExpertsLoss(loss) if experts > 1 else loss

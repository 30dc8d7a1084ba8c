"""The networks and the loss compute what the authors' released code computes, in float64, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from builders import predicted
from torch import nn

from tests.parity.authors import SETTINGS, AuthorsNetwork

TOLERANCE = 1e-12  # relative


@dataclass(frozen=True)
class Passes:
    """This suite's network, and its results: evaluation with fresh statistics, then one training pass and its gradients."""

    model: nn.Module
    evaluation_logits: torch.Tensor  # (E or 1, K, N, C)
    training_logits: torch.Tensor  # (E or 1, K, N, C)
    loss: float
    gradients: dict[str, torch.Tensor]  # under the authors' keys


@pytest.fixture(scope="module", params=SETTINGS)
def authors(request) -> AuthorsNetwork:
    return AuthorsNetwork.read(request.param)


@pytest.fixture(scope="module")
def passes(authors) -> Passes:
    model, images = authors.own_network(), authors.images()
    evaluation_logits = predicted(model, images, tau=authors.tau)
    training_logits = model.train()(images)
    loss = authors.own_loss()(training_logits, authors.labels())
    loss.backward()
    gradients = authors.by_their_keys({name: p.grad for name, p in model.named_parameters()})
    return Passes(model, of_experts(evaluation_logits), of_experts(training_logits.detach()), loss.item(), gradients)


def of_experts(logits: torch.Tensor) -> torch.Tensor:
    """(K, N, C) or (E, K, N, C) -> (1 or E, K, N, C)"""
    return logits if logits.ndim == 4 else logits[None]


def relative_difference(ours, theirs: np.ndarray, scale: np.ndarray | None = None) -> float:
    """Return the largest difference, relative to the largest reference; with `scale`, relative to it entry by entry."""
    difference = np.abs(np.asarray(ours) - theirs)
    return float((difference / (np.abs(theirs).max() if scale is None else scale)).max())


def logits_difference(ours: torch.Tensor, authors: AuthorsNetwork, array: str) -> float:
    theirs = authors.figures[array][:, : authors.branches_used]
    return relative_difference(ours[..., :: int(authors.figures["column_stride"])], theirs)


def test_training_logits_equal_the_authors(authors, passes):
    assert logits_difference(passes.training_logits, authors, "train_logits") <= TOLERANCE


def test_evaluation_logits_equal_those_of_the_authors_evaluation(authors, passes):
    """Large networks: pooled before the branches, classifier rows scaled by norm^-tau, no bias."""
    assert logits_difference(passes.evaluation_logits, authors, "eval_logits") <= TOLERANCE


def test_the_loss_equals_the_authors(authors, passes):
    assert relative_difference(passes.loss, authors.figures["loss"]) <= TOLERANCE


def test_the_gradient_of_every_parameter_equals_the_authors(authors, passes):
    """Norm and sum per parameter, both relative to that parameter's norm. The unused branch of iNaturalist has no
    gradient, so it adds nothing to either."""
    keys, norms = authors.figures["gradient_keys"].tolist(), authors.figures["gradient_norms"]
    assert set(keys) == set(passes.gradients)
    gradients = [passes.gradients[key] for key in keys]
    assert relative_difference([g.norm() for g in gradients], norms, scale=norms) <= TOLERANCE
    sums = authors.figures["gradient_sums"]
    assert relative_difference([g.sum() for g in gradients], sums, scale=norms) <= TOLERANCE


@torch.no_grad()
def test_batchnorm_statistics_after_a_training_pass_equal_the_authors(authors, passes):
    """Sum over channels per statistic, relative to its norm. The sums of iNaturalist include the branch that is not used,
    so there a network that also has it makes the pass."""
    model = passes.model
    if authors.branches > authors.branches_used:
        model = authors.own_network(branches=authors.branches, branch_sizes=None).train()
        model(authors.images())
    own = authors.by_their_keys({name: buffer for name, buffer in model.named_buffers() if "running" in name})
    keys = authors.figures["running_keys"].tolist()
    assert set(keys) == set(own)
    statistics = [own[key] for key in keys]
    sums, norms = [s.sum() for s in statistics], np.array([s.norm() for s in statistics])
    assert relative_difference(sums, authors.figures["running_sums"], scale=norms) <= TOLERANCE

"""Probabilistic contrastive learning (ProCo, Du et al. 2024): an embedding is contrasted with the distributions of all
classes, not with the embeddings of other images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from reslt.models.contrastive import ClassDirections

LARGE_ORDER = 32  # of a Bessel function; from this order on, the expansion in 1 / order is exact to 1e-9


class ProCo(nn.Module):
    """Cross-entropy of contrast logits (Du et al. 2024). For an embedding v and a class c with the concentration kappa_c and
    the mean direction mu_c, the logit is

        log pi_c + log C(kappa_c) - log C(|kappa_c mu_c + v / temperature|),

    where C is the normalizer of the von Mises-Fisher distribution. Without log pi_c, this is the logarithm of the
    expectation of exp(v.u / temperature) over u of the class, as if the batch contained infinitely many of its images. The
    estimates include the embeddings of all views of the step; no gradient flows through the estimates."""

    def __init__(self, classes: ClassDirections, log_frequencies: torch.Tensor, temperature: float = 0.1):
        """`log_frequencies`: (C,) log pi, of the training images."""
        super().__init__()
        self.classes, self.temperature = classes, temperature
        self.register_buffer("log_frequencies", log_frequencies, persistent=False)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(M, P) unit vectors, (M,) labels -> scalar; updates the estimates."""
        # A concentration has up to six digits before the point, so float32 is too coarse; Apple's GPUs lack float64
        dtype = torch.float32 if embeddings.device.type == "mps" else torch.float64
        precise = embeddings.to(dtype)
        self.classes.observe(precise.detach(), labels)
        logits = self.contrast(precise) + self.log_frequencies.to(dtype)
        return F.cross_entropy(logits, labels).to(embeddings.dtype)

    def contrast(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(M, P) unit vectors -> (M, C) log expectations of exp(v.u / temperature) over each class."""
        directions, kappas = self.classes.estimates(embeddings.dtype)
        order, sharpness = embeddings.shape[1] / 2 - 1, 1 / self.temperature
        # |kappa mu + v / temperature|^2
        squares = kappas.square() + 2 * sharpness * kappas * (embeddings @ directions.T) + sharpness**2
        return log_bessel(order, squares.clamp(min=0)) - log_bessel(order, kappas.square())


def log_bessel(order: float, squares: torch.Tensor) -> torch.Tensor:
    """(...) x^2 >= 0 -> log(I_order(x) / x^order), for any order above -1. Up to a constant, this is minus the logarithm of
    the normalizer of the von Mises-Fisher distribution in 2 order + 2 dimensions. Its derivative in x is the ratio
    I_{order+1} / I_order, below 1. Small orders are reached from two large orders by I_{m-1}(x) = (2 m / x) I_m(x) +
    I_{m+1}(x), in which all terms are positive."""
    steps = max(math.ceil(LARGE_ORDER - order), 0)
    value = _log_bessel_of_large_order(order + steps, squares)
    if steps:
        above = _log_bessel_of_large_order(order + steps + 1, squares)
        for step in range(steps):
            factor = 2 * (order + steps - step) + squares * (above - value).exp()
            value, above = value + factor.log(), value
    return value


def _log_bessel_of_large_order(order: float, squares: torch.Tensor) -> torch.Tensor:
    """Compute `log_bessel` by the uniform expansion for large orders (Abramowitz and Stegun, 9.7.7, 9.3.9)."""
    root = (1 + squares / order**2).sqrt()
    t = 1 / root
    s = t * t
    terms = (  # u_1 to u_4
        t * (3 - 5 * s) / 24,
        s * (81 + s * (-462 + 385 * s)) / 1152,
        s * t * (30375 + s * (-369603 + s * (765765 - 425425 * s))) / 414720,
        s * s * (4465125 + s * (-94121676 + s * (349922430 + s * (-446185740 + 185910725 * s)))) / 39813120,
    )
    series = sum(term / order**power for power, term in enumerate(terms, 1))
    constant = order * math.log(order) + 0.5 * math.log(2 * math.pi * order)
    return order * (root - root.log1p()) - 0.5 * root.log() + series.log1p() - constant

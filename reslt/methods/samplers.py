"""Orders of training images that change the frequencies of the classes; pure functions of (seed, epoch).

An epoch keeps its length: it has as many draws as there are images. Draws are with replacement, except in the instance
order, which is the loader's. No order loops over classes or images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reslt.core.seeding import derive_seed
from reslt.methods.class_weights import effective_numbers

DRAWS = -2  # seeds the draws of an epoch; the seeds of samples count from 0


class Shuffled:
    """An order with every image once, like the loader's own, for the second images of pairs."""

    def __init__(self, images: int):
        self.images = images

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the (N,) positions of the images of an epoch."""
        return _generator(seed, epoch).permutation(self.images)


class ClassSampler:
    """An order in which each draw is a class from a distribution, then one of its images, uniformly."""

    def __init__(self, labels: np.ndarray, num_classes: int, distribution: Callable[[np.ndarray, int], np.ndarray]):
        """`labels`: (N,) of the images to order; `distribution`: (C,) counts of these images, epoch -> (C,) weights of the
        classes, of any sum. A class without images is never drawn."""
        self.by_class = np.argsort(labels, kind="stable")  # positions of images, class by class
        self.counts = np.bincount(labels, minlength=num_classes)
        self.first = np.cumsum(self.counts) - self.counts  # of each class, in `by_class`
        self.distribution = distribution

    def probabilities(self, epoch: int) -> np.ndarray:
        """Return the (C,) probabilities of the classes in an epoch, counted from 0."""
        weights = np.where(self.counts > 0, self.distribution(self.counts, epoch), 0.0)
        return weights / weights.sum()

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the (N,) positions of the images of an epoch."""
        generator = _generator(seed, epoch)
        classes, within = generator.random((2, len(self.by_class)))
        cumulative = np.cumsum(self.probabilities(epoch))
        present = np.flatnonzero(self.counts)
        drawn = np.searchsorted(cumulative, classes * cumulative[-1], side="right")
        drawn = np.minimum(drawn, present[-1])  # in case the product rounds up to the last sum
        return self.by_class[self.first[drawn] + (within * self.counts[drawn]).astype(np.int64)]


class FourInARow:
    """An order that cycles through shuffled classes with four images of each in a row, like the class-aware sampler of the
    released cRT and LWS. A class's images are shuffled again when all were seen, so a class of fewer than four repeats
    some."""

    IN_A_ROW = 4

    def __init__(self, labels: np.ndarray, num_classes: int):
        """`labels`: (N,) of the images to order."""
        self.by_class = np.argsort(labels, kind="stable")
        self.counts = np.bincount(labels, minlength=num_classes)
        self.first = np.cumsum(self.counts) - self.counts
        self.present = np.flatnonzero(self.counts)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the (N,) positions of the images of an epoch."""
        generator, images = _generator(seed, epoch), len(self.by_class)
        visits = -(-images // self.IN_A_ROW)
        cycles = -(-visits // len(self.present))
        shuffled = generator.permuted(np.tile(self.present, (cycles, 1)), axis=1).ravel()[:visits]
        # The images of each class, shuffled as often as its visits require: (class, round, random) in ascending order
        drawn = np.bincount(shuffled, minlength=len(self.counts)) * self.IN_A_ROW
        rounds = -(-drawn // np.maximum(self.counts, 1))
        sizes = rounds * self.counts
        starts = np.cumsum(sizes) - sizes
        classes = np.repeat(np.arange(len(sizes)), sizes)
        within = np.arange(len(classes)) - starts[classes]
        turn, image = np.divmod(within, self.counts[classes])
        queue = (self.first[classes] + image)[np.lexsort((generator.random(len(classes)), turn, classes))]
        # Each visit of a class takes the next four images of its queue
        by_visit = np.argsort(shuffled, kind="stable")
        before = np.empty(visits, np.int64)
        of_class = np.bincount(shuffled, minlength=len(self.counts))
        before[by_visit] = np.arange(visits) - np.repeat(np.cumsum(of_class) - of_class, of_class)
        places = starts[shuffled] + before * self.IN_A_ROW
        return self.by_class[queue[(places[:, None] + np.arange(self.IN_A_ROW)).ravel()[:images]]]


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, epoch, DRAWS)))


def balanced(counts: np.ndarray, epoch: int) -> np.ndarray:
    """Weigh every class equally."""
    return np.ones(len(counts))


def square_root(counts: np.ndarray, epoch: int) -> np.ndarray:
    """Weigh classes in proportion to sqrt(n_c)."""
    return np.sqrt(counts)


def inverse(counts: np.ndarray, epoch: int) -> np.ndarray:
    """Weigh classes in proportion to 1 / n_c: BBN's reversed sampler."""
    return 1 / np.maximum(counts, 1)


def effective(beta: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """Weigh each image in proportion to 1 / effective number of its class (Cui et al. 2019), and thus the class by n_c times
    that."""
    return lambda counts, epoch: counts / effective_numbers(np.maximum(counts, 1), beta)


def progressive(begin: int, epochs: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Weigh classes by (1 - t) n_c / N + t / C, with t from 0 in epoch `begin` to 1 in the last of `epochs` (Kang et al.
    2020)."""

    def mixture(counts: np.ndarray, epoch: int) -> np.ndarray:
        t = (epoch - begin) / max(epochs - 1, 1)
        return (1 - t) * counts / counts.sum() + t / np.count_nonzero(counts)

    return mixture

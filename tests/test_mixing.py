"""Mixup and CutMix: timm's draws as a function of (seed, step), in one process or several."""

import math

import numpy as np
import pytest
import torch
from builders import mixing_of
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from reslt.augment.mixing import Mixing, draw_boxes
from reslt.config.schema import Config
from reslt.core.batch_shard import paired_slice
from reslt.core.seeding import derive_seed
from reslt.methods.losses import FusionLoss, ResLTLoss

CLASSES = 5
MODES = ["batch", "pair", "elem"]
KINDS = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.4, "mixup_prob": 0.7}]


def mixing(seed: int = 3, **changes) -> Mixing:
    return Mixing(Config.of(**changes).augment, CLASSES, seed)


def mix(
    mixer: Mixing, images: torch.Tensor, labels: torch.Tensor, step: int, part: int = 0, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix part `part` of `parts`, a `paired_slice` of the global batch, as a training step does -> images, soft targets."""
    batch_size = len(images) * parts
    drawn = mixer.draw(step, batch_size, *images.shape[-2:])[paired_slice(batch_size, part, parts)].to(images.device)
    return mixer.mixed(images, drawn), mixer.targets(labels, drawn)


def batch(images: int, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, side, side, generator=generator), torch.arange(images) % CLASSES


@pytest.mark.parametrize("kind", KINDS, ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_mixed_as_by_timm_with_the_steps_seed(mode, kind):
    ours = mixing(mixup_mode=mode, **kind)
    theirs = Mixup(
        mixup_alpha=kind.get("mixup", 0),
        cutmix_alpha=kind.get("cutmix", 0),
        prob=kind.get("mixup_prob", 1.0),
        switch_prob=kind.get("mixup_switch_prob", 0.5),
        mode=mode,
        label_smoothing=0,
        num_classes=CLASSES,
    )
    images, labels = batch(6)
    for step in range(20):
        np.random.seed(derive_seed(3, step) & 0xFFFFFFFF)
        wanted_images, wanted_targets = theirs(images.clone(), labels)
        mixed, targets = mix(ours, images, labels, step)
        torch.testing.assert_close(mixed, wanted_images, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(targets, wanted_targets, rtol=1e-5, atol=1e-6)


def test_mixing_depends_only_on_seed_and_step():
    images, labels = batch(6)

    def mixed(seed, step, before):
        np.random.seed(before)
        torch.manual_seed(before)
        return mix(mixing(seed, mixup=0.4), images, labels, step)[0]

    assert torch.equal(mixed(1, 7, before=0), mixed(1, 7, before=5))
    assert not torch.equal(mixed(1, 7, before=0), mixed(1, 8, before=0))
    assert not torch.equal(mixed(1, 7, before=0), mixed(2, 7, before=0))


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_mix_a_batch_as_one_process_does(mode, kind, processes):
    """Each process takes its slice of the global batch; put back in place, the slices are the batch that one process
    mixes."""
    mixer, (images, labels) = mixing(mixup_mode=mode, **kind), batch(12)
    for step in range(5):
        wanted_images, wanted_targets = mix(mixer, images, labels, step)
        got_images, got_targets = torch.full_like(images, math.nan), torch.full_like(wanted_targets, math.nan)
        for rank in range(processes):
            own = paired_slice(12, rank, processes)
            assert len(own) == 12 // processes
            got_images[own], got_targets[own] = mix(mixer, images[own], labels[own], step, rank, processes)
        assert torch.equal(got_images, wanted_images)
        assert torch.equal(got_targets, wanted_targets)


def test_a_batch_that_cannot_be_divided_into_whole_pairs_is_refused():
    with pytest.raises(ValueError, match="6 images cannot be divided into 2 parts of whole pairs"):
        paired_slice(6, 0, 2)


@pytest.mark.parametrize("mode", MODES)
def test_the_middle_image_of_an_odd_batch_is_not_mixed(mode):
    images, labels = batch(5)
    for step in range(10):
        mixed, targets = mix(mixing(mixup=0.8, cutmix=1.0, mixup_mode=mode), images, labels, step)
        torch.testing.assert_close(mixed[2], images[2])
        torch.testing.assert_close(targets[2], torch.eye(CLASSES)[labels[2]])
        torch.testing.assert_close(targets.sum(1), torch.ones(5))
        assert not torch.allclose(mixed[0], images[0])


def test_a_lambda_of_one_does_not_mix():
    """Images are bit-equal and targets one-hot, so every loss is that of the labels."""
    images, labels = batch(6)
    for mode in MODES:
        mixed, targets = mix(mixing(mixup=0.4, cutmix=1.0, mixup_prob=1e-12, mixup_mode=mode), images, labels, 0)
        assert torch.equal(mixed, images)
        assert torch.equal(targets, torch.eye(CLASSES)[labels])
    logits = torch.randn(3, 6, CLASSES, generator=torch.Generator().manual_seed(1))
    sets = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=bool)
    for loss in (ResLTLoss(sets, 0.7), ResLTLoss(sets, 0.7, "mean", smoothing=0.1), FusionLoss(smoothing=0.1)):
        torch.testing.assert_close(loss(logits, targets), loss(logits, labels))


@pytest.mark.parametrize("mode", MODES)
def test_the_lambda_of_cutmix_is_the_area_that_remains(mode):
    """Image i is filled with the value i, so a pixel that differs was pasted from image 5 - i."""
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 10, 12)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])[torch.arange(6)]
    for step in range(20):
        mixed, targets = mix(mixing(cutmix=1.0, mixup_mode=mode), images, labels, step)
        for i in range(6):
            pasted = (mixed[i] == 5 - i).float().mean()
            kept = (mixed[i] == i).float().mean()
            assert kept + pasted == pytest.approx(1)
            by_class = torch.zeros(CLASSES)
            by_class[labels[i]] += kept
            by_class[labels[5 - i]] += pasted
            torch.testing.assert_close(targets[i], by_class)


def test_boxes_drawn_all_at_once_equal_those_that_timm_draws_one_by_one():
    shares = np.array([0.3, 0.9, 0.05, 0.999, 1 / 3], np.float32)
    for height, width in ((8, 8), (7, 224), (1, 3)):
        np.random.seed(height)
        theirs = [cutmix_bbox_and_lam((height, width), share) for share in shares]
        np.random.seed(height)
        boxes, left = draw_boxes(shares, height, width)
        assert boxes.tolist() == [list(box) for box, _ in theirs]
        assert left.tolist() == [share for _, share in theirs]


def test_the_loss_of_a_mixed_batch_is_the_sum_over_its_pairs():
    """Image 0 is mixed with 3 and 1 with 2: head with tail, medium with tail. The fusion loss and Eq. (2), numerator and
    denominator, are computed by hand with each member of a pair weighted by its share."""
    labels, alpha = torch.tensor([0, 2, 3, 4]), 0.7
    sets = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=bool)
    mixer = mixing(mixup=1.0, mixup_mode="elem")
    own = mixer.draw(step=11, batch_size=4, height=8, width=8).own.tolist()
    assert all(0.02 < share < 0.98 for share in own)
    _, targets = mix(mixer, torch.randn(4, 3, 8, 8), labels, 11)
    z = torch.randn(3, 4, CLASSES, generator=torch.Generator().manual_seed(2))
    rows = z.double().tolist()

    def cross_entropy(row, label):
        return math.log(sum(math.exp(value) for value in row)) - row[label]

    fusion = numerator = denominator = 0.0
    for i in range(4):
        fused = [sum(rows[k][i][c] for k in range(3)) for c in range(CLASSES)]
        for label, share in ((int(labels[i]), own[i]), (int(labels[3 - i]), 1 - own[i])):
            fusion += share * cross_entropy(fused, label) / 4
            for k in range(3):
                if sets[k][label]:
                    numerator += share * cross_entropy(rows[k][i], label)
                    denominator += share
    loss = ResLTLoss(sets, alpha)(z, targets)
    assert loss.item() == pytest.approx((1 - alpha) * fusion + alpha * numerator / denominator, rel=1e-5)


def test_targets_are_not_smoothed_since_the_loss_does_it():
    images, labels = batch(6)
    targets = mix(mixing(mixup=0.4), images, labels, 0)[1]
    assert ((targets > 0).sum(1) <= 2).all()


def test_nothing_is_mixed_by_default():
    assert mixing_of(Config.of(), 5) is None
    assert mixing_of(Config.of(mixup=0.2, mixup_prob=0.0), 5) is None
    assert isinstance(mixing_of(Config.of(cutmix=1.0), 5), Mixing)

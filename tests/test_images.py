"""Decoding and augmentation: pure functions of (seed, epoch, sample)."""

import random
import re

import numpy as np
import pytest
import torch
from conftest import make_dataset
from PIL import Image

from reslt.config import Config
from reslt.datasets import load_dataset
from reslt.errors import LocalFault, UserError
from reslt.images import ImageSettings, ListedImages, eval_transform, mix, posterize, seed_generators, train_transform
from reslt.loader import Normalize, eval_loader, train_loader
from reslt.shares import Share

MODEL_DATA = dict(
    input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1), interpolation="bicubic", crop_pct=0.9
)
CPU = torch.device("cpu")


def settings(**changes) -> ImageSettings:
    values = dict(crop="pad", crop_padding=2, workers=0, batch_size=8) | changes
    return ImageSettings.of(Config(**values), MODEL_DATA)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "pad"},
        {"crop": "rrc", "color_jitter": (0.4, 0.4, 0.4, 0.1)},
        {"crop": "pad", "aa": "cifar10", "reprob": 0.5},
        {"crop": "rrc", "aa": "rand-m9-mstd0.5", "reprob": 0.5, "remode": "rand"},
        {"crop": "pad", "aa": "augmix-m5-w2"},
    ],
)
def test_a_samples_augmentation_depends_on_seed_epoch_and_sample_alone(tiny, changes):
    dataset = load_dataset(str(tiny))

    def sample(seed, epoch, index, before=0):
        torch.manual_seed(before), random.seed(before), np.random.seed(before)
        images = ListedImages(dataset.lists["train"], dataset.image_root, train_transform(settings(**changes)), seed)
        return images[epoch, index][0]

    first = sample(1, 2, 3)
    assert torch.equal(first, sample(1, 2, 3, before=99))
    others = [sample(2, 2, 3), sample(1, 3, 3)]
    assert all(not torch.equal(first, other) for other in others)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 16, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(tiny, workers):
    dataset = load_dataset(str(tiny))
    alone = [batch for epoch in (0, 1) for batch in train_loader(dataset, settings(), CPU, Share(8)).epoch(epoch)]
    loader = train_loader(dataset, settings(workers=workers), CPU, Share(8))
    helped = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    assert len(alone) == len(helped) == 2 * (28 // 8)
    for (images, labels), (images2, labels2) in zip(alone, helped, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own(tiny):
    loader = train_loader(load_dataset(str(tiny)), settings(batch_size=7), CPU, Share(7))
    orders = []
    for epoch in (0, 1, 0):
        loader.batches.epoch = epoch
        orders.append([index for batch in loader.batches for _, index in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(28))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_limit_train_spreads_over_the_list(tiny):
    loader = train_loader(load_dataset(str(tiny)), settings(limit_train=4, batch_size=2), CPU, Share(2))
    assert loader.batches.indices.tolist() == [0, 9, 18, 27]


def test_fewer_images_than_a_batch_is_the_users_error(tiny):
    with pytest.raises(UserError, match="28 images are fewer than --batch-size 29"):
        train_loader(load_dataset(str(tiny)), settings(batch_size=29), CPU, Share(29))


def test_evaluation_shows_every_image_once_in_order(tiny):
    dataset = load_dataset(str(tiny))
    loader = eval_loader(dataset, "test", settings(batch_size=4), CPU, Share(4))
    labels = [y for _, batch in loader.epoch(0) for y in batch.tolist()]
    assert labels == dataset.lists["test"].labels.tolist()


def test_normalisation_is_that_of_the_unit_interval():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    wanted = [(0 / 255 - 0.5) / 0.2, (128 / 255 - 0.4) / 0.2, (255 / 255 - 0.3) / 0.1]
    out = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))(pixels)
    torch.testing.assert_close(out.flatten(), torch.tensor(wanted))


def test_an_image_of_the_right_size_passes_evaluation_unchanged():
    """CIFAR: crop_pct 1 and 32 px must neither resample nor crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    s = settings(img_size=32, crop_pct=1.0)
    out = eval_transform(s)(Image.fromarray(pixels))
    assert torch.equal(out, torch.from_numpy(pixels).permute(2, 0, 1))


def test_evaluation_resizes_the_short_side_by_crop_pct_and_crops_the_centre():
    """256 then 224 of a 512 x 256 picture whose centre is white: all that is kept is white."""
    picture = Image.new("RGB", (512, 256))
    picture.paste((255, 255, 255), (140, 0, 372, 256))
    s = settings(img_size=224, crop_pct=0.875, interpolation="bilinear")
    assert eval_transform(s)(picture).float().mean() == 255


def test_pad_and_crop_shows_zeros_at_the_border():
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    transform = train_transform(settings(crop_padding=4, hflip=0.0))
    torch.manual_seed(0)
    crops = torch.stack([transform(white) for _ in range(64)])
    assert (crops[:, :, 7:9, 7:9] == 255).all()  # the centre is in every crop
    assert 0.2 < (crops[:, 0, 0, 8] == 0).float().mean() < 0.8  # rows above the image: 4 of 9 offsets


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_the_resized_crop_obeys_scale_ratio_and_flip(hflip):
    """The whole area at ratio 1 is the picture itself, or its mirror; a quarter of the area is half of each side."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = train_transform(settings(crop="rrc", scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=hflip))
    wanted = pixels[:, ::-1] if hflip else pixels
    assert torch.equal(whole(Image.fromarray(pixels)), torch.from_numpy(wanted.copy()).permute(2, 0, 1))
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (1, 16, 3)))
    quarter = train_transform(settings(crop="rrc", scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=hflip))(ramp)
    assert 7 * 16 - 16 <= int(quarter.max()) - int(quarter.min()) <= 7 * 16  # 8 of 16 rows of a ramp in steps of 16


@pytest.mark.parametrize("crop", ["pad", "rrc"])
@pytest.mark.parametrize("aa", ["cifar10", "v0", "original", "rand-m9-mstd0.5", "augmix-m5-w2", "3a"])
def test_auto_augment_follows_crop_and_flip_and_takes_the_place_of_color_jitter(crop, aa):
    """3a alone has color jitter as a part of it, as in timm."""
    transform = train_transform(settings(crop=crop, aa=aa, color_jitter=(0.4,)))
    steps = re.findall(r"[A-Z]\w+(?=\()", repr(transform))
    augment = next(i for i, step in enumerate(steps) if step in ("AutoAugment", "RandAugment", "AugMixAugment"))
    crops = steps.index("RandomCrop" if crop == "pad" else "RandomResizedCropAndInterpolation")
    assert crops < steps.index("RandomHorizontalFlip") < augment
    assert ("ColorJitter" in steps) == (aa == "3a")
    seed_generators(0)
    assert transform(Image.new("RGB", (20, 18), (90, 10, 200))).shape == (3, 16, 16)


def test_torchvisions_cifar_policy_is_the_one_used():
    """The same draws through torchvision's own class give the same pixels; crop and flip are switched off."""
    from torchvision import transforms

    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    ours = train_transform(settings(aa="cifar10", crop_padding=0, hflip=0.0))
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        torch.rand(1)  # the flip's draw: a crop of the whole image draws none
        wanted = transforms.functional.pil_to_tensor(theirs(pixels))
        torch.manual_seed(seed)
        assert torch.equal(ours(pixels), wanted)
        changed += not torch.equal(wanted, transforms.functional.pil_to_tensor(pixels))
    assert changed > 10


def test_what_a_rotation_or_shear_of_timms_leaves_empty_has_the_mean_colour():
    """A white picture; other operations turn it grey or black, none into this colour."""
    transform = train_transform(settings(aa="original", crop_padding=0))
    torch.manual_seed(0), random.seed(0)
    outs = torch.stack([transform(Image.new("RGB", (16, 16), (255, 255, 255))) for _ in range(100)])
    assert (outs.movedim(1, -1) == torch.tensor([128, 102, 76])).all(-1).any()


@pytest.mark.parametrize("aa", ["v0", "rand-m2", "rand-m9-mstd0.5-inc1"])
def test_policies_that_posterize_to_no_bit_at_all_draw_on(aa):
    """At 0 bits the picture is black: at least one of 400 is."""
    transform = train_transform(settings(aa=aa, crop_padding=0))
    picture = Image.fromarray(np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8))
    outs = []
    for seed in range(400):
        seed_generators(seed)
        outs.append(transform(picture).max().item())
    assert min(outs) == 0
    assert max(outs) == 255
    black = posterize(picture, 0)
    assert (black.mode, black.size, black.getextrema()) == ("RGB", (16, 16), ((0, 0), (0, 0), (0, 0)))
    assert posterize(picture, 2).getpixel((0, 0)) == tuple(v & 0b11000000 for v in picture.getpixel((0, 0)))


def test_a_policy_that_timm_does_not_know_is_refused():
    with pytest.raises(UserError, match="--aa rand-m9-q3: Unknown RandAugment config section"):
        train_transform(settings(aa="rand-m9-q3"))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_fills_a_box_around_the_mean_and_leaves_the_rest(mode):
    """Of a white picture, what is erased is the mean colour (const), one colour (rand), or noise (pixel)."""
    transform = train_transform(settings(reprob=1.0, remode=mode, crop_padding=0))
    random.seed(0), torch.manual_seed(0)
    for _ in range(20):
        out = transform(Image.new("RGB", (16, 16), (255, 255, 255)))
        erased = out[:, (out != 255).any(0)]  # (3, pixels of the box)
        assert 0 < erased.shape[1] < 0.5 * 16 * 16
        colours = erased.unique(dim=1).shape[1]
        if mode == "const":
            assert erased[:, 0].tolist() == [128, 102, 76]  # 255 x mean
        assert colours == 1 if mode != "pixel" else colours > 0.9 * erased.shape[1]
    assert torch.equal(
        train_transform(settings(reprob=1e-9, crop_padding=0))(Image.new("RGB", (16, 16), "red"))[0],
        torch.full((16, 16), 255, dtype=torch.uint8),
    )


def test_settings_left_open_are_the_models_own():
    s = settings()
    assert (s.size, s.mean, s.interpolation, s.crop_pct) == (16, (0.5, 0.4, 0.3), "bicubic", 0.9)
    s = settings(img_size=8, mean=(0.1, 0.1, 0.1), interpolation="bilinear", crop_pct=1.0)
    assert (s.size, s.mean, s.interpolation, s.crop_pct) == (8, (0.1, 0.1, 0.1), "bilinear", 1.0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text", "gone", "empty"])
def test_an_image_that_cannot_be_read_names_file_and_line(tmp_path, workers, damage):
    folder = make_dataset(tmp_path / "d", side=64)
    dataset = load_dataset(str(folder))
    victim = dataset.image_root.folder / dataset.lists["train"].path(20)
    whole = victim.read_bytes()
    victim.write_bytes({"truncated": whole[:1500], "text": b"not an image", "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        victim.unlink()
    with pytest.raises(LocalFault, match=rf"train\.txt:21: {re.escape(str(victim))}: .*; mend or replace") as fault:
        list(train_loader(dataset, settings(workers=workers, batch_size=28), CPU, Share(28)).epoch(0))
    assert "\n" not in str(fault.value)


def test_mixed_seeds_differ_and_fit_63_bits():
    seeds = {mix(s, e, i) for s in range(4) for e in range(50) for i in range(200)}
    assert len(seeds) == 4 * 50 * 200
    assert all(0 <= s < 2**63 for s in seeds)
    low_bits = np.array([s & 0xFF for s in seeds])
    assert abs(low_bits.mean() - 127.5) < 2


def test_worker_processes_get_the_list_by_reference(tiny):
    """A spawned worker (macOS, Windows, Python 3.14) unpickles the dataset: handles of shared memory, not the list."""
    from multiprocessing.reduction import ForkingPickler

    dataset = load_dataset(str(tiny))
    images = dataset.lists["train"]
    long = images.__class__(
        images.file, np.tile(images.text, 5000), images.ends, images.labels, images.lines_without_image
    )
    listed = ListedImages(long, dataset.image_root, train_transform(settings()), 0)
    assert long.text.nbytes > 1_000_000
    assert len(ForkingPickler.dumps(listed)) < 20_000

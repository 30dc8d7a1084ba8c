"""ProCo: several views of each image, estimates of each class's distribution, and contrast with all classes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from builders import model_of, train_loader_of
from conftest import TINY_FLAGS, train_until
from safetensors.torch import load_file
from scipy.special import ive

import reslt
from reslt.augment.host_transforms import contrast_transform, train_transform
from reslt.augment.resample import BOX_COLUMNS, draw_boxes, resized_crops
from reslt.augment.settings import ImageSettings
from reslt.config.checks import consistency_faults
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.data.datasets import load_dataset
from reslt.loading.resident import random_table
from reslt.methods.losses import LossWithFeatures
from reslt.methods.proco import ProCo, log_bessel
from reslt.methods.registry import create_loss
from reslt.models.complexity import complexity
from reslt.models.contrastive import ClassDirections
from reslt.models.featured import Featured
from reslt.models.fitting import fitting
from reslt.models.fold import fold, load_folded, save_folded

TINY = Config.of(
    model="cifar_resnet20", model_kwargs={"channels": (8, 16, 32)}, method="proco", batch_size=8, workers=0, seed=3,
    crop="pad", crop_padding=2, img_size=16,
)  # fmt: skip
COUNTS = np.array([16, 8, 4])
STEPS = 3  # steps per epoch of `tiny`: 28 images in batches of 8


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


class TestBessel:
    @pytest.mark.parametrize("order", [-0.5, 0.0, 0.5, 3.0, 31.0, 32.5, 63.0])
    def test_the_logarithm_equals_scipys_and_its_derivative_the_ratio_of_two_orders(self, order):
        x = torch.tensor([0.3, 4.0, 30.0, 128.0, 700.0, 2e4, 1e5], dtype=torch.float64, requires_grad=True)
        found = log_bessel(order, x.square())
        numbers = x.detach().numpy()
        expected = np.log(ive(order, numbers)) + numbers - order * np.log(numbers)
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12, atol=1e-9)
        [slope] = torch.autograd.grad(found.sum(), x)
        np.testing.assert_allclose(slope.numpy(), ive(order + 1, numbers) / ive(order, numbers), rtol=1e-8)

    @pytest.mark.parametrize("order", [0.0, 63.0])
    def test_at_zero_the_logarithm_and_its_slope_are_finite(self, order):
        """I_order(x) / x^order converges to 1 / (2^order order!); the slope in x^2 is 1 / (4 (order + 1))."""
        square = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        found = log_bessel(order, square)
        assert found.item() == pytest.approx(-order * math.log(2) - math.lgamma(order + 1), abs=1e-9)
        [slope] = torch.autograd.grad(found.sum(), square)
        assert slope.item() == pytest.approx(1 / (4 * (order + 1)), rel=1e-6)


class TestEstimates:
    def test_estimates_are_means_of_the_last_epoch_and_this_one_and_survive_an_epoch_without_the_class(self):
        """Class 0 occurs with (1, 0) and (0, 1) in the first epoch, and with (1, 0) in the second. Class 1 occurs only in
        the first, and class 2 never. R = sqrt(1/2) gives kappa = 2 R / (1 - R^2) = 2 sqrt 2."""
        classes = ClassDirections(3, 2)
        right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        classes.begin_epoch()
        classes.observe(torch.stack([right, up, up]), torch.tensor([0, 0, 1]))
        directions, kappas = classes.estimates(torch.float64)
        half = math.sqrt(0.5)
        assert directions.flatten().tolist() == pytest.approx([half, half, 0, 1, 0, 0])
        assert kappas.tolist() == pytest.approx([2 * math.sqrt(2), 1e5, 0])
        classes.begin_epoch()
        classes.observe(right[None], torch.tensor([0]))
        assert classes.used_sums.tolist() == [[2, 1], [0, 1], [0, 0]]  # three images of class 0, one of class 1
        assert classes.collected_sums.tolist() == [[1, 0], [0, 0], [0, 0]]
        classes.begin_epoch()
        assert (classes.used_sums.tolist(), classes.used_counts.tolist()) == ([[1, 0], [0, 1], [0, 0]], [1, 1, 0])

    def test_estimates_do_not_change_while_no_running_statistics_are_tracked(self):
        """The second pass of sharpness-aware minimization tracks none."""
        classes = ClassDirections(2, 4)
        classes.track_running_stats = False
        ProCo(classes, torch.zeros(2))(unit(3, 4), torch.tensor([0, 1, 1]))
        assert not any(buffer.any() for buffer in classes.buffers())


class TestLoss:
    def test_in_three_dimensions_the_loss_equals_its_closed_form(self):
        """The normalization is C_3(k) = k / (4 pi sinh k). A class without an image is uniform, so that its expectation is
        sinh(s) / s at s = 1 / T."""
        classes, temperature, prior = ClassDirections(3, 3), 0.5, torch.tensor([0.5, 0.3, 0.2]).log()
        embeddings, labels = unit(6, 3), torch.tensor([0, 1, 1, 0, 0, 1])
        loss = ProCo(classes, prior, temperature)(embeddings, labels)
        logits = torch.empty(6, 3, dtype=torch.float64)
        for c in range(3):
            mean = embeddings[labels == c].mean(0) if c < 2 else torch.zeros(3, dtype=torch.float64)
            length = mean.norm()
            kappa = 3 * length / (1 - length**2)
            direction = mean / length if c < 2 else mean
            for i in range(6):
                shifted = (kappa * direction + embeddings[i] / temperature).norm()
                normalization = kappa / kappa.sinh() if c < 2 else torch.tensor(1.0)
                logits[i, c] = prior[c] + (normalization * shifted.sinh() / shifted).log()
        assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)

    def test_the_gradient_of_the_loss_is_that_of_finite_differences(self):
        """The estimates are constant, and the embeddings move on the sphere."""
        loss = ProCo(ClassDirections(3, 16), torch.zeros(3))
        loss.classes.observe(unit(30, 16, seed=1).float(), torch.arange(30) % 3)
        loss.classes.track_running_stats = False
        features, labels = unit(2, 16).mul_(3).requires_grad_(), torch.tensor([0, 2])
        assert torch.autograd.gradcheck(lambda x: loss(F.normalize(x, dim=-1), labels), features)

    def test_two_processes_have_the_loss_the_gradient_and_the_estimates_of_one(self):
        """Process r has the images 2 r and 2 r + 1 in two further views. After gathering, its views are adjacent."""
        torch.manual_seed(0)
        model = model_of(TINY, 3)
        logits, labels = torch.randn(1, 4, 3), torch.tensor([0, 1, 2, 0])
        views = unit(2, 4, 128).float()  # of 4 images
        state = {name: value.clone() for name, value in model.projection.state_dict().items()}

        def computed(images: slice, processes: int):
            model.projection.load_state_dict(state)
            loss = create_loss(TINY.method, COUNTS, model=model)
            assert isinstance(loss, LossWithFeatures)
            own = views[:, images].reshape(-1, 128).clone().requires_grad_()
            gathered = torch.cat([views[:, :2].reshape(-1, 128), views[:, 2:].reshape(-1, 128)])
            first = images.start * 2 if processes > 1 else 0

            def gather(tensor):
                if tensor.ndim == 1:
                    return torch.cat([labels[:2].repeat(2), labels[2:].repeat(2)])
                return torch.cat([gathered[:first], tensor, gathered[first + len(tensor) :]])

            if processes > 1:
                loss.gather, loss.processes = gather, processes
            found = loss(Featured(logits[:, images], own), labels[images], torch.tensor([4.0]))
            found.backward()
            gradient = own.grad.unflatten(0, (2, -1)) * processes
            return found.detach(), gradient, model.projection.classes.used_sums.clone()

        whole, gradient, sums = computed(slice(0, 4), 1)
        halves = [computed(slice(2 * rank, 2 * rank + 2), 2) for rank in (0, 1)]
        torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
        torch.testing.assert_close(torch.cat([half[1] for half in halves], 1), gradient)
        for half in halves:
            torch.testing.assert_close(half[2], sums)


class TestNetwork:
    def test_in_training_the_first_view_is_classified_and_the_others_are_embedded(self):
        torch.manual_seed(0)
        model = model_of(TINY, 3).train()
        images = torch.randn(12, 3, 16, 16)  # three views of four
        model.gives_features = True
        featured = model(images)
        assert (featured.branch_logits.shape, featured.features.shape) == ((1, 4, 3), (8, 128))
        torch.testing.assert_close(featured.features.norm(dim=1), torch.ones(8))
        pooled = model.pooled(images)  # BatchNorm: of all three views
        torch.testing.assert_close(featured.branch_logits[0], model.backbone.get_classifier()(pooled[:4]))
        torch.testing.assert_close(featured.features, model.projection(pooled)[4:])
        assert model.eval()(images).shape == (1, 12, 3)

    def test_the_projection_is_not_counted_and_a_new_run_does_not_take_a_trained_models_estimates(self):
        plain, model = model_of(TINY.changed(method="ce"), 3), model_of(TINY, 3)
        assert complexity(model, 16) == complexity(plain, 16)
        other = model_of(TINY, 3)
        other.projection.classes.observe(unit(3, 128).float(), torch.arange(3))
        found = fitting(model, other.state_dict(), np.arange(3))
        assert "projection.out.weight" in found.tensors
        assert not any("classes" in name for name in found.tensors)
        assert fitting(plain, other.state_dict(), np.arange(3)).left_out == {"projection"}

    @pytest.mark.parametrize("more", [{}, {"network": "conv_stack", "branches": 1}])
    def test_a_folded_file_has_no_projection(self, tmp_path, more):
        """The file of a stack of convolutions contains the whole network, which folds no further."""
        config, classes = TINY.changed(**more), Classes(3)
        model = model_of(config, 3).eval()
        folded, _ = fold(model, 16)
        file, images = tmp_path / "folded.safetensors", torch.randn(2, 3, 16, 16)
        save_folded(folded, config.model, config.method, settings_of(config), classes, file)
        read, _ = load_folded(file)
        assert not any("projection" in name for name in load_file(file))
        torch.testing.assert_close(read(images), model(images).sum(0))


def settings_of(config: Config) -> ImageSettings:
    return ImageSettings(config.augment.img_size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), "bilinear", 1.0, config.augment)


def loader_of(folder, shard: BatchShard | None = None, **changes):
    config = TINY.changed(**changes)
    return train_loader_of(load_dataset(str(folder)), config, settings_of(config), torch.device("cpu"), shard)


@pytest.mark.parametrize("on_device", ["on", "off"])
class TestViews:
    def test_the_first_views_are_the_images_of_a_run_without_others(self, tiny, on_device):
        alone, several = (loader_of(tiny, data_on_device=on_device, method=method) for method in ("ce", "proco"))
        for [(images, labels)], [(views, same)] in zip(alone.windows(1), several.windows(1), strict=True):
            assert (len(images), len(views)) == (8, 24)
            assert torch.equal(views[:8], images)
            assert torch.equal(same, labels)
            first, second, third = views.float().split(8)
            assert not any(
                torch.equal(a, b) for x, y in ((first, second), (second, third)) for a, b in zip(x, y, strict=True)
            )

    def test_only_the_first_views_have_the_augmentation_of_the_run(self, tiny, on_device):
        """It is a black square as large as the image, which covers at least a quarter of the 16 x 16 pixels."""
        [(views, _)] = next(loader_of(tiny, data_on_device=on_device, cutout=16).windows(1))
        black = (views == 0).all(1).sum((1, 2))
        assert (black[:8] >= 64).all()
        assert (black[8:] < 64).all()

    def test_a_view_does_not_depend_on_steps_or_processes_and_is_drawn_again_in_each_epoch(self, tiny, on_device):
        whole = [window[0] for window in loader_of(tiny, data_on_device=on_device).windows(1)]
        rest = [window[0] for window in loader_of(tiny, data_on_device=on_device).windows(1, first_step=1)]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], rest, strict=True))
        halves = [loader_of(tiny, BatchShard(8, rank, 2), data_on_device=on_device).windows(1) for rank in (0, 1)]
        for (views, _), (first_half,), (second_half,) in zip(whole, *halves, strict=True):
            both = torch.cat([half.unflatten(0, (3, 4)) for half, _ in (first_half, second_half)], 1)
            assert torch.equal(both.flatten(0, 1), views)
        loader = loader_of(tiny, data_on_device=on_device)
        by_image = []
        for epoch in (1, 2):
            seen = torch.cat([window[0][0][8:16] for window in loader.windows(epoch)])
            by_image.append(dict(zip(loader.batches.order(epoch).ravel(), seen, strict=True)))
        assert not any(torch.equal(image, by_image[1][i]) for i, image in by_image[0].items() if i in by_image[1])


def test_views_on_the_device_are_resized_crops_of_the_kept_images(tiny):
    """The table of view 1 has one row per image: box, resampling, flip, and the numbers of the jitter. If the first of
    these is above .8, there is no jitter; if the last is below .2, the image is gray."""
    loader = loader_of(tiny, data_on_device="on")
    table = random_table(3, 1, 28, BOX_COLUMNS + 2 + 10, view=1)
    order, seen = loader.batches.order(1).ravel(), torch.cat([w[0][0][8:16] for w in loader.windows(1)])
    boxes = draw_boxes(table[order, :BOX_COLUMNS], 16, 16, (0.08, 1.0), (3 / 4, 4 / 3))
    crops = resized_crops(loader.pixels[torch.from_numpy(order)], boxes, 16, 1)
    crops = torch.where(torch.from_numpy(table[order, 41] < 0.5).view(-1, 1, 1, 1), crops.flip(-1), crops)
    is_plain = (table[order, 42] >= 0.8) & (table[order, -1] >= 0.2)
    assert is_plain.any()
    assert torch.equal(seen[torch.from_numpy(is_plain)], crops[torch.from_numpy(is_plain)])
    assert not any(torch.equal(a, b) for a, b in zip(seen[~is_plain], crops[~is_plain], strict=True))


@pytest.mark.parametrize(("crop", "first"), [("rrc", []), ("pad", ["Resize"]), ("center", ["CenterOfResized"])])
def test_views_on_the_host_are_random_crops_of_training_images_after_only_the_fixed_resizing(crop, first):
    settings = settings_of(TINY.changed(crop=crop, aa="cifar10", reprob=0.5))
    view = contrast_transform(settings)
    if first:
        assert [type(step).__name__ for step in view.transforms[:-1]] == first
        view = view.transforms[-1]
    assert repr(view.transforms) == repr(train_transform(settings.of_contrast).transforms)
    jitter, gray = view.transforms[1].transforms
    assert (jitter.p, gray.p) == (0.8, 0.2)
    assert "brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1)" in repr(jitter)
    assert len(view.transforms) == 3  # no erasing


def test_a_run_stopped_within_an_epoch_and_resumed_has_the_same_weights_and_loads_without_projection(
    tiny, tmp_path, run_script, monkeypatch
):
    """A step has 8 images in two further views. An epoch collects 3 x 16 embeddings, and also uses those of the previous
    one."""
    flags = ["--data", tiny, *TINY_FLAGS, "--method", "proco", "--model-ema", "--model-ema-decay", "0.5"]
    flags += ["--output", tmp_path, "--experiment"]
    whole = run_script("train", *flags, "whole")
    assert whole.code == 0, whole.err
    train_until(run_script, monkeypatch, STEPS + 1, *flags, "stopped")
    resumed = run_script("train", *flags, "stopped", "--resume", "auto")
    assert resumed.code == 0, resumed.err
    for part in ("model", "ema", "optimizer"):
        files = (tmp_path / run / f"checkpoints/2-6/{part}.safetensors" for run in ("whole", "stopped"))
        expected, found = (file.read_bytes() for file in files)
        assert found == expected
    tensors = load_file(tmp_path / "stopped/checkpoints/2-6/model.safetensors")
    assert tensors["projection.classes.used_counts"].sum() == 2 * 48
    assert tensors["projection.classes.collected_counts"].sum() == 48
    assert pd.read_csv(tmp_path / "stopped/summary.csv")["train_accuracy"].between(0, 100).all()

    module, _ = reslt.load_run(tmp_path / "whole")
    assert not any("projection" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "2"], "feature_loss: proco uses the embeddings of one network; drop the experts"),
        (["--mixup", "0.2"], "feature_loss: proco compares images by their labels; drop mixup"),
        (["--tune", "head"], "feature_loss: proco trains the features, which --tune head does not change"),
        (["--decode", "device"], "feature_loss: proco sees several views .* use --decode host"),
        (["--grad-accum-steps", "2"], "feature_loss: proco sees the whole batch at once"),
        (["--method", "ce", "--views", "3"], "--views: method ce does not use it"),
    ],
)
def test_settings_that_contradict_the_method_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(["--method", "proco", *flags])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "proco", "stages": ({"start": 0.5, "feature_loss": "off"},)},
        {"method": "ce", "stages": ({"start": 0.5, "feature_loss": "proco"},)},
    ],
)
def test_a_stage_that_begins_or_ends_the_contrast_is_an_error(settings):
    """The loader makes the same number of views in all stages."""
    (error,) = consistency_faults(Config.of(**settings))
    assert error.startswith("feature_loss: proco applies to all stages")

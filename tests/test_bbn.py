"""BBN: a network with two last blocks, pairs of images from two samplers, and cumulative learning."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from builders import loss_of, mixing_of, model_of, settings_of, train_loader_of
from conftest import TINY_FLAGS, make_dataset, train_until

import reslt
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.batch_shard import BatchShard
from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.loading.batches import ShuffledBatches
from reslt.methods.pairs import Pairing, create_pairing
from reslt.methods.registry import create_sampler, create_second_sampler
from reslt.models.fitting import fitting
from reslt.models.fold import fold
from reslt.models.freeze import frozen_names
from reslt.training.trained_parts import parameters_of

TINY = {"model": "cifar_resnet20", "model_kwargs": {"channels": (8, 16, 32)}, "img_size": 16, "branch": "bn"}
PAIRS = {"method": "bbn", "second_sampler": "reversed"}
STEPS = 3  # steps per epoch: 28 images in batches of 8


def network(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return model_of(Config.of(**TINY | {"method": "bbn"} | changes), 5)


def images_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class TestNetwork:
    def test_a_resnet32_has_four_shared_blocks_in_its_last_stage_and_one_per_branch(self):
        model = network(model="cifar_resnet32", model_kwargs={}, img_size=32)
        backbone = model.backbone
        assert [len(stage) for stage in (backbone.layer1, backbone.layer2, backbone.layer3)] == [5, 5, 4]
        assert (len(model.branches), backbone.fc.in_features, model.logits_per_image) == (2, 128, (1,))
        block, classifier = 2 * 9 * 64 * 64 + 4 * 64, 64 * 5
        plain = 464_154 - 5 * 65  # at 5 classes
        assert sum(p.numel() for p in model.parameters()) == plain + block + classifier
        first, second = (branch.conv1.weight for branch in model.branches)
        assert not torch.allclose(first, second)  # each is initialized on its own

    @pytest.mark.parametrize(("name", "shared", "width"), [("resnet50", 2, 4096), ("resnet18", 1, 1024)])
    def test_a_resnet_of_timm_keeps_all_but_its_last_block(self, name, shared, width):
        with torch.device("meta"):
            model = network(model=name, model_kwargs={})
            assert model(torch.zeros(2, 3, 64, 64)).shape == (1, 2, 5)
        assert (len(model.backbone.layer4), len(model.branches), model.backbone.fc.in_features) == (shared, 2, width)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"experts": 2},
            {"head": "cosine"},
            {"model": "resnet18", "model_kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}},
        ],
    )
    @torch.no_grad()
    def test_pairs_of_equal_images_with_shares_of_one_half_are_predicted_as_single_images(self, changes):
        model, images = network(**changes).eval(), images_of(3)
        paired = model(torch.cat([images, images]), torch.full((3,), 0.5))
        torch.testing.assert_close(paired, model(images), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(paired, model(torch.cat([images, images]), torch.full((3,), 0.7)), atol=1e-3)

    @torch.no_grad()
    def test_each_image_of_a_pair_passes_through_its_own_branch_weighted_by_its_share(self):
        model, first, partners = network().eval(), images_of(3), images_of(3, 2)
        shares = torch.tensor([0.3, 1.0, 0.0])
        pooled = [
            branch(model.backbone.forward_features(images)).mean((2, 3))
            for branch, images in zip(model.branches, (first, partners), strict=True)
        ]
        features = torch.cat([2 * shares[:, None] * pooled[0], 2 * (1 - shares[:, None]) * pooled[1]], 1)
        fc = model.backbone.fc
        expected = features @ fc.weight.T + fc.bias
        torch.testing.assert_close(model(torch.cat([first, partners]), shares)[0], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("experts", [1, 2])
    def test_batch_norm_of_the_shared_layers_sees_the_two_streams_separately(self, experts):
        """In training mode, the logits of images whose share is 1 do not depend on their partners."""
        model, first, ones = network(experts=experts), images_of(4), torch.ones(4)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        seen = []
        for seed in (2, 3):
            model.load_state_dict(before)
            seen.append(model(torch.cat([first, 5 * images_of(4, seed)]), ones))
        assert torch.equal(*seen)
        stem = model.backbone.bn1
        assert stem.num_batches_tracked == 2

    def test_single_images_train_both_branches_under_the_head_of_causal_norm(self):
        """Causal Norm uses this network on CIFAR, with the features of both branches and without a second sampler."""
        config = Config.of(**TINY, method="causal", network="bbn")
        model = model_of(config, 5)
        labels = torch.tensor([0, 3, 4])
        loss_of(config, np.array([50, 20, 9, 5, 2]))(model(images_of(3)), labels).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        head = model.backbone.fc
        assert (head.in_features, head.groups, head.running_mean.abs().sum() > 0) == (64, 2, True)
        stage = stages_of(config)[0]
        assert create_pairing(stage, 5, 1) is create_second_sampler(stage, labels.numpy(), 5) is None

    def test_models_other_than_resnets_are_refused(self):
        with pytest.raises(UserError, match=r"--network bbn: convnext_atto is neither of timm's ResNet class"):
            model_of(Config.of(model="convnext_atto", method="bbn"), 5)

    def test_stages_and_patterns_of_frozen_layers_can_name_the_last_blocks(self):
        model = network(experts=2)
        own = {p for expert in model.experts for p in expert.branches.parameters()}
        assert parameters_of(model, "branches") == own
        assert parameters_of(model, "classifier") == {p for head in model.classifiers for p in head.parameters()}
        last_blocks = {name for name, p in model.named_parameters() if p in own}
        assert frozen_names(model, ["layer3.2"]) == last_blocks
        assert frozen_names(model, ["layer3"]) > last_blocks

    @torch.no_grad()
    def test_only_its_head_is_folded_and_the_message_says_so(self):
        for changes, start in (({}, "not folded: it has two last blocks"), ({"head": "scaled"}, "scales folded into")):
            model, images = network(**changes).eval(), images_of(3)
            if "head" in changes:
                model.backbone.fc.scales.uniform_(0.5, 2)
            folded, how = fold(model, 16)
            assert how.startswith(start)
            assert how.endswith("reslt.models.fold.load_folded reads the file")
            torch.testing.assert_close(folded(images), model(images)[0], rtol=1e-5, atol=1e-6)


class TestTrainedWeights:
    """Weights for `--init-from`."""

    @pytest.mark.parametrize("experts", [1, 2])
    def test_both_last_blocks_start_from_the_one_of_a_plain_network(self, experts):
        plain = network(1, method="ce", experts=experts, expert_width=1.0).state_dict()
        model = network(experts=experts, expert_width=1.0)
        found = fitting(model, plain, np.arange(5))
        model.load_state_dict(found.tensors, strict=False)
        for e, branch in itertools.product(range(experts), (0, 1)):
            prefix = f"experts.{e}." if experts > 1 else ""
            block = model.get_submodule(f"{prefix}branches.{branch}")
            for name, tensor in block.state_dict().items():
                assert torch.equal(tensor, plain[f"{prefix}backbone.layer3.2.{name}"])
        assert (found.new_weights, found.classifiers, found.left_out) == ({}, 0, set())

    def test_a_bbn_network_takes_all_weights_of_another(self):
        trained, model = network(1).state_dict(), network(2)
        found = fitting(model, trained, np.arange(5))
        assert found.tensors.keys() == trained.keys()
        model.load_state_dict(found.tensors)
        assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items())

    def test_residual_branches_are_left_out(self):
        found = fitting(network(), network(1, method="reslt").state_dict(), np.arange(5))
        assert (found.left_out, found.new_weights) == ({"branches"}, {})


class TestPairing:
    def test_the_share_of_the_first_image_falls_with_the_square_of_the_epoch(self):
        """Published are 1, .755 and .01 in epochs 1, 100 and 200 of 200, and the divisor 100 for 90 epochs. Here, epochs
        count from 0."""
        [stage] = stages_of(Config.of(**PAIRS, epochs=200))
        pairing = create_pairing(stage, 10, steps=7)
        shares = [pairing.draw(7 * epoch + 3, 4, 16, 16).first for epoch in (0, 99, 199)]
        assert [share.tolist() for share in shares] == [
            [pytest.approx(expected, abs=1e-6)] * 4 for expected in (1, 0.754975, 0.009975)
        ]
        of_90 = create_pairing(stages_of(Config.of(**PAIRS, epochs=90, cumulative_epochs=100))[0], 10, 7)
        assert of_90.share(89) == pytest.approx(1 - 0.89**2)
        assert Pairing(10, epochs=5, steps=1).share(7) == 0

    def test_the_shares_of_a_stage_follow_its_schedule_and_begin_again_with_it(self):
        continued, appended = ({"start": 0.5, "class_weights": "inverse"}, {"epochs": 4, "lr": 0.1})
        _, second, third = stages_of(Config.of(**PAIRS, epochs=10, stages=(continued, appended)))
        assert create_pairing(second, 10, 1).share(8) == pytest.approx(1 - 0.8**2)
        assert create_pairing(third, 10, 1).share(12) == pytest.approx(1 - 0.5**2)

    def test_targets_and_loss_equal_a_calculation_by_hand(self):
        """Both images of the last of the three pairs have the same class."""
        labels, shares = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([0.7, 0.7, 0.25])
        targets = Pairing(4, 10, 1).targets(labels, shares)
        rows = [[0.7, 0, 0, 0.3], [0.3, 0.7, 0, 0], [0, 0, 1, 0]]
        torch.testing.assert_close(targets, torch.tensor(rows))
        logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
        config, expected = Config.of(**PAIRS), 0.0
        for i, (first, partner) in enumerate(((0, 3), (1, 0), (2, 2))):
            share = shares[i].item()
            log_sum = math.log(sum(math.exp(value) for value in logits[0, i].tolist()))
            costs = [log_sum - value for value in logits[0, i].tolist()]
            expected += (share * costs[first] + (1 - share) * costs[partner]) / 3
        assert loss_of(config, np.array([9, 5, 2, 1]))(logits, targets).item() == pytest.approx(expected, rel=1e-6)

    def test_the_model_sees_both_images_and_the_shares(self):
        pairing, images = mixing_of(Config.of(**PAIRS, epochs=4), 5, steps=2), images_of(6)
        shares = pairing.draw(4, 8, 16, 16)[np.array([2, 5, 7])].to(torch.device("cpu"))
        assert shares.tolist() == [0.75] * 3
        assert pairing.inputs(images, shares) == (images, shares)


COUNTS = {classes: [int(most * 0.01 ** (c / (classes - 1))) for c in range(classes)] for classes, most in ((100, 500), (10, 5000))}  # fmt: skip


@pytest.mark.parametrize(("classes", "first", "last"), [(100, 0.000438, 0.043820), (10, 0.004024, 0.402365)])
def test_the_partners_of_cifar_lt_have_the_published_class_probabilities(classes, first, last):
    labels = np.repeat(np.arange(classes), COUNTS[classes])
    sampler = create_second_sampler(stages_of(Config.of(**PAIRS))[0], labels, classes)
    assert sampler.probabilities(0)[[0, -1]] == pytest.approx([first, last], abs=1e-6)


def loader_of(data, placement: str, second: str | None = "reversed", shard: BatchShard | None = None, **more):
    """Return a training loader whose images are on the device, on the host, or decoded on the device."""
    settings = {"device": {"data_on_device": "on"}, "host": {"data_on_device": "off"}, "decode": {"decode": "device"}}
    crop = {"crop": "pad", "crop_padding": 4} if placement != "decode" else {}
    config = Config.of(**{
        **TINY, "method": "bbn", "second_sampler": second, "batch_size": 8, "workers": 0, "aa": "cifar10", **crop,
        **settings[placement], **more,
    })  # fmt: skip
    model_data = {
        "input_size": (3, 16, 16),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1,
    }
    loader = train_loader_of(
        load_dataset(str(data)), config, settings_of(config, model_data), torch.device("cpu"), shard
    )
    [stage] = stages_of(config)
    loader.batches.sampler = create_sampler(stage, loader.ordered_labels, 3)
    loader.batches.second_sampler = create_second_sampler(stage, loader.ordered_labels, 3)
    return loader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pairs") / "d")


@pytest.mark.parametrize("placement", ["host", "device", "decode"])
class TestLoaders:
    @pytest.mark.parametrize("sampler", ["instance", "balanced"])
    def test_the_first_images_are_those_of_a_run_without_partners(self, data, placement, sampler):
        alone, paired = (loader_of(data, placement, second, sampler=sampler) for second in (None, "reversed"))
        assert len(alone) == len(paired) == STEPS
        for [(images, labels)], [(both, pair_labels)] in zip(alone.windows(1), paired.windows(1), strict=True):
            assert (len(images), len(both), len(pair_labels)) == (8, 16, 16)
            assert torch.equal(both[:8], images)
            assert torch.equal(pair_labels[:8], labels)

    def test_partners_are_drawn_by_their_own_sampler_and_augmented_separately(self, data, placement):
        """Class 2 has 4 of 28 images and 4/7 of the reversed draws. Its images occur in both streams of an epoch."""
        loader, counted, differ = loader_of(data, placement), [], []
        labels = loader.images.labels.numpy()
        for epoch in range(6):
            seen: dict[int, list[torch.Tensor]] = {}
            for step, [(images, pair_labels)] in enumerate(loader.windows(epoch)):
                indices = loader.batches.images_of(epoch, step)
                assert np.array_equal(pair_labels.numpy(), labels[indices])
                counted += pair_labels[8:].tolist()
                for i, image in zip(indices, images, strict=True):
                    seen.setdefault(i, []).append(image)
            differ += [not torch.equal(*pair) for same in seen.values() for pair in itertools.combinations(same, 2)]
        assert np.bincount(counted, minlength=3) / len(counted) == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.11)
        assert np.mean(differ) > 0.95

    def test_an_epoch_resumed_in_the_middle_continues_with_the_same_pairs(self, data, placement):
        whole, rest = (
            list(loader_of(data, placement).windows(2)),
            list(loader_of(data, placement).windows(2, first_step=1)),
        )
        for [(images, _)], [(resumed, _)] in zip(whole[1:], rest, strict=True):
            assert torch.equal(images, resumed)

    def test_the_files_of_a_batch_are_those_of_both_streams(self, data, placement):
        loader = loader_of(data, placement)
        named = [
            loader.images.place(i) for order in (loader.batches.order, loader.batches.second_order) for i in order(1)[2]
        ]
        assert loader.places(1, 2) == named
        assert len(named) == 16


@pytest.mark.parametrize("second", ["reversed", "instance", "balanced4"])
@pytest.mark.parametrize("sampler", ["instance", "balanced"])
def test_no_draw_number_occurs_in_both_streams_with_any_pair_of_samplers(data, sampler, second):
    batches = loader_of(data, "host", second, sampler=sampler, limit_train=20).batches
    for epoch in range(3):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert len(keys) == len({draw for _, _, draw in keys}) == 32
        assert max(draw for _, _, draw in keys) < batches.draws
        assert not np.array_equal(batches.order(epoch), batches.second_order(epoch))
    if second == "instance":
        assert sorted(batches.second_sampler.order(0, 1)) == list(range(20))


def test_several_processes_and_micro_batches_divide_the_pairs_of_each_global_batch():
    labels = np.repeat(np.arange(3), (16, 8, 4))
    second = create_second_sampler(stages_of(Config.of(**PAIRS))[0], labels, 3)
    whole, _ = ShuffledBatches(np.arange(28), BatchShard(8), 0, None, second).parts()
    pairs = {tuple(pair) for pair in whole[0, 0].reshape(2, 8).T.tolist()}
    for processes, micro_batches in ((2, 1), (1, 2), (2, 2)):
        found = []
        for rank in range(processes):
            shard = BatchShard(8, rank, processes, micro_batches)
            parts, _ = ShuffledBatches(np.arange(28), shard, 0, None, second).parts()
            assert parts.shape == (3, micro_batches, 16 // processes // micro_batches)
            found += [tuple(pair) for part in parts[0] for pair in part.reshape(2, -1).T.tolist()]
        assert (len(found), set(found)) == (8, pairs)


class TestRuns:
    @pytest.mark.parametrize("more", [("--data-on-device", "on"), ("--data-on-device", "off", "--experts", "2")])
    def test_a_run_stopped_within_an_epoch_and_resumed_ends_with_the_same_weights(
        self, data, tmp_path, run_script, monkeypatch, more
    ):
        """The run stops after 2 of the 3 steps of its second epoch; each step has 8 pairs. Pairs have no training
        accuracy."""
        flags = ["--data", data, *TINY_FLAGS, "--method", "bbn", *more, "--output", tmp_path, "--experiment"]
        whole = run_script("train", *flags, "whole")
        assert whole.code == 0, whole.err
        stopped = train_until(run_script, monkeypatch, STEPS + 1, *flags, "stopped")
        assert "bbn, pairs with images of the reversed sampler" in stopped.out
        state = json.loads((tmp_path / "stopped/checkpoints/1-5/state.json").read_text())
        assert state["progress"]["images"] == 2 * 2 * 8
        resumed = run_script("train", *flags, "stopped", "--resume", "auto")
        assert resumed.code == 0, resumed.err
        files = (tmp_path / run / "checkpoints/2-6/model.safetensors" for run in ("whole", "stopped"))
        expected, found = (file.read_bytes() for file in files)
        assert found == expected
        assert pd.read_csv(tmp_path / "stopped/summary.csv")["train_accuracy"].isna().all()
        module, _ = reslt.load_run(tmp_path / "stopped")
        assert module(images_of(2)).shape == (2, 3)

    def test_a_second_stage_trains_only_the_classifier_and_a_folded_file_predicts_the_same(
        self, data, tmp_path, run_script
    ):
        recipe, file = tmp_path / "stages.yaml", tmp_path / "folded.safetensors"
        recipe.write_text("method: bbn\nstages:\n- {epochs: 1, train: [classifier], reinit: [classifier], bn: eval}\n")
        flags = [
            "--recipe",
            recipe,
            "--data",
            data,
            *TINY_FLAGS,
            "--epochs",
            1,
            "--output",
            tmp_path,
            "--experiment",
            "run",
        ]
        assert run_script("train", *flags).code == 0
        before, after = (
            reslt.load_run(tmp_path / f"run/checkpoints/{name}")[0].state_dict() for name in ("1-3", "2-6")
        )
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"model.backbone.fc.weight", "model.backbone.fc.bias"}
        folded = run_script("evaluate", "--ckpt", tmp_path / "run", "--fold", file)
        assert "not folded: it has two last blocks" in folded.out
        images, (model, described) = images_of(3), reslt.load_folded(file)
        assert (described["network"], described["method"]) == ("bbn", "bbn")
        torch.testing.assert_close(model(images), reslt.load_run(tmp_path / "run")[0](images))


class TestSettings:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--method", "bbn", "--mixup", "0.2"], "second_sampler: the images of pairs are not mixed; drop mixup"),
            (["--method", "bbn", "--cutmix", "1"], "second_sampler: the images of pairs are not mixed"),
            (
                ["--method", "ce", "--second-sampler", "reversed"],
                r"--second-sampler: method ce does not use it \(--net",
            ),
            (
                ["--method", "causal", "--network", "bbn", "--cumulative-epochs", "9"],
                "there are no pairs without --sec",
            ),
            (["--method", "bbn", "--second-sampler", "rare"], "second_sampler .*'rare'"),
            (["--method", "bbn", "--sampler-beta", "0.9"], "--sampler-beta: .* does not use it"),
        ],
    )
    def test_settings_that_contradict_or_have_no_effect_are_errors(self, flags, message):
        with pytest.raises(UserError, match=message):
            resolve(flags)

    def test_the_second_sampler_has_the_settings_of_a_sampler(self):
        config = resolve(["--method", "bbn", "--second-sampler", "effective", "--sampler-beta", "0.9"]).config
        assert config.stored()["sampler_beta"] == 0.9
        sampler = create_second_sampler(stages_of(config)[0], np.array([0] * 60 + [1] * 2), 2)
        effective = [(1 - 0.9**n) / 0.1 for n in (60, 2)]
        expected = np.array([60 / effective[0], 2 / effective[1]])
        assert sampler.probabilities(0) == pytest.approx(expected / expected.sum())

    def test_a_stage_that_mixes_the_images_of_pairs_is_an_error(self, tmp_path):
        recipe = tmp_path / "r.yaml"
        recipe.write_text("method: bbn\nstages: [{start: 0.5, mixup: 0.2}]\n")
        with pytest.raises(UserError, match="second_sampler: the images of pairs are not mixed"):
            resolve(["--recipe", str(recipe)])
        assert resolve(["--recipe", str(recipe), "--second-sampler", "none"]).config.method.trains_on_pairs is False

"""Checkpoints are written completely or not at all, are verified when read, and restore the whole state."""

from types import SimpleNamespace

import pytest
import torch
from builders import optimizer_of
from conftest import ALONE
from safetensors.torch import load_file

from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.core.files import atomic_file, atomic_folder
from reslt.data.classes import Classes
from reslt.models.finite import not_finite
from reslt.runs import checkpoint, resume
from reslt.runs import folder as run_folder
from reslt.runs.checkpoint import load
from reslt.runs.folder import choose_best, find, prune
from reslt.runs.resume import adopt, to_resume
from reslt.training.optim import create_ema
from reslt.training.state import Progress, TrainState

CONFIG = Config.of(model_ema=True)


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def state_of(seed: int, opt: str = "sgd", steps: int = 0) -> TrainState:
    model = network(seed)
    config = Config.of(model_ema=True, opt=opt, lr=0.01)
    optimizer, ema = optimizer_of(config, model), create_ema(config.optim, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        ema.update(model, step=7)
    return TrainState(model, ema, optimizer, None)


def save(run, state, config, *, epochs_done: int, steps_done: int, lists=None, keep: int = 2) -> None:
    """Save a checkpoint at the end of an epoch."""
    steps = steps_done // epochs_done
    progress = Progress(epochs_done - 1, steps, [1.5], [3.0], images=steps * 8, seconds=2.0)
    save_within(run, state, config, progress, steps, lists, keep)


def save_within(run, state, config, progress: Progress, steps_per_epoch: int, lists=None, keep: int = 2) -> None:
    """Save a checkpoint anywhere in an epoch."""
    run_folder.begin_save(
        run, state, config.stored(), ALONE, progress, steps_per_epoch, Classes(4, lists=lists or {}), keep
    )()


def resumed(run, config=CONFIG, classes=4, lists=None, steps_per_epoch: int = 5, force: bool = False):
    """Return the checkpoint that a run resumes from and adopts, and the messages for the user."""
    known, stages = Classes(classes, lists=lists or {}), stages_of(config)
    found, messages = to_resume(run, config.stored(), known, steps_per_epoch, stages, force)
    return found and adopt(found, steps_per_epoch), messages


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_a_checkpoint_restores_weights_average_and_optimizer(tmp_path, opt):
    before, after = state_of(0, opt, steps=3), state_of(1, opt)
    save(tmp_path, before, CONFIG, epochs_done=2, steps_done=10)
    found = find(tmp_path)
    after.restore(found, ALONE)
    assert (found.epochs_done, found.progress_in(5)) == (2, Progress(1, 5, [1.5], [3.0], 40, 2.0, 0.0))
    for old, new in ((before.model, after.model), (before.ema.module, after.ema.module)):
        for key, value in old.state_dict().items():
            assert torch.equal(value, new.state_dict()[key]), key
    torch.manual_seed(5)
    batch = torch.randn(5, 3)
    for state in (before, after):  # the next step is the same: the optimizer's moments are restored
        state.optimizer.zero_grad()
        state.model(batch).square().sum().backward()
        state.optimizer.step()
    for old, new in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_rows_of_earlier_epochs_are_on_disk_before_a_checkpoint_that_relies_on_them(tmp_path, monkeypatch):
    (tmp_path / "summary.csv").write_text("epoch\n1\n")
    flushed = []
    monkeypatch.setattr(
        run_folder, "flush", lambda file: flushed.append((file.name, run_folder.newest_first(tmp_path)))
    )
    save(tmp_path, state_of(0), CONFIG, epochs_done=2, steps_done=10)
    assert flushed == [("summary.csv", [])]


def test_the_loss_scale_of_fp16_is_restored(tmp_path):
    before, after = state_of(0), state_of(1)
    before.scaler, after.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 2.0))
    before.scaler.scale(torch.zeros(1))  # the first use creates the scale
    save(tmp_path, before, CONFIG, epochs_done=1, steps_done=5)
    after.restore(find(tmp_path), ALONE)
    assert after.scaler.get_scale() == 1024.0


def test_the_nested_state_of_an_optimizer_is_restored(tmp_path):
    """timm's kron keeps lists of tensors, None and numbers per parameter."""
    content = {
        "state": {0: {"step": 3, "mu": torch.ones(2), "Q": [torch.eye(2), torch.zeros(3)], "exprs": None}, 2: {}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.99], "params": [0, 1, 2]}],
    }
    before, after, restored = state_of(0), state_of(1), []
    before.optimizer = SimpleNamespace(state_dict=lambda: content)
    after.optimizer = SimpleNamespace(state_dict=lambda: content, load_state_dict=restored.append)
    save(tmp_path, before, CONFIG, epochs_done=1, steps_done=5)
    after.restore(find(tmp_path), ALONE)
    assert repr(restored) == repr([content])


def test_a_run_older_than_data_on_device_resumes_with_images_on_the_host(tmp_path):
    progress = Progress(0, 5, [1.5], [3.0], images=40, seconds=2.0)
    without = {key: value for key, value in CONFIG.stored().items() if key != "data_on_device"}
    run_folder.begin_save(tmp_path, state_of(0), without, ALONE, progress, 5, Classes(4))()
    for choice in ("auto", "off"):
        found, messages = resumed(tmp_path, CONFIG.changed(data_on_device=choice))
        assert (resume.recorded_data_on_device(found), messages) == ("off", [])
    with pytest.raises(UserError, match="data_on_device: 'off' -> 'on'"):
        resumed(tmp_path, CONFIG.changed(data_on_device="on"))


def test_a_resumed_optimizer_keeps_the_implementation_that_suits_its_device(tmp_path):
    """A run on a GPU has a fused optimizer. If it is resumed elsewhere, the optimizer stays as created for that
    device."""
    before, after = state_of(0, steps=1), state_of(1)
    before.optimizer.param_groups[0] |= {"fused": True, "foreach": False, "lr": 0.625}
    save(tmp_path, before, CONFIG, epochs_done=1, steps_done=5)
    own = {key: after.optimizer.param_groups[0][key] for key in ("fused", "foreach")}
    after.restore(find(tmp_path), ALONE)
    assert own | {"lr": 0.625} == {key: after.optimizer.param_groups[0][key] for key in ("fused", "foreach", "lr")}


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_momentum_is_restored_in_the_memory_layout_of_its_parameter(tmp_path, opt):
    """A fused optimizer reads weights and momentum in the order in which they lie in memory, here channels-last. Three
    steps after resuming, the weights equal those of an uninterrupted run."""

    def trained(steps: int) -> TrainState:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
        model.to(memory_format=torch.channels_last)
        optimizer = optimizer_of(Config.of(opt=opt, lr=0.01), model)
        optimizer.param_groups[0] |= {"fused": True, "foreach": False}
        return train(TrainState(model, None, optimizer, None), range(steps))

    def train(state: TrainState, steps: range) -> TrainState:
        for step in steps:
            images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            state.optimizer.zero_grad()
            state.model(images.to(memory_format=torch.channels_last)).square().sum().backward()
            state.optimizer.step()
        return state

    save(tmp_path, trained(3), CONFIG, epochs_done=1, steps_done=3)
    restored = trained(0)
    restored.restore(find(tmp_path), ALONE)
    weight = restored.model[0].weight
    assert not weight.is_contiguous()
    for value in restored.optimizer.state[weight].values():
        assert value.shape != weight.shape or value.stride() == weight.stride()
    train(restored, range(3, 6))
    for name, value in trained(6).model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], value), name


def test_no_pickle_is_written(tmp_path):
    save(tmp_path, state_of(0, steps=1), CONFIG, epochs_done=1, steps_done=5)
    names = sorted(p.name for p in (tmp_path / "checkpoints/1-5").iterdir())
    assert names == ["SHA256SUMS", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert (tmp_path / "checkpoints/last").read_text() == "1-5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, damage):
    save(tmp_path, state_of(0, steps=1), CONFIG, epochs_done=1, steps_done=5)
    file = tmp_path / "checkpoints/1-5" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x01
    file.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(UserError, match="1-5"):
        load(tmp_path / "checkpoints/1-5")


@pytest.mark.parametrize(
    "damaged",
    [
        lambda sums: sums[:-1],
        lambda sums: sums + "\n",
        lambda sums: sums.replace("a", "A", 1),
        lambda sums: "".join(line for line in sums.splitlines(True) if "ema" not in line),
        lambda sums: sums.replace("ema.safetensors", "../2-6/ema.safetensors"),
        lambda sums: sums + f"{'0' * 64}  gone.safetensors\n",
        lambda sums: "",
        lambda sums: "\x00\xff",
    ],
)
def test_a_changed_file_of_digests_is_refused(tmp_path, damaged):
    """A change of a single byte is enough, and so is a missing digest of a file of weights."""
    save(tmp_path, state_of(0, steps=1), CONFIG, epochs_done=1, steps_done=5)
    file = tmp_path / "checkpoints/1-5/SHA256SUMS"
    file.write_text(damaged(file.read_text()))
    with pytest.raises(UserError, match="1-5: the checkpoint is damaged"):
        load(tmp_path / "checkpoints/1-5")


def test_a_damaged_pointer_is_reported_and_does_not_keep_a_run_from_resuming(tmp_path):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    for content in (b"", b"9-9\n", b"../..\n", b"\xff\x00", b"1-5/..\n"):
        (tmp_path / "checkpoints/last").write_bytes(content)
        with pytest.raises(UserError, match="last"):
            find(tmp_path)
        assert resumed(tmp_path)[0].epochs_done == 1
        assert find(tmp_path).epochs_done == 1


def test_resuming_takes_the_newest_valid_checkpoint_and_reports_those_it_skips(tmp_path):
    for epoch in (9, 10):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch * 5)
    assert resumed(tmp_path)[0].epochs_done == 10  # by number, not by name
    (tmp_path / "checkpoints/10-50/model.safetensors").write_bytes(b"")
    found, skipped = resumed(tmp_path)
    assert found.epochs_done == 9
    assert len(skipped) == 1
    assert "10-50: the checkpoint is damaged: model.safetensors differs from its digest" in skipped[0]
    assert resumed(tmp_path / "nowhere") == (None, [])


def test_a_checkpoint_older_than_a_setting_resumes_with_its_default(tmp_path):
    """A state.json written before --tau and --experts existed lacks them, which is the same as their defaults."""
    state = state_of(0)
    tensors, described = state.saved(ALONE)
    old = {k: v for k, v in CONFIG.stored().items() if k not in ("tau", "experts")}
    content = {"epochs_done": 1, "steps_done": 5, "num_classes": 4, "config": old} | described
    checkpoint.write(tmp_path / "checkpoints/1-5", tensors, content)
    assert resumed(tmp_path)[0].epochs_done == 1
    with pytest.raises(UserError, match="experts: 1 -> 2"):
        resumed(tmp_path, CONFIG.changed(experts=2))


def test_resuming_updates_a_pointer_that_a_killed_run_could_not(tmp_path):
    for epoch in (1, 2):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch * 5)
    (tmp_path / "checkpoints/last").write_text("1-5\n")
    resumed(tmp_path)
    assert find(tmp_path, "last").epochs_done == 2


def test_the_best_checkpoint_is_the_earliest_valid_one_with_the_highest_score(tmp_path):
    for epoch in (1, 2, 3, 4):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch * 5, keep=9)
    scores = {1: 40.0, 2: 55.0, 3: 60.0, 4: 60.0}
    choose_best(tmp_path, scores, verify=True)
    assert find(tmp_path, "best").epochs_done == 3
    (tmp_path / "checkpoints/3-15/model.safetensors").write_bytes(b"")
    choose_best(tmp_path, scores, verify=True)
    assert find(tmp_path, "best").epochs_done == 4
    choose_best(tmp_path, {3: 60.0}, verify=True)
    assert not (tmp_path / "checkpoints/best").exists()


def test_a_failed_write_leaves_the_previous_checkpoint_intact(tmp_path, monkeypatch):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    original, calls = checkpoint.save_file, []

    def disk_full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(
        UserError, match=r"2-10: the checkpoint could not be written: No space left .*; earlier ones are intact"
    ):
        save(tmp_path, state_of(1), CONFIG, epochs_done=2, steps_done=10)
    assert find(tmp_path).epochs_done == 1
    assert resumed(tmp_path)[0].epochs_done == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1-5", "last"]


def test_pruning_keeps_the_newest_checkpoints_and_those_that_a_pointer_names(tmp_path):
    for epoch in range(1, 6):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch, keep=9)
    choose_best(tmp_path, {2: 1.0})
    prune(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2-2", "4-4", "5-5", "best", "last"]


def test_a_user_may_name_a_run_a_checkpoint_or_a_file(tmp_path):
    for epoch in (1, 2):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch)
    assert find(tmp_path).epochs_done == 2
    assert find(tmp_path / "checkpoints/1-1").epochs_done == 1
    assert find(tmp_path / "checkpoints/1-1/model.safetensors").run == tmp_path
    with pytest.raises(UserError, match="no best checkpoint"):
        find(tmp_path, "best")
    (tmp_path / "checkpoints/best").write_text("1-1\n")
    assert find(tmp_path).epochs_done == 1
    assert find(tmp_path, "last").epochs_done == 2
    with pytest.raises(UserError, match="there is no checkpoint"):
        find(tmp_path / "checkpoints/none")


def test_resuming_with_another_configuration_names_each_changed_key(tmp_path):
    save(tmp_path, state_of(0), Config.of(seed=1, lr=0.1, workers=3), epochs_done=1, steps_done=5)
    with pytest.raises(UserError, match=r"lr: 0\.1 -> 0\.2; seed: 1 -> 2") as raised:
        resumed(tmp_path, Config.of(seed=2, lr=0.2, workers=0))
    assert "; seed: 1 -> 2; harmless: workers: 3 -> 0)" in str(raised.value)
    assert resumed(tmp_path, Config.of(seed=1, lr=0.1, workers=0))[0] is not None


def test_evaluation_loads_the_moving_average(tmp_path):
    state = state_of(0, steps=3)
    save(tmp_path, state, CONFIG, epochs_done=1, steps_done=3)
    model = network(5)
    find(tmp_path).load_evaluated(model)
    assert torch.equal(model[0].weight, state.ema.module[0].weight)
    assert not torch.equal(model[0].weight, state.model[0].weight)


def test_the_stored_configuration_is_checked_when_it_is_read(tmp_path):
    save(tmp_path, state_of(0), Config.of(pretrained_file="gone.bin", alpha=0.3), epochs_done=1, steps_done=5)
    found = find(tmp_path)
    assert found.config()["alpha"] == 0.3  # files that only training needs may be missing
    assert found.config(batch_size=7)["batch_size"] == 7
    with pytest.raises(UserError, match=r"batch_size \(--batch-size\): 0 is below 2"):
        found.config(batch_size=0)


def test_weights_are_stored_as_safetensors_with_the_models_keys(tmp_path):
    state = state_of(0)
    save(tmp_path, state, CONFIG, epochs_done=1, steps_done=5)
    assert set(load_file(tmp_path / "checkpoints/1-5/model.safetensors")) == set(state.model.state_dict())


def test_sums_continue_in_each_process_or_in_the_first_if_the_number_of_processes_changes():
    progress = Progress(0, 2, loss_sums=[1.0, 2.0], hits=[3.0, 4.0], images=16)
    assert [progress.own_sums(rank, 2) for rank in (0, 1)] == [(1.0, 3.0), (2.0, 4.0)]
    assert [progress.own_sums(rank, 3) for rank in (0, 1, 2)] == [(3.0, 7.0), (0.0, 0.0), (0.0, 0.0)]
    assert progress.own_sums(0, 1) == (3.0, 7.0)
    assert Progress().own_sums(0, 1) == (0, 0)
    stats = progress.stats(is_mixed=False)
    assert (stats.loss, stats.accuracy) == (1.5, 100 * 7 / 16)


def test_an_existing_checkpoint_is_written_again_only_if_it_is_damaged(tmp_path):
    """While a checkpoint is rewritten, there is none for a moment."""
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    file = tmp_path / "checkpoints/1-5/model.safetensors"
    before = file.stat().st_ino
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    assert file.stat().st_ino == before
    file.write_bytes(b"")
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    assert find(tmp_path).tensors("model")


@pytest.mark.parametrize("steps_per_epoch", [10, 30])
def test_a_forced_resume_with_another_number_of_steps_begins_after_the_last_whole_epoch(tmp_path, steps_per_epoch):
    """So does a second forced resume, if the first dies before it writes a checkpoint. A checkpoint that it writes within
    the next epoch is then the newest."""
    finished = [Progress(epoch, 20, [1.0], [0.0]) for epoch in range(2)]
    for progress in (*finished, Progress(2, 7, [1.0], [0.0])):
        save_within(tmp_path, state_of(0), CONFIG, progress, 20, keep=9)
    other = CONFIG.changed(batch_size=256)
    for _ in range(2):
        found, messages = resumed(tmp_path, other, steps_per_epoch=steps_per_epoch, force=True)
        assert found.progress_in(steps_per_epoch) == Progress(2)
        assert "batch_size: 128 -> 256" in messages[0]
        assert find(tmp_path).epochs_done == 2
        assert find(tmp_path).ended_an_epoch
        choose_best(tmp_path, {1: 40.0, 2: 50.0}, verify=True)
        assert find(tmp_path, "best").epochs_done == 2
    save_within(tmp_path, state_of(0), other, Progress(2, 4, [1.0], [0.0]), steps_per_epoch, keep=9)
    found, messages = resumed(tmp_path, other, steps_per_epoch=steps_per_epoch)
    assert (found.progress_in(steps_per_epoch).epoch, found.progress_in(steps_per_epoch).steps) == (2, 4)
    assert messages == []


def test_a_forced_resume_with_another_number_of_steps_needs_a_whole_epoch(tmp_path):
    save_within(tmp_path, state_of(0), CONFIG, Progress(0, 7, [1.0], [0.0]), 20)
    with pytest.raises(UserError, match=r"no checkpoint of a whole epoch .* start again with --overwrite"):
        resumed(tmp_path, CONFIG.changed(batch_size=256), steps_per_epoch=10, force=True)
    assert resumed(tmp_path, CONFIG, steps_per_epoch=20)[0].progress_in(20).steps == 7


def test_a_damaged_best_checkpoint_is_not_chosen_again(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch * 5, keep=9)
    scores = {1: 40.0, 2: 60.0, 3: 50.0}
    (tmp_path / "checkpoints/2-10/model.safetensors").write_bytes(b"")
    for verify in (True, False):
        choose_best(tmp_path, scores, verify)
        assert find(tmp_path, "best").epochs_done == 3


def test_a_checkpoint_within_an_epoch_is_never_the_best(tmp_path):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    save_within(tmp_path, state_of(0), CONFIG, Progress(2, 3, [1.0], [0.0]), 5)
    choose_best(tmp_path, {1: 40.0, 2: 60.0}, verify=True)
    assert find(tmp_path, "best").epochs_done == 1


def test_a_run_that_has_trained_more_epochs_than_requested_is_refused(tmp_path):
    save(tmp_path, state_of(0), CONFIG.changed(epochs=4), epochs_done=4, steps_done=20)
    with pytest.raises(UserError, match="has trained 4 epochs; give --epochs 4 or more"):
        resumed(tmp_path, CONFIG.changed(epochs=3), force=True)


def test_a_dataset_with_another_name_and_the_same_lists_is_not_a_change(tmp_path):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5, lists={"train": "abc"})
    elsewhere = CONFIG.changed(data="/elsewhere")
    assert resumed(tmp_path, elsewhere, lists={"train": "abc"})[0].epochs_done == 1
    with pytest.raises(UserError, match=r"data: .* -> '/elsewhere'; train\.txt contains other images"):
        resumed(tmp_path, elsewhere, lists={"train": "xyz"})


def opened(run):
    """Enter a run's folder as a run does."""
    return run_folder.open_run(run, {"config": CONFIG.stored()}, False, ALONE)


def test_a_first_checkpoint_is_kept_if_its_pointer_cannot_be_written(tmp_path, monkeypatch):
    def disk_full(file, text):
        raise OSError(28, "No space left on device", str(file))

    def saves_at_the_end(run):
        with opened(run):
            monkeypatch.setattr(run_folder, "write_atomically", disk_full)
            save(run, state_of(0), CONFIG, epochs_done=1, steps_done=5)

    run = tmp_path / "run"
    with pytest.raises(OSError, match="No space"):
        saves_at_the_end(run)
    monkeypatch.undo()
    assert resumed(run)[0].epochs_done == 1


def test_files_that_a_killed_process_left_incomplete_are_removed_when_the_run_resumes(tmp_path):
    run = tmp_path / "run"
    with opened(run):
        save(run, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    (run / "checkpoints/.77-0123abcd.2-10").mkdir()
    for name in ("checkpoints/.77-0123abcd.last", ".77-0123abcd.summary.csv", ".2024.mine"):
        (run / name).write_text("1-5")
    with opened(run):
        assert [p.name for p in run.rglob(".*")] == [".2024.mine"]


def test_a_tensor_with_a_number_that_is_not_finite_is_named():
    state = state_of(0, steps=1)
    tensors, _ = state.saved(ALONE)
    assert not_finite(tensors["model"], state.model) is None
    for part, name in (("ema", "0.weight"), ("model", "1.running_var"), ("model", "0.bias")):
        before = tensors[part][name].clone()
        tensors[part][name][0] = float("nan")
        assert not_finite(tensors[part], state.model) == name
        tensors[part][name].copy_(before)


@pytest.mark.parametrize("whole", [atomic_file, atomic_folder])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, whole):
    """The operating system's error of a write names none."""
    with pytest.raises(OSError, match="No space") as raised, whole(tmp_path / "there"):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "there")
    assert not list(tmp_path.iterdir())

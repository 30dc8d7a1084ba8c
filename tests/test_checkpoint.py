"""Checkpoints appear whole or not at all, verify themselves, and bring everything back."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from reslt import checkpoint
from reslt.checkpoint import find, load, prune, save, to_resume
from reslt.config import Config
from reslt.errors import UserError
from reslt.optim import create_ema, create_optimizer
from reslt.train_state import TrainState

CONFIG = Config(model_ema=True)


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def state_of(seed: int, opt: str = "sgd", steps: int = 0) -> TrainState:
    model = network(seed)
    config = Config(model_ema=True, opt=opt, lr=0.01)
    optimizer, ema = create_optimizer(config, model), create_ema(config, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        ema.update(model, step=7)
    return TrainState(model, ema, optimizer, None, 4)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_checkpoint_brings_weights_average_and_optimizer_back(tmp_path, opt):
    before, after = state_of(0, opt, steps=3), state_of(1, opt)
    save(tmp_path, before, CONFIG, epochs_done=2, steps_done=10)
    assert after.restore(find(tmp_path)) == 2
    for old, new in ((before.model, after.model), (before.ema.module, after.ema.module)):
        for key, value in old.state_dict().items():
            assert torch.equal(value, new.state_dict()[key]), key
    torch.manual_seed(5)
    batch = torch.randn(5, 3)
    for s in (before, after):  # the next step is the same: the optimizer's moments came back
        s.optimizer.zero_grad()
        s.model(batch).square().sum().backward()
        s.optimizer.step()
    for old, new in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_loss_scale_of_fp16_comes_back(tmp_path):
    before, after = state_of(0), state_of(1)
    before.scaler, after.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 2.0))
    before.scaler.scale(torch.zeros(1))  # the scale is made at first use
    save(tmp_path, before, CONFIG, epochs_done=1, steps_done=5)
    after.restore(find(tmp_path))
    assert after.scaler.get_scale() == 1024.0


def test_optimizers_with_nested_state_come_back(tmp_path):
    """timm's kron keeps lists of tensors, None and numbers per parameter."""

    content = {
        "state": {0: {"step": 3, "mu": torch.ones(2), "Q": [torch.eye(2), torch.zeros(3)], "exprs": None}, 2: {}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.99], "params": [0, 1, 2]}],
    }
    before, after, brought_back = state_of(0), state_of(1), []
    before.optimizer = SimpleNamespace(state_dict=lambda: content)
    after.optimizer = SimpleNamespace(load_state_dict=brought_back.append)
    save(tmp_path, before, CONFIG, epochs_done=1, steps_done=5)
    after.restore(find(tmp_path))
    assert repr(brought_back) == repr([content])


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


def test_resume_takes_the_newest_that_verifies_and_says_what_it_skipped(tmp_path):
    for epoch in (9, 10):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch)
    assert to_resume(tmp_path, CONFIG, 4)[0].epochs_done == 10  # by number, not by name
    (tmp_path / "checkpoints/10-10/model.safetensors").write_bytes(b"")
    found, skipped = to_resume(tmp_path, CONFIG, 4)
    assert found.epochs_done == 9
    assert len(skipped) == 1
    assert "10-10: the checkpoint is damaged: model.safetensors differs from its digest" in skipped[0]
    assert to_resume(tmp_path / "nowhere", CONFIG, 4) == (None, [])


def test_a_checkpoint_from_before_a_setting_existed_resumes_with_its_default(tmp_path):
    """As written before --tau and --experts: state.json lacks them, which is the same as their defaults."""
    state = state_of(0)
    tensors, described = state.saved()
    old = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k not in ("tau", "experts")}
    content = {"epochs_done": 1, "steps_done": 5, "is_best": False, "config": old} | described
    checkpoint.write(tmp_path / "checkpoints/1-5", tensors, content)
    assert to_resume(tmp_path, CONFIG, 4)[0].epochs_done == 1
    with pytest.raises(UserError, match="experts: 1 -> 2"):
        to_resume(tmp_path, dataclasses.replace(CONFIG, experts=2), 4)


def test_resuming_sets_pointers_that_a_killed_run_could_not(tmp_path):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=1, is_best=True)
    save(tmp_path, state_of(0), CONFIG, epochs_done=2, steps_done=2, is_best=True)
    for pointer in ("last", "best"):
        (tmp_path / "checkpoints" / pointer).write_text("1-1\n")
    to_resume(tmp_path, CONFIG, 4)
    assert find(tmp_path, "last").epochs_done == find(tmp_path, "best").epochs_done == 2


def test_resuming_behind_a_damaged_best_goes_back_to_the_best_before(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch, is_best=epoch != 2)
    (tmp_path / "checkpoints/3-3/model.safetensors").write_bytes(b"")
    to_resume(tmp_path, CONFIG, 4)
    assert find(tmp_path, "last").epochs_done == 2
    assert find(tmp_path, "best").epochs_done == 1


def test_a_write_that_fails_leaves_the_previous_checkpoint_alone(tmp_path, monkeypatch):
    save(tmp_path, state_of(0), CONFIG, epochs_done=1, steps_done=5)
    original, calls = checkpoint.save_file, []

    def disk_full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, state_of(1), CONFIG, epochs_done=2, steps_done=10)
    assert find(tmp_path).epochs_done == 1
    assert to_resume(tmp_path, CONFIG, 4)[0].epochs_done == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1-5", "last"]


def test_pruning_keeps_the_newest_and_what_a_pointer_names(tmp_path):
    for epoch in range(1, 6):
        save(tmp_path, state_of(0), CONFIG, epochs_done=epoch, steps_done=epoch, is_best=epoch == 2)
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
    save(tmp_path, state_of(0), Config(seed=1, lr=0.1, workers=3), epochs_done=1, steps_done=5)
    with pytest.raises(UserError, match=r"lr: 0\.1 -> 0\.2; seed: 1 -> 2") as fault:
        to_resume(tmp_path, Config(seed=2, lr=0.2, workers=0), 4)
    assert "workers" not in str(fault.value)
    assert to_resume(tmp_path, Config(seed=1, lr=0.1, workers=0), 4)[0] is not None


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    state = state_of(0, steps=3)
    save(tmp_path, state, CONFIG, epochs_done=1, steps_done=3)
    model = network(5)
    find(tmp_path).load_evaluated(model)
    assert torch.equal(model[0].weight, state.ema.module[0].weight)
    assert not torch.equal(model[0].weight, state.model[0].weight)


def test_the_configuration_inside_is_checked_on_reading(tmp_path):
    save(tmp_path, state_of(0), Config(pretrained_file="gone.bin", alpha=0.3), epochs_done=1, steps_done=5)
    found = find(tmp_path)
    assert found.config().alpha == 0.3  # a file that was needed for training alone is not asked for
    assert found.config(batch_size=7).batch_size == 7
    with pytest.raises(UserError, match=r"batch_size \(--batch-size\): 0 is below 2"):
        found.config(batch_size=0)


def test_weights_are_plain_safetensors_with_the_models_keys(tmp_path):
    state = state_of(0)
    save(tmp_path, state, CONFIG, epochs_done=1, steps_done=5)
    assert set(load_file(tmp_path / "checkpoints/1-5/model.safetensors")) == set(state.model.state_dict())
    json.loads((tmp_path / "checkpoints/1-5/state.json").read_text())

"""A checkpoint with any content and valid digests is either loaded or refused with a user's error."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from builders import optimizer_of
from conftest import ALONE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reslt.config.schema import Config
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.data.classes import Classes
from reslt.runs import checkpoint, resume
from reslt.runs import folder as run_folder
from reslt.training.optim import create_ema
from reslt.training.state import Progress, TrainState

FACTOR = int(os.environ.get("RESLT_FUZZ", "1"))
CONFIG = Config.of(model_ema=True, opt="adamw", lr=0.01)
SPLITS = {"standard": {"by": "count", "many_above": 9, "few_below": 3}}
CLASSES = Classes(4, ("a", "b", "c", "d"), np.array([9, 5, 2, 1]), SPLITS, {"train": "abc"})

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["model", "../../x", "0.exp_avg", "1-5", "nan"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def trained_state() -> TrainState:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer, ema = optimizer_of(CONFIG, model), create_ema(CONFIG.optim, model)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return TrainState(model, ema, optimizer, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with one checkpoint at the end of its first epoch, and the content of its state.json."""
    folder = tmp_path_factory.mktemp("run")
    run_folder.begin_save(folder, trained_state(), CONFIG.stored(), ALONE, Progress(0, 5), 5, CLASSES)()
    return folder, json.loads((folder / "checkpoints/1-5/state.json").read_text())


def places(value, path=()) -> list[tuple]:
    """Return the paths of all values within a nested one."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


def changed(state: dict, path: tuple, value, is_removed: bool):
    """Return a copy with another value, or none, at one path."""
    if not path:
        return value
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if is_removed:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def resumes(run, content: bytes) -> bool:
    """Return whether a run resumes from a checkpoint with this state.json; only a user's error is caught."""
    folder = run / "checkpoints/1-5"
    (folder / "state.json").write_bytes(content)
    names = sorted(file.name for file in folder.iterdir() if file.name != checkpoint.SUMS)
    (folder / checkpoint.SUMS).write_text(checkpoint._sums(folder, names))
    try:
        found, _ = resume.to_resume(run, CONFIG.stored(), CLASSES, 5, stages_of(CONFIG))
        trained_state().restore(found, ALONE)
        progress = found.progress_in(5)
        found.config()
    except UserError:
        return False
    assert found.epochs_done >= 0
    assert 0 <= progress.steps <= 5
    return True


@settings(
    max_examples=150 * FACTOR,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def changed_states(run, counts, data):
    folder, state = run
    path = data.draw(st.sampled_from(places(state)))
    content = changed(state, path, data.draw(values), data.draw(st.booleans()) and bool(path))
    counts[resumes(folder, json.dumps(content).encode())] += 1


def test_a_checkpoint_with_a_changed_state_is_loaded_or_refused(run):
    counts = {True: 0, False: 0}
    changed_states(run, counts)
    assert min(counts.values()) > 20, counts


@settings(max_examples=50 * FACTOR, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | st.just(b"[" * 100_000))
def test_a_checkpoint_with_random_bytes_as_its_state_is_refused(run, content):
    assert not resumes(run[0], content)

"""Parts of a user's own, from one file outside the package."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_FLAGS
from safetensors.torch import load_file

from reslt.config import imports
from reslt.config.methods import METHODS, Method, register_method
from reslt.config.parts import PARTS, Part, register
from reslt.config.resolve import resolve
from reslt.config.schema import Config
from reslt.core.errors import UserError
from reslt.methods.registry import create_loss
from reslt.models.fold import load_folded

PROJECT = Path(__file__).resolve().parents[1]
MODULE = '''
"""A made-up cost, class weights, sampler, head and term between experts."""
import torch
from reslt.config.methods import Method, register_method
from reslt.config.parts import register
from reslt.methods.costs import Cost
from reslt.models.heads import Head


class PolyLoss(Cost):
    """-log p_c + epsilon (1 - p_c)"""

    def __init__(self, counts, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits, uniform=None):
        log_p = self.adjusted(logits).log_softmax(-1)
        return -log_p + self.epsilon * (1 - log_p.exp())


class Tempered(Head):
    """Logits divided by a learned temperature."""

    def __init__(self, linear, start=1.0):
        super().__init__(linear)
        self.weight, self.bias, self.start = linear.weight, linear.bias, start
        self.temperature = torch.nn.Parameter(torch.tensor(float(start)))

    def reset_parameters(self):
        torch.nn.Linear.reset_parameters(self)
        torch.nn.init.constant_(self.temperature, self.start)

    def logits(self, features):
        return torch.nn.functional.linear(features, self.weight, self.bias) / self.temperature


def only_the_rarest(counts, power=0.0):
    return (counts == counts.min()) * counts**power


def root_weights(counts, root=2):
    return counts ** (-1 / root)


class Variance(torch.nn.Module):
    def forward(self, logits):
        return -logits.softmax(-1).var(0, keepdim=True).sum(-1).expand(len(logits), -1)


register("cost", "poly", PolyLoss, "PolyLoss (Leng et al. 2022)", epsilon=1.0)
register("head", "tempered", Tempered, start=1.0)
register("sampler", "rarest", only_the_rarest)
register("class_weights", "root", root_weights, root=2)
register("mutual", "variance", Variance)
register_method("poly", Method("a made-up method", cost="poly", head="tempered", sampler="rarest"))
'''


@pytest.fixture
def own_parts(tmp_path):
    """The module above, as a user writes it; its names are gone afterwards."""
    registries = [*PARTS.values(), METHODS]
    before = [dict(registry) for registry in registries]
    file = tmp_path / "own_parts.py"
    file.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("own_parts", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def flags(data, output, *more) -> list:
    return ["--data", data, "--output", output, "--experiment", "run", *TINY_FLAGS, *more]


def fault(*arguments) -> str:
    with pytest.raises(UserError) as raised:
        resolve(["--experiment", "nowhere", *map(str, arguments)])
    return str(raised.value)


PARTS_OF_POLY = (
    "--method",
    "ce",
    "--cost",
    "poly",
    "--head",
    "tempered",
    "--sampler",
    "rarest",
    "--class-weights",
    "root",
)


def test_a_cost_a_head_a_sampler_and_weights_from_a_file_outside_train_with_their_arguments(
    tiny, tmp_path, run_script, own_parts
):
    """16, 8 and 4 images: the sampler draws the last class alone, so class 2 is all that the model knows in the end."""
    more = ("--part-kwargs", "epsilon=2", "start=0.5", "--smoothing", 0.1)
    outcome = run_script("train", *flags(tiny, tmp_path, *PARTS_OF_POLY, *more))
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    stored = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert stored["part_kwargs"] == {"epsilon": 2, "start": 0.5}
    assert (stored["cost"], stored["head"], stored["sampler"]) == ("poly", "tempered", "rarest")
    accuracy = pd.read_csv(run / "per_class.csv").filter(like="accuracy").iloc[:, 0]
    assert accuracy.tolist() == [0, 0, 100]
    weights = load_file(run / "checkpoints/2-6/model.safetensors")
    assert 0 < weights["backbone.fc.temperature"].item() != 0.5
    folded = run_script("evaluate", "--ckpt", run, "--fold", tmp_path / "x.safetensors")
    assert folded.code == 0, folded.err
    loaded, described = load_folded(tmp_path / "x.safetensors")
    assert described["part_kwargs"] == {"start": 0.5}  # the head's
    assert torch.equal(loaded.fc.temperature, weights["backbone.fc.temperature"])


def test_a_registered_method_is_a_bundle_like_any_other(tiny, tmp_path, run_script, own_parts):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: poly\npart_kwargs: {epsilon: 0.5}\n")
    outcome = run_script("train", *flags(tiny, tmp_path, "--recipe", recipe, "--epochs", 1))
    assert outcome.code == 0, outcome.err
    config = resolve(["--recipe", str(recipe), "--part-kwargs", "start=3"]).config
    assert config.method.part_kwargs == {"epsilon": 0.5, "start": 3}  # single arguments are replaced
    assert (config.method.cost, config.method.head, config.method.sampler) == ("poly", "tempered", "rarest")


def test_a_registered_term_between_experts_is_weighted(tiny, tmp_path, run_script, own_parts):
    more = ("--experts", 2, "--mutual", "variance", "--mutual-weight", 0.3, "--epochs", 1)
    outcome = run_script("train", *flags(tiny, tmp_path, *more))
    assert outcome.code == 0, outcome.err


def test_what_the_module_computes_is_its_own_formula(own_parts):
    from builders import loss_of

    config = Config.of(method="ce", cost="poly", class_weights="root", part_kwargs={"root": 1, "epsilon": 3.0})
    loss, logits = loss_of(config, torch.tensor([8, 2]).numpy()), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    p = logits[0].softmax(-1)
    costs = [-p[0, 0].log() + 3 * (1 - p[0, 0]), -p[1, 1].log() + 3 * (1 - p[1, 1])]
    wanted = (costs[0] / 8 + costs[1] / 2) / (1 / 8 + 1 / 2)
    assert loss(logits, torch.tensor([0, 1])).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_an_argument_that_no_chosen_part_takes_is_a_fault(own_parts, tmp_path):
    assert fault(*PARTS_OF_POLY, "--part-kwargs", "epsilo=2") == (
        "part_kwargs: no chosen part takes 'epsilo' (did you mean epsilon?); they take epsilon, root, start"
    )
    assert fault("--method", "ce", "--cost", "poly", "--part-kwargs", "start=2").startswith(
        "part_kwargs: no chosen part takes 'start'"
    )
    unused = fault("--method", "ce", "--part-kwargs", "epsilon=2")
    assert unused.startswith(
        "--part-kwargs: method ce does not use it (--cost poly or --class-weights root or --head tempered does)"
    )
    assert "--part-kwargs: 'epsilon' is not KEY=VALUE" in fault("--cost", "poly", "--part-kwargs", "epsilon")
    assert "does not use it" in fault("--method", "ce", "--sampler", "rarest", "--part-kwargs", "power=2")


def test_a_part_of_a_stage_takes_arguments_too(own_parts, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\nstages: [{start: 0.5, cost: poly}]\npart_kwargs: {epsilon: 2}\n")
    assert resolve(["--recipe", str(recipe)]).config.method.part_kwargs == {"epsilon": 2}


def test_without_the_module_its_names_are_unknown():
    for kind, name in (("cost", "poly"), ("head", "tempered"), ("sampler", "rarest"), ("class-weights", "root")):
        field = kind.replace("-", "_")
        assert fault("--method", "ce", f"--{kind}", name).startswith(f"{field} (--{kind}): '{name}' is not one of ")
    assert fault("--method", "poly").startswith("method (--method): 'poly' is not one of ")


def test_names_that_exist_and_kinds_that_do_not_are_refused(own_parts):
    with pytest.raises(UserError, match="a cost 'ce' exists already; register yours under another name"):
        register("cost", "ce", torch.nn.Module)
    with pytest.raises(UserError, match="'network' is not a kind of part"):
        register("network", "mine", torch.nn.Module)
    with pytest.raises(UserError, match="a method 'crt' exists already"):
        register_method("crt", Method("mine"))
    with pytest.raises(UserError, match=r"no cost 'poli' \(did you mean poly\?\)"):
        register_method("mine", Method("mine", cost="poli"))


def test_the_documented_module_trains_and_evaluates_with_import_alone(tiny, tmp_path, run_script, monkeypatch):
    """The block my_parts.py of docs/extending.md, in the current folder. Its sampler draws the classes of 16, 8 and 4 images;
    without the flag, evaluation names it."""
    registries = [*PARTS.values(), METHODS]
    before = [dict(registry) for registry in registries]
    code = re.search(r"```python\n(# my_parts\.py\n.*?)```", (PROJECT / "docs/extending.md").read_text(), re.DOTALL)[1]
    (tmp_path / "my_parts.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    more = ("--cost", "poly", "--part-kwargs", "epsilon=2", "--sampler", "cube_root", "--method", "ce")
    outcome = run_script("train", *flags(tiny, tmp_path, *more), "--import", "my_parts.py")
    assert outcome.code == 0, outcome.err
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    monkeypatch.setattr(imports, "_loaded", set())  # as in another process
    outcome = run_script("evaluate", "--ckpt", tmp_path / "run")
    assert outcome.code == 2
    assert "--import my_parts.py" in outcome.err


def test_a_registered_cost_that_is_no_cost_is_refused(monkeypatch):
    """It would lack the prior, the kind of mean and the random numbers of one."""
    monkeypatch.setitem(PARTS["cost"], "plain", Part("a plain module", build=lambda counts: torch.nn.Identity()))
    with pytest.raises(
        UserError, match=r"--cost plain: it builds Identity; derive that from reslt\.methods\.costs\.Cost"
    ):
        create_loss(Config.of(method="ce", cost="plain").method, np.array([3, 2]))

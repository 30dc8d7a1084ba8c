"""Flags, recipes and dataset defaults: their precedence, and all errors reported at once before torch is loaded."""

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import fault

from reslt.config import places
from reslt.config.methods import METHODS
from reslt.config.places import DESCRIPTIONS, PROJECT
from reslt.config.resolve import configure, resolve
from reslt.config.schema import DEFAULTS, FIELDS, SECTIONS, Config, flag_of
from reslt.core.errors import UserError
from reslt.reproduce.rows import create_run


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("RESLT_LISTS", raising=False)
    monkeypatch.setattr(Config, "run_folder", property(lambda config: Path("/nowhere") / str(config["experiment"])))


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "train.txt").write_text("a.png 0\n")
    return folder


def test_help_is_printed_within_a_second_and_without_torch():
    seconds = []
    for _ in range(3):  # the fastest of three counts: another process may be busy
        start = time.perf_counter()
        printed = subprocess.run(
            [sys.executable, "train.py", "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert all(flag_of(name) in printed.stdout for name, f in FIELDS.items() if f.metadata["is_flag"])
    assert min(seconds) < 1
    code = "import sys; from reslt.config.resolve import resolve; resolve([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_flags_beat_the_recipe_which_beats_the_dataset_which_beats_the_defaults(dataset, tmp_path):
    (dataset / "info.yaml").write_text(
        "defaults: {epochs: 7, lr: 0.7, momentum: 0.7, per_model: {resnet18: {lr: 0.8}}}"
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"data: {dataset}\nlr: 0.6\nepochs: 6\npaper: {{table: 5, all: 45.34}}\n")
    resolved = resolve(["--recipe", str(recipe), "--epochs", "5"])
    config = resolved.config
    assert (config["epochs"], config["lr"], config["momentum"], config["weight_decay"]) == (
        5,
        0.6,
        0.7,
        DEFAULTS["weight_decay"],
    )
    assert resolved.paper == [{"table": 5, "all": 45.34}]
    assert resolve(["--data", str(dataset), "--model", "resnet18"]).config["lr"] == 0.8
    assert resolve(["--data", str(dataset), "--model", "resnet34"]).config["lr"] == 0.7


@pytest.fixture
def ce_defaults(monkeypatch):
    """Return a function that gives the method `ce` defaults of its own: ce_defaults(lr=0.9)."""
    return lambda **own: monkeypatch.setitem(METHODS, "ce", dataclasses.replace(METHODS["ce"], defaults=own))


def test_a_methods_own_defaults_beat_only_the_built_in_ones(dataset, tmp_path, ce_defaults):
    """Each stronger source states one setting fewer."""
    ce_defaults(momentum=0.1, lr=0.1, epochs=1, batch_size=4)
    (dataset / "info.yaml").write_text("defaults: {lr: 0.2, epochs: 2, batch_size: 6}")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 3\nbatch_size: 8\n")
    arguments = ["--data", str(dataset), "--recipe", str(recipe), "--batch-size", "10", "--method"]
    names = ("weight_decay", "momentum", "lr", "epochs", "batch_size")
    config = resolve([*arguments, "ce"]).config
    assert [config[name] for name in names] == [DEFAULTS["weight_decay"], 0.1, 0.2, 3, 10]
    config = resolve([*arguments, "reslt"]).config
    assert [config[name] for name in names] == [DEFAULTS["weight_decay"], DEFAULTS["momentum"], 0.2, 3, 10]


def test_a_methods_own_defaults_apply_wherever_the_method_is_chosen(dataset, tmp_path, ce_defaults):
    ce_defaults(lr=0.7)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\n")
    assert resolve(["--data", str(dataset), "--recipe", str(recipe)]).config["lr"] == 0.7
    assert configure({"data": str(dataset), "method": "ce"})["lr"] == 0.7
    (dataset / "info.yaml").write_text("defaults: {method: ce}")
    assert resolve(["--data", str(dataset)]).config["lr"] == 0.7


def test_an_invalid_default_of_a_method_is_reported_with_the_methods_name(dataset, ce_defaults):
    ce_defaults(lr=-1)
    assert fault("--data", dataset, "--method", "ce") == "lr (method ce): -1.0 is not above 0"


NOT_OF_CE = {
    "alpha",
    "branches",
    "branch",
    "branch_at",
    "eval_branch_at",
    "branch_loss",
    "branch_sizes",
    "branch_init_branches",
    "branch_sets",
    "tied_branches",
    "fusion",
}


def test_a_flag_that_the_method_does_not_use_is_an_error(dataset, tmp_path):
    messages = fault("--method", "ce", "--alpha", "0.5", "--branch-sizes", "2", "1", "--smoothing", "0.1")
    assert "2 errors" in messages
    assert "--alpha: method ce does not use it (--network reslt does); leave it out" in messages
    assert "--branch-sizes: method ce does not use it" in messages
    (dataset / "info.yaml").write_text("defaults: {method: ce}")
    assert "--alpha: method ce does not use it" in fault("--data", dataset, "--alpha", "0.5")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\n")
    assert "--alpha: method ce does not use it" in fault("--recipe", recipe, "--alpha", "0.5")
    assert resolve(["--recipe", str(recipe), "--alpha", "0.5", "--method", "reslt"]).config["alpha"] == 0.5


def test_a_recipe_must_not_state_what_its_own_method_does_not_use(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\nalpha: 0.5\nlr: 0.1\n")
    expected = f"recipe {recipe}: alpha: method ce does not use it (--network reslt does); leave it out"
    assert fault("--recipe", recipe) == expected
    assert resolve(["--recipe", str(recipe), "--method", "reslt"]).config["alpha"] == 0.5


@pytest.mark.parametrize(
    ("info", "recipe", "flags"),
    [
        ("defaults: {alpha: 0.5}", "", ["--method", "ce"]),
        ("defaults: {alpha: 0.5, method: ce}", "", []),
        ("defaults: {alpha: 0.5, per_model: {resnet18: {branch: bn}}}", "method: ce", ["--model", "resnet18"]),
        ("", "method: reslt\nalpha: 0.5\nbranch: bn", ["--method", "ce"]),
        ("", "alpha: 0.5\nbranch_sizes: [2, 1]", ["--method", "ce"]),
        ("defaults: {method: ce}", "alpha: 0.5", []),
    ],
)
def test_a_setting_that_was_meant_for_another_method_is_ignored(dataset, tmp_path, info, recipe, flags):
    (dataset / "info.yaml").write_text(info)
    (tmp_path / "mine.yaml").write_text(recipe)
    config = resolve(["--data", str(dataset), "--recipe", str(tmp_path / "mine.yaml"), *flags]).config
    assert config["method"] == "ce"
    assert {name: config[name] for name in NOT_OF_CE} == {name: DEFAULTS[name] for name in NOT_OF_CE}


def test_flags_for_many_runs_are_dropped_from_those_whose_method_does_not_use_them(dataset, tmp_path):
    passed_on = ["--alpha", "0.5", "--epochs", "3", "--branch-sizes", "2", "1", "--eval-branch-at=pooled", "--nesterov"]
    runs = {}
    for method in ("ce", "reslt"):
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(f"data: {dataset}\nmethod: {method}\n")
        runs[method], _ = create_run(str(recipe), {}, 0, str(tmp_path / "out"), passed_on)
        assert runs[method].fault is None
        assert resolve(list(runs[method].arguments)).config == runs[method].config  # as train.py resolves them
    assert set(passed_on) <= set(runs["reslt"].arguments)
    dropped = {"--alpha", "0.5", "--branch-sizes", "2", "1", "--eval-branch-at=pooled"}
    assert set(passed_on) & set(runs["ce"].arguments) == set(passed_on) - dropped
    assert (runs["ce"].config["epochs"], runs["ce"].config["alpha"]) == (3, DEFAULTS["alpha"])
    assert runs["reslt"].config["branch_sizes"] == (2, 1)


def test_a_planned_run_of_a_recipe_that_train_py_refuses_has_the_same_error(dataset, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"data: {dataset}\nmethod: ce\nalpha: 0.5\n")
    run, _ = create_run(str(recipe), {}, 0, str(tmp_path / "out"), ["--alpha", "0.5"])
    assert run.fault == fault("--recipe", recipe)


def test_only_settings_that_the_method_uses_are_stored():
    stored = Config.of(method="ce", scale=(0.5, 1.0)).stored()
    assert Config.of(method="reslt").stored().keys() - stored.keys() == NOT_OF_CE
    assert Config.of(method="ce", cost="focal").stored().keys() - stored.keys() == {"focal_gamma"}
    assert FIELDS.keys() - stored.keys() >= NOT_OF_CE | {"ldam_margin", "head_groups", "stage2_lr"}
    assert stored["scale"] == [0.5, 1.0]
    assert yaml.safe_load(yaml.safe_dump(stored)) == stored


def test_help_groups_the_flags_by_section(capsys):
    with pytest.raises(SystemExit):
        resolve(["--help"])
    parts = re.split(r"^(\w+):\n", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert [name for name in groups if name != "options"] == ["data", "augment", "model", "method", "optim", "run"]
    found = {name: set(re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)) for name, text in groups.items()}
    for name, flag in dict(
        data="bad-images", augment="aa", model="experts", method="alpha", optim="lr", run="seed"
    ).items():
        assert flag in found[name]
    for name, section in SECTIONS.items():
        assert found[name] == {flag_of(f.name)[2:] for f in dataclasses.fields(section) if f.metadata["is_flag"]}
        assert section.__doc__ in groups[name]


def test_all_errors_of_a_configuration_are_reported_at_once():
    messages = fault("--alpha", "1.5", "--epohcs", "3", "--lr", "fast", "--branches", "3", "--branch-sizes", "2")
    assert "4 errors" in messages
    assert "unknown flag --epohcs (did you mean --epochs?)" in messages
    assert "alpha (--alpha): 1.5 is above 1" in messages
    assert "lr (--lr): 'fast' is not a number" in messages
    assert "branch_sizes: [2] states 1 nested sets" in messages


@pytest.mark.parametrize("value", ["-0.1", "1.01", "nan", "inf"])
def test_alpha_must_be_in_0_to_1(value):
    assert "alpha" in fault("--alpha", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa: 0.5", "mine.yaml: unknown key 'alhpa' (did you mean alpha?)"),
        ("epochs: 3.5", "epochs (recipe"),
        ("epochs: true", "epochs (recipe"),
        ("epochs:", "no value given"),
        ("epochs: 3\nepochs: 4", "duplicate key 'epochs'"),
        ("model: [a]", "model (recipe"),
        ("seed: .inf", "seed (recipe"),
        ("lr: .nan", "lr (recipe"),
        ("nesterov: 1", "nesterov (recipe"),
        ("mean: [0.5, 0.5]", "mean: 2 values given; it takes 3"),
        ("model_kwargs: 3", "model_kwargs (recipe"),
        ("- a list", "mapping"),
        ("paper: 45.34", "paper: must map"),
        ("a: [", "not readable as YAML"),
        ("sched: multistep\ndecay_milestones: []", "decay_milestones: multistep requires"),
    ],
)
def test_an_error_in_a_recipe_names_the_file_and_the_key(tmp_path, text, message):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert message in fault("--recipe", recipe)


def test_an_unknown_key_in_the_defaults_of_info_yaml_is_an_error(dataset):
    (dataset / "info.yaml").write_text("defaults: {lrr: 1, per_model: {resnet18: {epoch: 3}}}")
    messages = fault("--data", dataset)
    assert "info.yaml: unknown key 'lrr'" in messages
    assert "unknown key 'epoch' (did you mean epochs?)" in messages


@pytest.mark.parametrize("text", ["defaults: 3", "defaults: {per_model: 3}", "defaults: {per_model: {resnet50: 3}}"])
def test_defaults_of_a_wrong_shape_are_an_error(dataset, text):
    (dataset / "info.yaml").write_text(text)
    assert "info.yaml: defaults: must map" in fault("--data", dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar100_lt_0.01/resnet23"], "did you mean cifar100_lt_0.01/resnet32?"),
        (["--data", "digit_lt"], "did you mean digits_lt?"),
        (["--alpha"], "expected one argument"),
        (["stray"], "'stray' belongs to no flag"),
        (["--resume", "nowhere"], "resume: nowhere is not the folder of a run"),
        (["--resume", "auto", "--overwrite"], "contradicts"),
        (["--pretrained-file", "none.bin"], "there is no file none.bin"),
        (["--model-kwargs", "width"], "'width' is not KEY=VALUE"),
        (["--method", "resnet"], "not one of reslt, ce"),
        (["--data", ""], "neither a folder nor a dataset"),
        (["--data", "train.py"], "is a file; give the folder"),
        (["--experiment", ""], "not a plain folder name"),
        (["--experiment", "../x"], "not a plain folder name"),
        (["--output", "train.py"], "output: train.py is not a folder"),
        (["--opt", "adamw", "--nesterov"], "nesterov: --opt adamw has no Nesterov switch"),
        (["--color-jitter", "0.4", "0.4", "0.4", "0.9"], "hue 0.9 is above 0.5"),
        (["--seed", str(2**64)], "seed (--seed)"),
        (["--batch-size", "1"], "batch_size (--batch-size): 1 is below 2"),
        # above this limit, the first exchange between processes hangs
        (["--ddp-timeout", "100000000000"], "100000000000 is above 1000000000"),
        (["--pretrained", "true"], "a switch takes no value"),
        (["--model-kwargs", "=3"], "'=3' is not KEY=VALUE"),
        (["--resume", "data_lists"], "is not the folder of a run"),
    ],
)
def test_an_invalid_command_line_is_reported_with_a_remedy(arguments, message):
    assert message in fault(*arguments)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("weight_decay: 1e-4")
    assert resolve(["--recipe", str(tmp_path / "r.yaml")]).config["weight_decay"] == 1e-4


def test_constructor_arguments_are_python_values():
    config = resolve(["--model-kwargs", "layers=(1,1,1,1)", "width=1.5", "act=relu", "--model", "resnet18"]).config
    assert config["model_kwargs"] == {"layers": (1, 1, 1, 1), "width": 1.5, "act": "relu"}


def test_branch_sizes_equal_replaces_a_recipes_sizes():
    assert resolve(["--recipe", "cifar100_lt_0.01/resnet32"]).config["branch_sizes"] == (65, 30)
    messages = fault("--recipe", "cifar100_lt_0.01/resnet32", "--branches", "4")
    assert "--branch-sizes equal" in messages
    config = resolve(["--recipe", "cifar100_lt_0.01/resnet32", "--branches", "4", "--branch-sizes", "equal"]).config
    assert config["branch_sizes"] is None


def test_another_batch_size_with_the_same_learning_rate_is_a_warning():
    warnings = resolve(["--recipe", "cifar100_lt_0.01/resnet32", "--batch-size", "64"]).warnings
    assert len(warnings) == 1
    assert "learning rate is unchanged (0.1)" in warnings[0]
    assert not resolve(["--recipe", "cifar100_lt_0.01/resnet32", "--batch-size", "64", "--lr", "0.05"]).warnings
    assert not resolve(["--recipe", "cifar100_lt_0.01/resnet32"]).warnings


def test_precision_follows_the_launcher_unless_a_flag_states_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve([]).config["mixed_precision"] == "bf16"
    assert resolve(["--mixed-precision", "no"]).config["mixed_precision"] == "no"


def test_a_precision_of_the_launcher_that_is_not_supported_is_reported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "--mixed_precision fp8" in fault()


def test_a_runs_name_contains_the_recipe_or_data_model_and_method_and_the_seed(dataset, tmp_path):
    assert resolve(["--recipe", "cifar10_lt_0.1/resnet32", "--seed", "3"]).config["experiment"] == (
        "cifar10_lt_0.1-resnet32-seed3"
    )
    assert resolve(["--data", str(dataset)]).config["experiment"] == "birds-resnet50-reslt-seed0"
    (tmp_path / "mine.yaml").write_text("{}")
    assert resolve(["--recipe", str(tmp_path / "mine.yaml")]).config["experiment"].endswith("mine-seed0")


@pytest.mark.parametrize(
    ("name", "alpha", "sizes"),
    [
        ("cifar10_lt_0.01", 0.998, (8, 6)),
        ("cifar10_lt_0.02", 0.998, (8, 6)),
        ("cifar10_lt_0.1", 0.96, (8, 6)),
        ("cifar100_lt_0.01", 0.995, (65, 30)),
        ("cifar100_lt_0.02", 0.99, (65, 30)),
        ("cifar100_lt_0.1", 0.72, (65, 30)),
    ],
)
def test_the_cifar_settings_are_the_released_ones(name, alpha, sizes):
    for arguments in (["--data", name], ["--recipe", f"{name}/resnet32"]):
        config = resolve(arguments).config
        assert (config["model"], config["method"], config["alpha"], config["branch"], config["branch_sizes"]) == (
            "cifar_resnet32",
            "reslt",
            alpha,
            "bn",
            sizes,
        )
        assert (
            config["epochs"],
            config["batch_size"],
            config["lr"],
            config["momentum"],
            config["nesterov"],
            config["weight_decay"],
        ) == (
            200,
            128,
            0.1,
            0.9,
            True,
            5e-4,
        )
        assert (config["sched"], config["decay_milestones"], config["decay_rate"], config["warmup_epochs"]) == (
            "multistep",
            (160, 180),
            0.1,
            5,
        )
        assert config["warmup_lr"] == pytest.approx(0.1 / 3)
        assert (config["crop"], config["crop_padding"], config["hflip"]) == ("pad", 4, 0.5)
        assert config["mean"] == (0.4914, 0.4822, 0.4465)
        assert config["std"] == (0.2023, 0.1994, 0.2010)
    assert resolve(["--recipe", f"{name}/resnet32_ce"]).config["method"] == "ce"


def test_every_dataset_description_contains_only_known_keys():
    from reslt.data.datasets import INFO_KEYS

    infos = sorted(DESCRIPTIONS.glob("*/info.yaml"))
    assert len(infos) >= 7
    for info in infos:
        assert set(yaml.safe_load(info.read_text())) <= INFO_KEYS, info


def test_the_projects_datasets_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert places.dataset_folder("digits_lt") == DESCRIPTIONS / "digits_lt"
    monkeypatch.setenv("RESLT_LISTS", str(tmp_path / "mine"))
    assert places.dataset_folder("digits_lt") == DESCRIPTIONS / "digits_lt"


def test_lists_are_looked_up_in_reslt_lists_then_in_this_folder_then_in_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert places.lists_folder() == PROJECT / "data_lists"
    assert places.default_images_folder() == PROJECT / "data"
    (tmp_path / "data_lists").mkdir()
    assert places.lists_folder() == tmp_path / "data_lists"
    assert places.default_images_folder() == tmp_path / "data"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RESLT_LISTS", "~/lists")
    assert places.lists_folder() == tmp_path / "home/lists"
    assert places.default_images_folder() == tmp_path / "home/data"
    monkeypatch.setenv("RESLT_LISTS", "lists")
    assert places.lists_folder() == tmp_path / "lists"


def test_without_a_checkout_lists_are_in_this_folder_even_before_it_exists(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "IS_CHECKOUT", False)
    assert places.lists_folder() == tmp_path / "data_lists"


def test_a_users_folder_is_found_before_the_projects_and_starts_with_its_description(monkeypatch, tmp_path):
    monkeypatch.setenv("RESLT_LISTS", str(tmp_path))
    folder = places.own_folder("places_lt")
    assert folder == places.dataset_folder("places_lt") == tmp_path / "places_lt"
    assert (folder / "info.yaml").read_bytes() == (PROJECT / "data_lists/places_lt/info.yaml").read_bytes()
    (folder / "info.yaml").write_text("num_classes: 3\n")
    assert (places.own_folder("places_lt") / "info.yaml").read_text() == "num_classes: 3\n"
    assert places.own_folder("birds") == tmp_path / "birds"
    assert not (tmp_path / "birds").exists()
    with pytest.raises(UserError, match=r"'place_lt' is neither a folder nor a dataset \(did you mean places_lt\?\)"):
        places.dataset_folder("place_lt")


@pytest.mark.parametrize(
    "aa", ["cifar10", "rand-m9-mstd0.5-inc1", "rand-mstd1-tweights", "augmix-m5-w4-d2", "v0", "originalr-mstd0.5", "3a"]
)
def test_known_policies_of_auto_augment_are_accepted(aa):
    assert resolve(["--aa", aa]).config["aa"] == aa


@pytest.mark.parametrize(
    ("aa", "message"),
    [
        ("rand-mfoo", r"aa: 'rand-mfoo': 'mfoo' is not an option of rand; it takes m, n, p, mstd, mmax, inc, each"),
        ("rand-", "'' is not an option of rand"),
        ("augmix-m5-w", "'w' is not an option of augmix"),
        ("original-m5", "'m5' is not an option of original; it takes mstd, each with a number"),
        ("cifar10-", "'' is not an option of cifar10"),
        ("cifar10-m9", "'m9' is not an option of cifar10; it takes none"),
        ("3a-foo", "'foo' is not an option of 3a; it takes none"),
    ],
)
def test_options_of_a_policy_that_timm_would_ignore_are_refused(aa, message):
    with pytest.raises(UserError, match=message):
        resolve(["--aa", aa])


def test_an_unknown_policy_of_auto_augment_is_refused_before_torch():
    with pytest.raises(UserError, match=r"aa: 'cifar-10' is not a policy \(did you mean cifar10\?\); it is one of"):
        resolve(["--aa", "cifar-10"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aa-fill", "grey"], "--aa-fill: without --aa, there is nothing to fill; leave it out"),
        (
            ["--aa", "3a", "--aa-fill", "grey"],
            "--aa-fill: --aa 3a rotates, shears and translates nothing; leave it out",
        ),
        (["--aa", "rand-m9-t3a", "--aa-fill", "mean"], "--aa-fill: --aa rand-m9-t3a rotates"),
        (["--branch", "bn", "--branch-init-branches", "3"], "--branch-init-branches: --branch bn has no convolution"),
        (["--method", "ce", "--branch-init-branches", "3"], "--branch-init-branches: method ce does not use it"),
        (
            ["--crop", "center", "--scale", "0.5", "1"],
            "--scale: --crop center transforms training images as in evaluation",
        ),
        (["--crop", "center", "--train-interpolation", "bicubic"], "--train-interpolation: --crop center transforms"),
        (["--cutout-fill", "mean"], "--cutout-fill: without --cutout, there is no square to fill"),
        (["--tune", "head", "--drop", "0.5"], "--drop: --tune head keeps the timm model in evaluation mode"),
    ],
)
def test_a_flag_without_effect_next_to_the_others_is_refused(flags, message):
    with pytest.raises(UserError) as raised:
        resolve(flags)
    assert message in str(raised.value)
    resolve(flags, ignore_unused=True)


def test_tuning_the_head_implies_center_crop_and_pooled_branches_unless_they_are_stated(tmp_path):
    (tmp_path / "train.txt").write_text("a.png 0\n")
    flags = ["--data", str(tmp_path), "--tune", "head"]
    for info, crop, branch_at in (("", "center", "pooled"), ("defaults: {crop: rrc}", "rrc", "pooled")):
        (tmp_path / "info.yaml").write_text(info)
        config = resolve(flags).config
        assert (config.augment.crop, config.method.branch_at) == (crop, branch_at)
    assert resolve([*flags, "--crop", "center", "--branch-at", "map"]).config.method.branch_at == "map"


def test_a_recipes_setting_without_effect_is_neither_an_error_nor_stored(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("aa: cifar10\naa_fill: grey\ncutout_fill: grey\nbranch: conv\nbranch_init_branches: 3\n")
    stored = resolve(["--recipe", str(recipe)]).config.stored()
    assert (stored["aa_fill"], stored["branch_init_branches"]) == ("grey", 3)
    assert "cutout_fill" not in stored
    stored = resolve(["--recipe", str(recipe), "--aa", "none", "--branch", "bn"]).config.stored()
    assert not {"aa_fill", "branch_init_branches"} & stored.keys()
    assert resolve(["--recipe", str(recipe), "--aa", "none", "--aa-fill", "none"]).config["aa_fill"] is None


def test_none_unsets_a_setting_that_may_be_unset(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("aa: cifar10\nclip_grad: 1\nbranch_sizes: [65, 30]\npretrained_file: gone.pth\n")
    flags = ["--aa", "none", "--clip-grad", "none", "--branch-sizes", "none", "--pretrained-file", "none"]
    config = resolve(["--recipe", str(recipe), *flags]).config
    assert (config["aa"], config["clip_grad"], config["branch_sizes"], config["pretrained_file"]) == (
        None,
        None,
        None,
        None,
    )
    with pytest.raises(UserError, match="alpha"):
        resolve(["--alpha", "none"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aa", "v0", "--color-jitter", "0.4"], "--aa v0 replaces --color-jitter"),
        (["--aa", "3a", "--color-jitter", "0.4"], None),
        (["--experts", "3", "--pretrained"], "fit only the stages that the experts share"),
        (["--experts", "3", "--pretrained", "--expert-width", "1"], None),
    ],
)
def test_a_setting_that_another_replaces_or_limits_is_a_warning(flags, message):
    warnings = resolve(flags).warnings
    assert [message in warning for warning in warnings] == [True] if message else warnings == []


def test_a_recipe_may_reproduce_several_rows(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("paper:\n- {table: 2, row: ResLT, all: 70.2}\n- {figure: 4, row: ResLT, x: 1}\n")
    assert [row["row"] for row in resolve(["--recipe", str(recipe)]).paper] == ["ResLT", "ResLT"]
    recipe.write_text("paper: {table: 2, figure: 4}\n")
    with pytest.raises(UserError, match="paper: must map table"):
        resolve(["--recipe", str(recipe)])


def test_an_unknown_recipe_is_reported_with_only_those_of_its_dataset():
    with pytest.raises(
        UserError, match=r"did you mean cifar10_lt_0\.1/resnet32\?\); cifar10_lt_0\.1/ has resnet32, "
    ) as raised:
        resolve(["--recipe", "cifar10_lt_0.1/resnet23"])
    assert "imagenet" not in str(raised.value)
    with pytest.raises(
        UserError,
        match=r"no recipe 'nothing'; there are some for .*, imagenet_lt, inaturalist2018, places_lt; for any .*own_finetune$",
    ):
        resolve(["--recipe", "nothing"])


PARTS_OF = {
    "ldam": {"cost": "ldam", "head": "cosine", "sampler": "instance", "network": "plain"},
    "ce": {"cost": "ce", "head": "linear", "sampler": "instance", "network": "plain"},
    "crt": {"cost": "ce", "head": "linear", "stages": METHODS["crt"].stages},
}


def assert_parts(config: Config, method: str, **others) -> None:
    expected = {"method": method} | PARTS_OF[method] | others
    assert {name: config[name] for name in expected} == expected


def test_a_method_chooses_the_parts_that_are_unset():
    assert_parts(resolve(["--method", "ldam"]).config, "ldam")
    assert_parts(
        resolve(["--method", "ldam", "--head", "linear", "--sampler", "sqrt"]).config,
        "ldam",
        head="linear",
        sampler="sqrt",
    )
    config = resolve(["--method", "ldam", "--head", "none", "--head-scale", "20"]).config
    assert_parts(config, "ldam", head_scale=20.0)


def test_another_method_replaces_the_parts_that_weaker_sources_state(dataset, tmp_path):
    (dataset / "info.yaml").write_text("defaults: {cost: focal, focal_gamma: 2.0}")
    recipe = tmp_path / "mine.yaml"
    arguments = ["--data", str(dataset), "--recipe", str(recipe)]
    recipe.write_text("method: ldam\nhead_scale: 20\nsampler: sqrt\nstages: [{start: 0.5, smoothing: 0.1}]\n")
    config = resolve(arguments).config
    assert_parts(config, "ldam", head_scale=20.0, sampler="sqrt", stages=({"start": 0.5, "smoothing": 0.1},))
    assert config["focal_gamma"] == DEFAULTS["focal_gamma"]
    assert_parts(resolve([*arguments, "--sampler", "none"]).config, "ldam")
    config = resolve([*arguments, "--method", "ldam"]).config  # the recipe's own method
    assert_parts(config, "ldam", head_scale=20.0, sampler="sqrt")
    config = resolve([*arguments, "--method", "crt", "--sampler", "balanced"]).config
    assert_parts(config, "crt", sampler="balanced", head_scale=None)
    recipe.write_text("epochs: 3\n")
    assert (resolve(arguments).config["cost"], resolve(arguments).config["focal_gamma"]) == ("focal", 2.0)
    assert_parts(resolve([*arguments, "--method", "ce"]).config, "ce", focal_gamma=DEFAULTS["focal_gamma"])


def test_an_empty_list_of_stages_in_a_recipe_removes_those_of_the_method(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce_drw\nstages: []\n")
    assert resolve(["--recipe", str(recipe)]).config["stages"] == ()
    recipe.write_text("method: ce_drw\nstages:\n")
    assert resolve(["--recipe", str(recipe)]).config["stages"] == METHODS["ce_drw"].stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cost", "focl", "--focal-gamma", "2"], "cost (--cost): 'focl' is not one of ce, focal, "),
        (["--method", "crtt", "--stage2-epochs", "2"], "method (--method): 'crtt' is not one of reslt, ce, "),
        (["--head", "cosin", "--head-scale", "2"], "head (--head): 'cosin' is not one of linear, cosine, "),
        (["--method", "ce", "--ldam-margin", "0.3"], "--ldam-margin: method ce does not use it (--cost ldam does); leave it out"),
        (["--method", "ldam", "--head", "linear", "--head-scale", "3"], "--head-scale: --head linear does not use it (--head cosine, deconfounded or meta_embedding "),
        (["--method", "ce", "--stage2-lr", "0.3"], "--stage2-lr: method ce does not use it (a method with a second stage does)"),
        (["--method", "ce", "--head", "none", "--head-scale", "3"], "--head-scale: method ce does not use it (--head cosine, deconfounded or meta_embedding "),
        (["--cost", "sigmoid_focal", "--logit-adjust", "1"], "--logit-adjust: --cost sigmoid_focal does not use it (--cost ce, focal, ldam, vs, seql, ce_hard or label_aware does)"),
        (["--class-weights", "invers"], "class_weights (--class-weights): 'invers' is not one of uniform, inverse, effective (did you mean inverse?); if a module"),
        (["--stages", "x"], "--stages: stages have no flag; list them in a recipe"),
        (["--mutual", "pairwise_kl"], "mutual: pairwise_kl is a term between experts; give --experts 2 or more"),
        (["--method", "ce", "--head", "scaled"], "head: no stage trains the scales of a scaled head; use --method lws, "),
        (["--method", "lws", "--head", "linear"], "stages: stage 2: train: scales: the model has none without --head scaled; "),
    ],
)  # fmt: skip
def test_an_invalid_part_is_reported_as_one_error(arguments, message):
    assert fault(*arguments).startswith(message)


@pytest.mark.parametrize("text", ["cost: [focal]", "cost: 3", "head: {cosine: 30}", "sampler: true"])
def test_a_part_of_a_wrong_shape_in_a_recipe_is_reported_as_one_error(tmp_path, text):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"method: ce\n{text}\n")
    assert fault("--recipe", recipe).startswith(f"{text.partition(':')[0]} (recipe {recipe}): ")


def test_settings_of_a_part_that_only_a_stage_has_are_used(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: ce\nstages: [{start: 0.5, class_weights: effective}]\nclass_weight_beta: 0.9\n")
    assert resolve(["--recipe", str(recipe)]).config["class_weight_beta"] == 0.9
    assert "class_weight_beta" in resolve(["--recipe", str(recipe)]).config.stored()
    assert "does not use it" in fault("--method", "ce", "--class-weight-beta", "0.9")


def test_a_changed_configuration_takes_the_parts_of_its_new_method_unless_they_are_given():
    config = Config.of(method="ldam", head="linear", sampler="sqrt")
    assert_parts(config, "ldam", head="linear", sampler="sqrt")
    assert_parts(config.changed(method="ldam", lr=0.3), "ldam", head="linear", sampler="sqrt")
    assert_parts(config.changed(method="ce"), "ce")
    assert_parts(config.changed(method="ce", sampler="balanced"), "ce", sampler="balanced")
    assert_parts(config.changed(head=None), "ldam", sampler="sqrt")
    assert_parts(config.changed(method="crt").changed(method="ldam"), "ldam", stages=())


def test_the_length_of_a_message_is_limited_whatever_the_recipe(tmp_path):
    """The recipes have a value of 100,000 characters, 300 unknown keys, and 21 stages."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"crop: {'x' * 100_000}\n" + "".join(f"nonsense_{i}: 1\n" for i in range(300)))
    message = fault("--recipe", recipe)
    assert message.startswith("301 errors in the configuration:")
    assert message.endswith("and 281 more")
    assert len(message) < 20 * 300
    recipe.write_text(f"crop: {'x' * 100_000}\n")
    assert len(fault("--recipe", recipe)) == 2000
    recipe.write_text("method: ce\nstages:\n" + "- {epochs: 1}\n" * 21)
    assert fault("--recipe", recipe) == "stages: 21 are stated; at most 20 can follow the first"


def test_a_stage_that_ends_within_its_own_warmup_is_a_warning():
    warnings = resolve(["--method", "reslt_retrained", "--epochs", "10", "--experiment", "nowhere"]).warnings
    assert "the epochs of stage 2 (1) end within its warm-up (2)" in warnings

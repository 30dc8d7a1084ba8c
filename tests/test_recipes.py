"""The recipes: every one resolves, its rows are the paper's, and its settings are what its name says."""

import fnmatch
import functools
import itertools
import re
from dataclasses import replace

import pytest
import timm
import torch

from reslt.config.places import RECIPES
from reslt.config.recipes import list_recipes, read_recipe
from reslt.config.resolve import resolve
from reslt.config.schema import DEFAULTS
from reslt.config.stages import stages_of
from reslt.core.errors import UserError
from reslt.models.create import create_model
from reslt.models.freeze import frozen_names
from reslt.reproduce.paper import ROWS_OF_TABLES, has_our_settings, stated_rows
from reslt.training.optim import create_scheduler

CIFAR100 = ("cifar100_lt_0.01", "cifar100_lt_0.02", "cifar100_lt_0.1")
CIFAR10 = ("cifar10_lt_0.01", "cifar10_lt_0.02", "cifar10_lt_0.1")
TEACHERS = ("--teachers", ".", ".", ".")  # any that exist: only training reads them
PROJECT = RECIPES.parents[1]
CUTMIX_FILE = "resnet152_cutmix_acc_80_80.pth"


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@functools.cache
def config_of(recipe: str, *flags: str):
    if recipe.startswith("places_lt/") and recipe.endswith("_strong"):
        flags = ("--pretrained-file", "none", *flags)
    if recipe.endswith("lfme"):
        flags = (*TEACHERS, *flags)
    if "/" not in recipe:  # it is for any dataset
        flags = ("--data", "digits_lt", *flags)
    return resolve(["--recipe", recipe, *flags]).config


def paper_rows(kind: str, number: int) -> list[tuple[str, dict]]:
    """(recipe, row) of every row of one table or figure."""
    return [(recipe, row) for recipe in list_recipes() for row in read_recipe(recipe)[1] if row.get(kind) == number]


def cells(number: int) -> dict[tuple[str, str], tuple | float]:
    """{(recipe, label): top-1, or (many, medium, few, all) where the table states groups} of one table."""
    stated = {}
    for recipe, row in paper_rows("table", number):
        if recipe.endswith(("_released", "_own")):
            continue
        assert (recipe, row["row"]) not in stated
        groups = tuple(row[c] for c in ("many", "medium", "few", "all") if c in row)
        assert len(groups) in (1, 4)
        stated[recipe, row["row"]] = groups if len(groups) == 4 else groups[0]
    return stated


def changed(one, other) -> set[str]:
    """The settings in which two configurations differ, their runs' names aside."""
    return {name for name, value in one.flat().items() if value != other[name]} - {"experiment"}


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_resolves_and_names_its_row(recipe, tmp_path):
    (tmp_path / CUTMIX_FILE).touch()
    is_general = "/" not in recipe
    more = TEACHERS if recipe.endswith("lfme") else ()
    resolved = resolve(["--recipe", recipe, *["--data", "digits_lt"] * is_general, *more])
    assert resolved.config["data"] == ("digits_lt" if is_general else recipe.split("/")[0])
    assert not resolved.warnings
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    assert any(line.startswith(f"# accelerate launch train.py --recipe {recipe}") for line in lines)
    assert all(len(line) <= 120 for line in lines)
    first = lines[0].lower()
    assert "table" in first or "figure" in first or not resolved.paper
    for place, row in enumerate(resolved.paper):
        kind = "table" if "table" in row else "figure"
        assert place > 0 or f"{kind} {row[kind]}," in first
        assert row["row"]
        assert isinstance(row["all"], float) if kind == "table" else row["series"]


TABLE_5 = {  # CIFAR-10-LT 0.01, 0.02, 0.1, CIFAR-100-LT 0.01, 0.02, 0.1
    "": ("ResLT", (80.44, 83.46, 89.06, 45.34, 49.98, 60.79)),
    "_strong": ("ResLT, strong", (82.40, 85.17, 89.70, 48.21, 52.71, 62.01)),
    "_3experts": ("ResLT (3 experts)", (None, None, None, 49.73, 54.51, 63.73)),
    "_mixup": ("Mixup", (73.06, 77.82, 87.10, 39.54, 44.99, 58.02)),
    "_focal": ("Focal", (70.38, 76.72, 86.66, 38.41, 44.32, 55.78)),
    "_ldam": ("LDAM", (73.35, None, 86.96, 39.60, None, 56.91)),
    "_bbn": ("BBN", (79.82, 82.18, 88.32, 42.56, 47.02, 59.12)),
    "_cb_focal": ("CB-Focal", (74.57, 79.27, 87.10, 39.60, 45.17, 57.99)),
    "_causal": ("Causal Norm", (80.60, 83.60, 88.50, 44.10, 50.30, 59.60)),
    "_ce_drw": ("CE+DRW", (76.34, 79.97, 87.56, 41.51, 45.29, 58.12)),
    "_ce_drs": ("CE+DRS", (75.61, 79.81, 87.38, 41.61, 45.48, 58.11)),
    "_ldam_drw": ("LDAM+DRW", (77.03, 81.03, 88.16, 42.04, 46.62, 58.71)),
    "_elf": ("ELF(LDAM)+DRW", (78.1, 82.4, 88.0, 43.1, 47.5, 58.9)),
    "_ride_3experts": ("RIDE (3 experts)", (None, None, None, 48.6, None, None)),
    "_ride_3experts_router": ("RIDE (3 experts)", (None, None, None, 48.6, None, None)),
}
OWN_IN_TABLE_5 = ("_ldam", "_bbn", "_cb_focal", "_causal", "_ce_drw", "_ce_drs", "_ldam_drw")


def test_table_5_is_exactly_the_papers_cells():
    assert cells(5) == {
        (f"{data}/resnet32{name}", label): number
        for name, (label, numbers) in TABLE_5.items()
        for data, number in zip(CIFAR10 + CIFAR100, numbers, strict=True)
        if number
    }


def test_a_methods_own_protocol_is_for_the_same_rows():
    """But for RIDE's rows of 100 epochs, which only its own protocol has, and for methods that are not in the paper."""
    own = {recipe for recipe in list_recipes() if recipe.endswith("_own") and read_recipe(recipe)[1]}
    expected = {recipe for recipe, _ in cells(5) if recipe.partition("resnet32")[2] in OWN_IN_TABLE_5}
    expected |= {"cifar100_lt_0.01/resnet32_ride_3experts", "cifar100_lt_0.01/resnet32_ride_3experts_router"}
    expected |= {recipe for (recipe, _), _ in second_stages(6).items()} | {"imagenet_lt/resnext50_causal"}
    expected |= {f"inaturalist2018/resnet50_{name}" for name in ("crt", "lws", "tau_norm", "cb_focal", "bbn")}
    for recipe in expected:
        rows = read_recipe(f"{recipe}_own")[1]
        plain = read_recipe(recipe)[1]
        assert rows
        assert all(row.pop("protocol") == "own" and row in plain for row in rows)
        same = {"data", "model", "method", "tau", "tde", "experts", "stages"}
        assert not changed(config_of(recipe), config_of(f"{recipe}_own")) & same - {"stages"} or recipe in TAU_CHANGES
    of_100_epochs = {"imagenet_lt/resnext50", "inaturalist2018/resnet50"}
    beyond_the_paper = {f"cifar100_lt_0.01/resnet32_{method}_own" for method in ("sade", "balpoe", "ncl")}
    assert own - {f"{recipe}_own" for recipe in expected} - beyond_the_paper == {
        f"{net}_ride_{n}experts_own" for net in of_100_epochs for n in (2, 3)
    }


TAU_CHANGES = {"imagenet_lt/resnet10_tau_norm", "imagenet_lt/resnext101_tau_norm"}


def test_own_protocols_are_the_published_ones():
    ldam = config_of("cifar10_lt_0.01/resnet32_ldam_drw_own").optim
    assert (ldam.epochs, ldam.batch_size, ldam.lr, ldam.weight_decay, ldam.nesterov) == (200, 128, 0.1, 2e-4, False)
    assert (ldam.decay_milestones, ldam.decay_rate) == ((160, 180), 0.01)
    assert (ldam.warmup_epochs, ldam.warmup_lr) == (5, 0.0)
    bbn = config_of("cifar10_lt_0.01/resnet32_bbn_own").optim
    assert (bbn.weight_decay, bbn.nesterov, bbn.decay_milestones, bbn.decay_rate) == (2e-4, True, (120, 160), 0.01)
    ride = config_of("cifar100_lt_0.01/resnet32_ride_3experts_own")
    assert (ride["rotate"], ride["weight_decay"], ride["decay_rate"], ride["nesterov"]) == (15, 5e-4, 0.01, True)
    causal = config_of("cifar10_lt_0.1/resnet32_causal_own")
    assert (causal["network"], causal["second_sampler"], causal["tde"]) == ("bbn", None, 1.0)
    assert (causal["batch_size"], causal["lr"]) == (256, 0.2)
    decoupled = config_of("imagenet_lt/resnext50_crt_own")
    assert (decoupled["epochs"], decoupled["batch_size"], decoupled["lr"], decoupled["stage2_lr"]) == (
        90,
        512,
        0.2,
        0.2,
    )
    large = config_of("imagenet_lt/resnext50_ride_3experts_own")
    assert (large["epochs"], large["batch_size"], large["lr"], large["decay_milestones"]) == (100, 256, 0.1, (60, 80))
    assert (large["mutual_weight"], large["temperature_factor"], large["weight_decay"]) == (-0.2, 0.02, 2e-4)
    inaturalist = config_of("inaturalist2018/resnet50_bbn_own")
    assert (inaturalist["epochs"], inaturalist["cumulative_epochs"], inaturalist["batch_size"]) == (180, 200, 128)
    for name, epochs in (("", 200), ("_400epochs", 400)):
        proco = config_of(f"cifar100_lt_0.01/resnet32_proco_own{name}")
        assert (proco["epochs"], proco["decay_milestones"]) == (epochs, (epochs - 40, epochs - 20))
        assert (proco["warmup_epochs"], proco["warmup_lr"], proco["nesterov"]) == (epochs // 40, 0.0, False)
        assert (proco["batch_size"], proco["lr"], proco["weight_decay"], proco["decay_rate"]) == (256, 0.3, 2e-4, 0.1)
        assert (proco["views"], proco["logit_adjust"], proco["head"], proco["aa"]) == (3, 1.0, "linear", "cifar10")


def test_shikes_own_rates_are_the_published_ones():
    """0.025, 0.05, ... to 0.15 in six epochs and by cosine to 0 at epoch 180; then 0.0375 to 0.1, and to 0 at epoch 200."""
    config = config_of("cifar100_lt_0.01/resnet32_shike_own")
    first, second = stages_of(config)
    assert (first.end, second.begin, second.end) == (180, 180, 200)
    for stage, warm_up in ((first, [0.025, 0.05, 0.075, 0.1, 0.125, 0.15]), (second, [0.0375, 0.05, 0.0625])):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], stage.config["lr"])
        scheduler, rates = create_scheduler(stage.config.optim, optimizer), []
        for epoch in range(stage.end - stage.begin + 1):
            scheduler.step(epoch)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates[: len(warm_up)] == pytest.approx(warm_up)
        assert rates[5] == max(rates) == pytest.approx(stage.config["lr"])
        assert rates[-1] == pytest.approx(0, abs=1e-3 * max(rates))
    assert (first.config["logit_adjust"], second.config["logit_adjust"], second.config["mutual"]) == (0, 1, "off")
    assert (second.train, second.reinit, second.bn) == ({"classifier": 1.0}, ("classifier",), "train")
    assert first.config["mutual_weight"] == 2 / 100  # over the two others instead of their mean, averaged over classes


def test_own_protocols_of_methods_with_experts_are_the_published_ones_and_for_no_row():
    data, found = "cifar100_lt_0.01/resnet32", {}
    for method in ("sade", "balpoe", "ncl"):
        plain, own = config_of(f"{data}_{method}"), config_of(f"{data}_{method}_own")
        found[method] = {name: own[name] for name in changed(plain, own)}
        assert (own["experts"], read_recipe(f"{data}_{method}_own")[1]) == (3, [])
    grey, long = {"aa": "cifar10", "aa_fill": "grey"}, {"epochs": 400, "decay_milestones": (320, 360)}
    assert found == {
        "sade": {"warmup_lr": 0.0, "rotate": 15.0},
        "balpoe": grey | long | {"warmup_epochs": 10, "warmup_lr": 0.0},
        "ncl": grey | long | {"batch_size": 64, "weight_decay": 2e-4, "cutout": 16},
    }
    sade, balpoe, ncl = (config_of(f"{data}_{method}_own") for method in ("sade", "balpoe", "ncl"))
    assert (sade["logit_adjust"], sade["logit_adjust_reversed"], sade["expert_width"]) == ((0, 1, 1), (0, 0, 2), 0.75)
    assert (balpoe["logit_adjust"], balpoe["expert_loss"], balpoe["mixup"]) == ((0, 1, 2), "mean", 0.4)
    assert (ncl["logit_adjust"], ncl["mutual_weight"], ncl["hard_classes"], ncl["mutual_hard_classes"]) == (
        1,
        0.6,
        30,
        30,
    )
    assert [c["head"] for c in (sade, balpoe, ncl)] == ["cosine", "cosine", "linear"]
    assert (balpoe["nesterov"], ncl["nesterov"], balpoe["expert_width"], ncl["expert_width"]) == (True, True, 1, 1)


SECOND_STAGES = {  # table, network -> cRT, LWS, tau-normalized: many, medium, few, all
    (3, "imagenet_lt/resnext50"): [(63.7, 47.6, 28.3, 50.7), (63.3, 48.4, 32.0, 51.5), (60.9, 49.2, 36.8, 51.5)],
    (4, "places_lt/resnet152"): [(42.0, 37.6, 24.9, 36.7), (40.6, 39.1, 28.6, 37.6), (37.8, 40.7, 31.8, 37.9)],
    (6, "imagenet_lt/resnet10"): [(53.8, 41.3, 25.4, 43.2), (51.8, 41.6, 27.6, 43.0), (50.4, 42.1, 26.7, 42.7)],
    (6, "imagenet_lt/resnext50"): [(63.7, 47.6, 28.3, 50.6), (63.3, 48.4, 32.0, 51.5), (62.3, 48.9, 33.7, 51.5)],
    (6, "imagenet_lt/resnext101"): [(66.2, 50.4, 30.8, 53.3), (65.7, 51.4, 34.7, 54.0), (65.3, 51.5, 35.2, 53.9)],
    (8, "inaturalist2018/resnet50"): [(73.2, 68.8, 66.1, 68.2), (71.0, 69.8, 68.8, 69.5), (71.1, 68.9, 69.3, 69.3)],
    (2, "inaturalist2018/resnet50"): [67.6, 69.5, 69.3],
}


def second_stages(table: int) -> dict[tuple[str, str], tuple | float]:
    """The cells of cRT, LWS and tau-normalization in a table."""
    found = {}
    for (number, network), rows in SECOND_STAGES.items():
        for (name, label), row in zip(
            (("crt", "cRT"), ("lws", "LWS"), ("tau_norm", "tau-normalized")), rows, strict=True
        ):
            found |= {(f"{network}_{name}", label): row} if number == table else {}
    return found


def test_tau_normalized_rows_have_the_published_tau_or_1():
    for data, tau in {
        "imagenet_lt/resnext50": 0.7,
        "inaturalist2018/resnet50": 0.3,
        "places_lt/resnet152": 1.0,
    }.items():
        assert config_of(f"{data}_tau_norm")["tau"] == tau


def test_the_tables_with_shot_groups_state_the_papers_numbers():
    assert cells(1) == {
        ("cifar10_lt_0.02/resnet32", "ResLT"): (85.83, 81.47, 81.43, 83.46),
        ("cifar10_lt_0.02/resnet32_ce", "Baseline (CE)"): (93.60, 76.33, 68.55, 78.50),
        ("cifar10_lt_0.02/resnet32_naive_max", "naive fusion (1) max"): (90.70, 54.73, 41.48, 60.22),
        ("cifar10_lt_0.02/resnet32_naive_sum", "naive fusion (2) sum"): (90.83, 55.63, 40.75, 60.24),
        ("cifar10_lt_0.02/resnet32_naive_softmax", "naive fusion (3) softmax sum"): (86.73, 45.50, 55.33, 61.80),
    }
    assert cells(3) == second_stages(3) | {
        ("imagenet_lt/resnext50", "ResLT"): (63.0, 50.5, 35.5, 52.9),
        ("imagenet_lt/resnext50_ce", "CE"): (67.6, 42.8, 13.4, 47.6),
        ("imagenet_lt/resnext50_strong", "ResLT, strong"): (63.6, 55.7, 38.9, 56.1),
        ("imagenet_lt/resnext50_mixup", "Mixup"): (67.3, 41.0, 11.1, 46.3),
        ("imagenet_lt/resnext50_focal", "Focal"): (41.1, 34.8, 22.4, 34.6),
        ("imagenet_lt/resnext50_lifted", "Lifted"): (41.1, 35.4, 24.0, 35.2),
        ("imagenet_lt/resnext50_range", "Range"): (41.1, 35.4, 23.2, 35.1),
        ("imagenet_lt/resnext50_causal", "Causal Norm"): (64.9, 48.0, 28.9, 51.9),
    }
    assert cells(4) == second_stages(4) | {
        ("places_lt/resnet152", "ResLT"): (39.8, 43.6, 31.4, 39.8),
        ("places_lt/resnet152_focal", "Focal"): (41.1, 34.8, 22.4, 34.6),
        ("places_lt/resnet152_lfme", "LFME"): (39.3, 39.6, 24.2, 36.2),
        ("places_lt/resnet152_lifted", "Lifted"): (41.1, 35.4, 24.0, 35.2),
        ("places_lt/resnet152_range", "Range"): (41.1, 35.4, 23.2, 35.1),
        ("places_lt/resnet152_oltr", "OLTR"): (44.7, 37.0, 25.3, 35.9),
        ("places_lt/resnet152_ce", "CE"): (45.7, 27.3, 8.2, 30.2),
        ("places_lt/resnet152_strong", "ResLT, strong"): (40.3, 44.4, 34.7, 41.0),
        ("places_lt/resnet152_frozen", "ResLT"): (39.8, 43.6, 31.4, 39.8),
        ("places_lt/resnet152_frozen_ce", "CE"): (45.7, 27.3, 8.2, 30.2),
        ("places_lt/resnet152_frozen_strong", "ResLT, strong"): (40.3, 44.4, 34.7, 41.0),
    }
    assert cells(6) == second_stages(6) | {
        ("imagenet_lt/resnet10", "ResLT"): (52.3, 41.6, 29.5, 43.8),
        ("imagenet_lt/resnext50", "ResLT"): (63.0, 50.5, 35.5, 53.0),
        ("imagenet_lt/resnext101", "ResLT"): (63.3, 53.3, 40.3, 55.1),
        ("imagenet_lt/resnet10_ce", "CE"): (59.7, 29.4, 5.7, 37.3),
        ("imagenet_lt/resnet10_seql", "SEQL"): 36.4,
        ("imagenet_lt/resnext50_ce", "CE"): (66.8, 42.0, 14.0, 47.0),
        ("imagenet_lt/resnext101_ce", "CE"): (69.6, 44.6, 15.6, 49.6),
    }
    assert cells(7) == {
        ("imagenet_lt/resnext50_ride_2experts", "RIDE (2 experts), 180 epochs"): (66.9, 51.2, 31.2, 54.5),
        ("imagenet_lt/resnext50_ride_3experts", "RIDE (3 experts), 180 epochs"): (68.4, 52.9, 32.2, 56.0),
        ("inaturalist2018/resnet50_ride_2experts", "RIDE (2 experts), 200 epochs"): (62.5, 71.0, 70.9, 70.1),
        ("inaturalist2018/resnet50_ride_3experts", "RIDE (3 experts), 200 epochs"): (68.3, 72.6, 71.8, 71.7),
        ("imagenet_lt/resnext50_2experts", "ResLT (2 experts)"): (63.3, 55.4, 44.3, 56.4),
        ("imagenet_lt/resnext50_3experts", "ResLT (3 experts)"): (64.0, 56.6, 44.8, 57.6),
        ("inaturalist2018/resnet50_2experts", "ResLT (2 experts)"): (71.5, 72.0, 72.4, 72.1),
        ("inaturalist2018/resnet50_3experts", "ResLT (3 experts)"): (73.0, 72.6, 73.1, 72.9),
    }
    assert cells(8) == second_stages(8) | {
        ("inaturalist2018/resnet50", "ResLT"): (68.5, 69.9, 70.4, 70.2),
        ("inaturalist2018/resnet50_ce", "CE"): (75.7, 66.9, 61.7, 65.8),
    }


def test_tables_2_and_9_state_the_papers_numbers():
    assert cells(2) == second_stages(2) | {
        ("inaturalist2018/resnet50", "ResLT"): 70.2,
        ("inaturalist2018/resnet50_360epochs", "ResLT*"): 70.5,
        ("inaturalist2018/resnet50_cb_focal", "CB-Focal"): 61.1,
        ("inaturalist2018/resnet50_ldam", "LDAM"): 64.6,
        ("inaturalist2018/resnet50_ldam_drw", "LDAM+DRW"): 68.0,
        ("inaturalist2018/resnet50_bbn", "BBN"): 69.6,
        ("inaturalist2018/resnet50_causal", "Causal Norm"): 64.0,
        ("inaturalist2018/resnet50_lws_strong", "LWS, strong"): 71.4,
        ("inaturalist2018/resnet50_strong", "ResLT, strong"): 72.3,
        ("inaturalist2018/resnet152", "ResLT"): 73.2,
    }
    numbers = {"cifar10_lt_0.01": (78.83, 80.44, 80.80, 80.44), "cifar100_lt_0.01": (45.11, 45.34, 45.34, 45.14)}
    assert cells(9) == {
        (f"{data}/resnet32{'' if k == 3 else f'_{k}branches'}", f"ResLT, {k} branches"): number
        for data, row in numbers.items()
        for k, number in zip((2, 3, 4, 5), row, strict=True)
    }


TAU_AS_RELEASED = {
    "imagenet_lt/resnet10": 0.3,
    "imagenet_lt/resnext50": 0.7,
    "imagenet_lt/resnext101": 0.7,
    "imagenet_lt/resnext50_strong": 0.7,
    "imagenet_lt/resnext50_2experts": 0.7,
    "imagenet_lt/resnext50_3experts": 0.7,
    "inaturalist2018/resnet50": 0.0,
    "inaturalist2018/resnet50_360epochs": 0.0,
    "inaturalist2018/resnet50_strong": 0.0,
    "inaturalist2018/resnet152": 0.0,
    "inaturalist2018/resnet50_2experts": 0.3,
    "inaturalist2018/resnet50_3experts": 0.3,
    "places_lt/resnet152": 0.7,
    "places_lt/resnet152_frozen": 0.7,
}


def test_the_released_variants_are_the_same_rows_and_runs_evaluated_as_the_released_code_does():
    variants = {recipe.removesuffix("_released") for recipe in list_recipes() if recipe.endswith("_released")}
    assert variants == TAU_AS_RELEASED.keys()
    for recipe, tau in TAU_AS_RELEASED.items():
        plain = read_recipe(recipe)[1]
        assert read_recipe(f"{recipe}_released")[1] == [row for row in plain if "table" in row]
        c = config_of(f"{recipe}_released")
        assert (c["tau"], c["eval_branch_at"] or c["branch_at"]) == (tau, "pooled")
        assert changed(config_of(recipe), c) - {"eval_branch_at"} == {"tau"}


def test_of_the_papers_recipes_resnet_10_alone_pools_before_its_branches_in_training():
    configs = {recipe: config_of(recipe) for recipe in list_recipes() if "vitb16" not in recipe}
    pooled = {recipe for recipe, c in configs.items() if c["branch_at"] == "pooled" and c["tune"] != "head"}
    assert pooled == {"imagenet_lt/resnet10", "imagenet_lt/resnet10_released"}


def test_inaturalists_two_branches_start_as_a_part_of_three():
    for recipe in list_recipes():
        c = config_of(recipe)
        used = (c["branches"], c["branch_init_branches"]) if c.method.has_branches else None
        assert used in ([(2, 3), None] if recipe.startswith("inaturalist2018/") else [(c["branches"], None), None])


@pytest.mark.parametrize("kind", ["", "_ce", "_strong"])
def test_the_frozen_rows_of_places_are_the_others_with_only_the_last_block_and_the_classifier_trained(kind):
    plain, frozen = config_of(f"places_lt/resnet152{kind}"), config_of(f"places_lt/resnet152_frozen{kind}")
    assert changed(plain, frozen) == {"freeze"}
    assert plain["color_jitter"] == (0.4, 0.4, 0.4, 0.0)
    with torch.device("meta"):
        model = create_model(replace(frozen.model, pretrained=False), frozen.method, 365)
    names = {name for name, _ in model.named_parameters()}
    trained = {name.partition(".")[2] for name in names - frozen_names(model, frozen["freeze"]) if "backbone." in name}
    block = [f"layer4.2.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")]
    assert trained == {f"{layer}.weight" for layer in [*block, "fc"]} | {
        f"{layer}.bias" for layer in [*block[1::2], "fc"]
    }


def test_large_rows_of_the_paper_say_how_many_images_batch_norm_saw_per_gpu():
    for recipe in list_recipes():
        text, is_large = (RECIPES / f"{recipe}.yaml").read_text(), "cifar" not in recipe
        per_gpu = re.findall(r"BatchNorm saw (\d+) images per GPU in the paper \(4 GPUs\)", text)
        expected = config_of(recipe)["batch_size"] / 4
        is_of_the_paper = is_large and read_recipe(recipe)[1] and not recipe.endswith("_own")
        assert [int(number) for number in per_gpu] == ([expected] if is_of_the_paper else [])


def test_figure_4_has_three_sizes_for_each_dataset_and_figure_6_the_runs_whose_branches_it_shows():
    points = {}
    for _, row in paper_rows("figure", 4):
        points.setdefault((row["series"], row["row"]), set()).add(row["x"])
    widths, networks = {1, 2, 3}, {"ResNet-10", "ResNeXt-50", "ResNeXt-101"}
    assert points == {
        ("CIFAR-10-LT, 0.02", "ResLT"): widths,
        ("CIFAR-10-LT, 0.02", "BBN"): widths,
        ("CIFAR-100-LT, 0.02", "ResLT"): widths,
        ("CIFAR-100-LT, 0.02", "BBN"): widths,
        ("ImageNet-LT", "ResLT"): networks,
        ("ImageNet-LT", "LWS"): networks,
    }
    for data in ("cifar10_lt_0.02", "cifar100_lt_0.02"):
        assert config_of(f"{data}/resnet32_2x")["model_kwargs"] == {"channels": [32, 64, 128]}
        assert config_of(f"{data}/resnet32_3x")["model_kwargs"] == {"channels": [48, 96, 192]}
    assert {recipe for recipe, _ in paper_rows("figure", 6)} == {
        "cifar10_lt_0.01/resnet32",
        "cifar100_lt_0.01/resnet32",
        "imagenet_lt/resnext50",
    }


def test_figure_5_sweeps_alpha_from_0_over_the_recipes_own_value_to_1():
    swept = dict(paper_rows("figure", 5))
    assert set(swept) == {"cifar10_lt_0.02/resnet32", "cifar100_lt_0.02/resnet32", "imagenet_lt/resnet10"}
    for recipe, row in swept.items():
        values = row["sweep"]["alpha"]
        assert values == sorted(values)
        assert (values[0], values[-1]) == (0, 1)
        assert config_of(recipe)["alpha"] in values


ABLATIONS = {  # variant: label of its row in the figure, settings in which it differs from ResLT's recipe
    "fig2a": ("variant (a)", {"branch_sets": "separate"}),
    "fig2b": ("variant (b)", {"branch_sets": "disjoint"}),
    "fig2c": ("variant (c)", {"branch_sets": "disjoint", "alpha": 1}),
    "fig2d": ("variant (d)", {"fusion": "main", "alpha": 1}),
    "fig2e": ("variant (e)", {"tied_branches": True}),
    "fig7_grouped": ("CE, 1 grouped convolution", {"branch": "conv", "alpha": 0}),
}


@pytest.mark.parametrize("data", ["cifar10_lt_0.02", "cifar100_lt_0.02"])
def test_the_ablations_differ_from_reslt_in_what_their_row_says(data):
    plain = config_of(f"{data}/resnet32")
    for name, (_, settings) in ABLATIONS.items():
        c = config_of(f"{data}/resnet32_{name}")
        assert {setting: c[setting] for setting in changed(plain, c)} == settings
    ce, separate = config_of(f"{data}/resnet32_ce"), config_of(f"{data}/resnet32_fig7_separate")
    assert changed(ce, separate) == {"network"}
    assert separate["branches"] == 3
    labels = {f"{data}/resnet32_{name}": label for name, (label, _) in ABLATIONS.items()}
    stated = {n: {r: row["row"] for r, row in paper_rows("figure", n) if r.startswith(f"{data}/")} for n in (3, 7)}
    plain_rows, grouped = {f"{data}/resnet32": "ResLT"}, f"{data}/resnet32_fig7_grouped"
    assert stated[3] == plain_rows | {recipe: label for recipe, label in labels.items() if recipe != grouped}
    others = {f"{data}/resnet32_ce": "CE", f"{data}/resnet32_fig7_separate": "CE, 3 separate convolutions"}
    assert stated[7] == plain_rows | {grouped: labels[grouped]} | others


def test_the_naive_fusions_are_one_training_on_groups_of_equal_imbalance_factor():
    configs = {name: config_of(f"cifar10_lt_0.02/resnet32_naive_{name}") for name in ("max", "sum", "softmax")}
    assert {name: c["fusion"] for name, c in configs.items()} == {"max": "max", "sum": None, "softmax": "softmax"}
    c = configs["sum"]
    assert (c["alpha"], c["branch_sets"], c["branch_sizes"]) == (1, "disjoint", None)
    for other in configs.values():
        assert changed(c, other) <= {"fusion"}


@pytest.mark.parametrize("data", CIFAR10 + CIFAR100)
def test_strong_cifar_is_the_plain_row_with_autoaugment(data):
    plain, strong = config_of(f"{data}/resnet32"), config_of(f"{data}/resnet32_strong")
    assert (strong["aa"], strong["mixup"], strong["cutmix"]) == ("cifar10", 0, 0)
    assert changed(plain, strong) == {"aa"}


def test_the_strong_rows_of_the_large_datasets_are_as_the_paper_says():
    imagenet = config_of("imagenet_lt/resnext50_strong")
    assert (imagenet["aa"], imagenet["mixup"], imagenet["color_jitter"]) == ("original", 0.2, (0.0,))
    assert changed(config_of("imagenet_lt/resnext50"), imagenet) == {"aa", "mixup", "color_jitter"}
    inaturalist = config_of("inaturalist2018/resnet50_strong")
    assert (inaturalist["model"], inaturalist["pretrained"], inaturalist["mixup"]) == ("resnet50.tv_in1k", True, 0.2)
    assert changed(config_of("inaturalist2018/resnet50"), inaturalist) == {"model", "pretrained", "mixup"}
    places = config_of("places_lt/resnet152_strong")
    assert changed(config_of("places_lt/resnet152"), places) == {"model"}


def test_experts_have_rides_widths_except_on_inaturalist():
    for data in CIFAR100:
        c = config_of(f"{data}/resnet32_3experts")
        assert (c["experts"], c["expert_width"]) == (3, 0.75)
        assert changed(config_of(f"{data}/resnet32"), c) == {"experts"}
    for experts in (2, 3):
        c = config_of(f"imagenet_lt/resnext50_{experts}experts")
        assert (c["experts"], c["expert_width"], c["alpha"]) == (experts, 0.75, 0.99)
        assert (c["epochs"], c["batch_size"], c["lr"], c["warmup_epochs"]) == (180, 128, 0.05, 5)
        c = config_of(f"inaturalist2018/resnet50_{experts}experts")
        assert (c["experts"], c["expert_width"], c["alpha"], c["branches"]) == (experts, 1.0, 0.85, 2)
        assert (c["epochs"], c["batch_size"], c["lr"], c["warmup_epochs"]) == (200, 256, 0.1, 5)


def test_other_numbers_of_branches_take_groups_of_equal_imbalance_factor():
    for data in ("cifar10_lt_0.01", "cifar100_lt_0.01"):
        for k in (2, 4, 5):
            c = config_of(f"{data}/resnet32_{k}branches")
            assert (c["branches"], c["branch_sizes"]) == (k, None)
            assert changed(config_of(f"{data}/resnet32"), c) == {"branches", "branch_sizes"}


def test_adjusted_recipes_are_their_namesakes_with_logit_adjustment_and_are_for_no_row():
    adjusted = [recipe for recipe in list_recipes() if re.search("(?<!_frozen)_adjusted$", recipe)]
    assert len(adjusted) == 3 * 3 + 2 + 3
    for recipe in adjusted:
        c = config_of(recipe)
        assert c["logit_adjust"] == 1
        if c["method"] == "ce":
            assert changed(config_of(recipe.removesuffix("_adjusted")), c) == {"logit_adjust"}
        else:
            assert c["alpha"] == 0.5
            assert changed(config_of(recipe.removesuffix("_adjusted")), c) == {"logit_adjust", "alpha"}
    for recipe in [*adjusted, "cifar100_lt_0.01/resnet32_3experts_strong"]:
        assert read_recipe(recipe)[1] == []
    both = config_of("cifar100_lt_0.01/resnet32_3experts_strong")
    assert changed(config_of("cifar100_lt_0.01/resnet32_3experts"), both) == {"aa"}


X3 = {  # what was measured at 55.1, setting by setting, those that are defaults included
    "data": "cifar100_lt_0.01", "model": "cifar_resnet32", "experts": 3, "expert_width": 1.0, "expert_loss": "sum",
    "method": "reslt", "network": "reslt", "cost": "ce", "head": "cosine", "head_scale": None, "head_init": "random",
    "branch": "bn", "branch_at": "map", "branches": 3, "branch_sizes": (65, 30), "branch_sets": "nested",
    "branch_loss": "pooled", "alpha": 0.5, "logit_adjust": 1.0, "smoothing": 0.0, "mutual": "off",
    "class_weights": "uniform", "sampler": "instance", "feature_loss": "off", "stages": (), "fusion": None, "tta": None,
    "epochs": 200, "batch_size": 128, "opt": "sgd", "lr": 0.15, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
    "sched": "cosine", "warmup_epochs": 5, "warmup_lr": 0.05, "min_lr": 0.0, "model_ema": False,
    "crop": "pad", "crop_padding": 4, "hflip": 0.5, "aa": "cifar10", "aa_fill": "grey", "cutout": 16,
    "cutout_fill": "mean", "rotate": 0.0, "reprob": 0.0, "color_jitter": (0.0,), "mixup": 0.0, "cutmix": 0.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
}  # fmt: skip


def test_the_measured_plus_recipe_is_what_was_measured_in_every_setting():
    """1.36 M parameters: experts of full width, each with a cosine classifier without bias (s = 30) on the pooled feature of
    each branch. Settings that are not in the list are their defaults, but for milestones, which a cosine does not use."""
    c = config_of("cifar100_lt_0.01/resnet32_3experts_plus")
    assert {name: c[name] for name in X3} == X3
    others = {name for name, value in c.flat().items() if value != DEFAULTS[name]} - X3.keys()
    assert others == {"decay_milestones", "experiment", "mixed_precision"}
    before = config_of("cifar100_lt_0.01/resnet32_3experts_strong_adjusted")
    of_x3 = {"expert_width", "head", "lr", "sched", "warmup_lr", "aa_fill", "cutout", "cutout_fill"}
    assert changed(before, c) == of_x3
    with torch.device("meta"):
        model = create_model(c.model, c.method, 100, 32)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 1.36
    assert len(model.classifiers) == 3
    for classifier in model.classifiers:
        assert [(name, tuple(p.shape)) for name, p in classifier.named_parameters()] == [("weight", (100, 64))]
        assert classifier.scale == 30


@pytest.mark.parametrize("data", CIFAR10 + CIFAR100)
def test_the_plus_family_of_cifar_differs_from_the_measured_one_in_dataset_experts_and_epochs_alone(data):
    anchor, of_data = config_of("cifar100_lt_0.01/resnet32_3experts_plus"), {"data", "branch_sizes"}
    for name, epochs in (("", 200), ("_400epochs", 400)):
        experts = config_of(f"{data}/resnet32_3experts_plus{name}")
        one = config_of(f"{data}/resnet32_plus{name}")
        assert changed(anchor, experts) - of_data == ({"epochs"} if epochs == 400 else set())
        assert changed(experts, one) == {"experts", "expert_width"}
        assert (one["experts"], one["epochs"]) == (1, epochs)


def test_the_plus_recipes_of_the_large_datasets_are_others_with_a_cosine_head_the_prior_and_their_augmentation():
    carried_over = {"head": "cosine", "alpha": 0.5, "logit_adjust": 1.0}
    strong = {"aa": "original", "mixup": 0.2, "color_jitter": (0.0,)}
    for recipe, own in {
        "imagenet_lt/resnext50": strong,
        "imagenet_lt/resnext50_3experts": strong,
        "places_lt/resnet152": {},
        "inaturalist2018/resnet50": {"mixup": 0.2},
        "inaturalist2018/resnet50_3experts": {"mixup": 0.2},
    }.items():
        plain, plus = config_of(recipe), config_of(f"{recipe}_plus")
        assert {name: plus[name] for name in changed(plain, plus)} == carried_over | own


def test_every_plus_recipe_says_whether_it_was_measured_and_is_for_no_row_of_the_paper():
    plus = [recipe for recipe in list_recipes() if re.search("_plus(_400epochs)?$", recipe)]
    assert len(plus) == 6 * 2 * 2 + 2 + 1 + 2
    for recipe in plus:
        text = " ".join((RECIPES / f"{recipe}.yaml").read_text().replace("\n#", "").split())
        is_measured = recipe == "cifar100_lt_0.01/resnet32_3experts_plus"
        assert ("Measured: 55.1 %" in text, "Not measured" in text) == (is_measured, not is_measured)
        assert is_measured or "carried over from cifar100_lt_0.01/resnet32_3experts_plus" in text
        assert read_recipe(recipe)[1] == []


def test_places_strong_without_its_weights_is_refused_with_their_name(tmp_path):
    with pytest.raises(UserError) as raised:
        resolve(["--recipe", "places_lt/resnet152_strong"])
    assert f"pretrained_file: there is no file {CUTMIX_FILE}; give its path with --pretrained-file FILE" in str(
        raised.value
    )
    (tmp_path / "mine.pth").touch()
    c = resolve(["--recipe", "places_lt/resnet152_strong", "--pretrained-file", "mine.pth"]).config
    assert (c["model"], c["pretrained_file"]) == ("resnet152", "mine.pth")
    flags = ["--model", "resnet152.a1_in1k", "--pretrained", "--pretrained-file", "none"]
    c = resolve(["--recipe", "places_lt/resnet152_strong", *flags]).config
    assert (c["model"], c["pretrained"], c["pretrained_file"]) == ("resnet152.a1_in1k", True, None)


def test_transformers_after_lift_share_its_settings_and_differ_in_backbone_and_branches():
    """Its published settings: adapters, s = 25, tau 1, SGD 0.01, batch 128, 10 epochs (iNaturalist 20), plain augmentation."""
    found = [recipe for recipe in list_recipes() if "vitb16" in recipe]
    assert len(found) == 6 * 2 * 2 - 2  # ImageNet-21k contains ImageNet's classes
    lift = dict(tune="adapter", pretrained=True, head="cosine", head_scale=25, head_init="class_means", logit_adjust=1)
    lift |= dict(opt="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=False, batch_size=128, warmup_epochs=0)
    lift |= dict(
        img_size=224, crop="rrc", hflip=0.5, scale=(0.08, 1), color_jitter=(0,), aa=None, mixup=0, sched="cosine"
    )
    for recipe in found:
        c = config_of(recipe)
        assert {name: c[name] for name in lift} == lift
        assert c["epochs"] == (20 if recipe.startswith("inat") else 10)
        cfg = timm.get_pretrained_cfg(c["model"])  # a tag of timm's, with the normalization that it states
        assert cfg.hf_hub_id
        assert (c["mean"], c["std"]) == (cfg.mean, cfg.std)
        if recipe.endswith("_reslt"):
            plain = config_of(recipe.replace("_reslt", "_lift"))
            of_method = {"method", "network", "branch", "branch_at", "branch_init_branches", "branch_sizes", "alpha"}
            assert changed(plain, c) - {"branches"} <= of_method
            assert (c["alpha"], c["branch"], c["branch_at"]) == (0.5, "bn", "pooled")


def test_a_recipe_for_any_dataset_takes_that_of_the_flags_and_names_the_run_after_it(tmp_path):
    config = resolve(["--recipe", "own_finetune", "--data", "digits_lt", "--model", "resnet18"]).config
    assert config.run.experiment == "digits_lt-resnet18-own_finetune-seed0"
    assert (config.model.pretrained, config.model.tune, config.optim.layer_decay) == (True, "full", 0.75)
    with pytest.raises(UserError, match="recipe own_finetune: it is for any dataset; name one with --data NAME"):
        resolve(["--recipe", "own_finetune"])
    with pytest.raises(UserError, match=r"did you mean own_finetune.*; for any dataset: own_finetune"):
        resolve(["--recipe", "own_finetun", "--data", "digits_lt"])


def test_layer_decay_without_trained_weights_is_warned_of():
    flags = ["--recipe", "own_finetune", "--data", "digits_lt", "--no-pretrained"]
    assert any("--layer-decay 0.75: layers far from" in warning for warning in resolve(flags).warnings)
    assert not resolve([*flags, "--layer-decay", "none"]).warnings


def named_recipes(text: str) -> list[list[str]]:
    """The recipes that each pattern of a text names: `folder/name` in backquotes, in which F is an imbalance factor,
    {a,b} stands for a and b, and * for anything. "; also `_a`, `_b`" after a pattern repeats it with these endings."""
    known, found = list_recipes(), []
    folders = {recipe.split("/")[0] for recipe in known}
    for pattern, endings in re.findall(r"`([\w.{},]+/[\w{},*]+)`((?:; also `_\w+`(?:, `_\w+`)*)?)", text):
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        names = ["".join(choice) for choice in itertools.product(*parts)]
        names = [n.replace("_F/", f"_{f}/") for n in names for f in (("0.01", "0.02", "0.1") if "_F/" in n else ("",))]
        if names[0].split("/")[0] in folders:
            for ending in ["", *re.findall(r"_\w+", endings)]:
                found.append([name for n in names for name in fnmatch.filter(known, n + ending) or [n + ending]])
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/paper_differences.md", "docs/beyond.md"])
def test_the_pages_name_recipes_that_exist(page):
    named = named_recipes((PROJECT / page).read_text(encoding="utf-8"))
    assert {name for names in named for name in names} <= set(list_recipes())
    assert named


rows_of_the_paper = functools.cache(stated_rows)
RECIPES_PAGE = (PROJECT / "docs/recipes.md").read_text(encoding="utf-8")


def test_every_recipe_is_on_the_page_of_recipes():
    named = {name for names in named_recipes(RECIPES_PAGE) for name in names}
    assert {recipe for recipe in list_recipes() if "/" in recipe} == named
    assert all(f"`{recipe}`" in RECIPES_PAGE for recipe in list_recipes() if "/" not in recipe)


@pytest.mark.parametrize("table", ROWS_OF_TABLES)
def test_the_page_of_recipes_states_the_rows_of_a_table_with_the_papers_numbers(table):
    """A line names recipes and their numbers in the same order; † marks rows with settings of this suite."""
    section = re.search(rf"^### Table {table}: .*?\n(?=##)", RECIPES_PAGE, re.MULTILINE | re.DOTALL)[0]
    stated = {recipe: row for recipe, row in rows_of_the_paper() if row.get("table") == table}
    found = set()
    for recipes, row, *cells in (line.strip("| ").split(" | ") for line in section.splitlines() if "`" in line):
        numbers = [float(number) for number in re.findall(r"[\d.]+", " ".join(cells))]
        for names in named_recipes(recipes):
            assert [stated[name]["all"] for name in names] == numbers, names
            assert {has_our_settings(name, stated[name]) for name in names} == {"†" in row}, names
            found.update(names)
    assert found == set(stated)


def test_the_page_of_recipes_names_those_of_each_figure():
    section = re.search(r"^### Figures\n.*?\n(?=##)", RECIPES_PAGE, re.MULTILINE | re.DOTALL)[0]
    stated = {}
    for recipe, row in rows_of_the_paper():
        stated.setdefault(row.get("figure"), set()).add(recipe)
    for number, recipes in re.findall(r"^\| (\d), [^|]* \| (.*) \|$", section, re.MULTILINE):
        assert {name for names in named_recipes(recipes) for name in names} == stated.pop(int(number)), number
    assert set(stated) == {None}

"""docs/methods.md against the registry, the recipes and its own tables."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import reslt
from reslt.config.command_line import train_parser
from reslt.config.methods import METHODS
from reslt.config.recipes import list_recipes, read_recipe
from reslt.config.schema import FIELDS, Config
from reslt.config.values import coerce
from reslt.models.heads import SCALES

PAGE = (Path(__file__).resolve().parents[1] / "docs/methods.md").read_text()
ITEMS = ("Parts", "Settings", "Stages", "Source", "Paper", "Published", "Measured")  # in this order
OPTIONAL = {"Stages", "Published"}


@cache
def entries() -> dict[str, dict[str, str]]:
    """Return {method: {item: its text on one line}}: the sections whose heading is one name in code."""
    found = {}
    for name, text in re.findall(r"^### `(.+?)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE):
        assert name not in found, f"{name} has two entries"
        items = re.findall(r"^- \*\*(\w+):\*\* (.*?)(?=\n- |\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
        found[name] = {item: " ".join(value.split()) for item, value in items}
    return found


def code_in(text: str, begin: str) -> list[str]:
    return re.findall(rf"`({begin}.*?)`", text)


def stated_settings(text: str) -> dict[str, object]:
    """Return the settings of the flags in code that have a value."""
    flags = " ".join(code for code in code_in(text, "--") if " " in code).split()
    typed = vars(train_parser().parse_args(flags))
    return {name: coerce(name, value) for name, value in typed.items() if name in FIELDS and name != "teachers"}


def config_of(name: str) -> Config:
    return Config.of(method=name, **METHODS[name].defaults)


def percentages(text: str) -> set[float]:
    """Return the numbers with a decimal point; those below 1 are imbalance factors."""
    return {float(number) for number in re.findall(r"[1-9]\d*\.\d+", text)}


def test_every_method_has_an_entry_of_the_same_form_and_every_entry_a_method():
    assert sorted(entries()) == sorted(reslt.list_methods())
    for name, entry in entries().items():
        assert [item for item in ITEMS if item in entry] == list(entry), name
        assert entry.keys() >= set(ITEMS) - OPTIONAL, name


@pytest.mark.parametrize("name", METHODS)
def test_cross_entropy_with_the_stated_parts_and_stages_is_the_method(name):
    entry, expected = entries()[name], config_of(name).flat()
    stages = tuple(yaml.safe_load(code) for code in code_in(entry.get("Stages", ""), "{"))
    stages = tuple({key: "off" if value is False else value for key, value in stage.items()} for stage in stages)
    stated = Config.of(method="ce", **stated_settings(entry["Parts"]), stages=stages).flat()
    assert stated | {"method": name} == expected


@pytest.mark.parametrize("name", METHODS)
def test_the_stated_settings_are_the_defaults(name):
    defaults = config_of(name).flat()
    defaults["head_scale"] = SCALES.get(defaults["head"])
    for setting, value in stated_settings(entries()[name]["Settings"]).items():
        assert (setting, value) == (setting, defaults[setting])


def test_the_papers_numbers_are_those_of_the_recipes():
    published = {}
    for recipe in list_recipes():
        settings, rows, _ = read_recipe(recipe)
        of_method = published.setdefault(settings.get("method", "reslt"), set())
        of_method.update(float(row["all"]) for row in rows if "all" in row)
    for name, entry in entries().items():
        assert percentages(entry["Paper"]) <= published.get(name, set()), name


def test_the_measured_numbers_of_entries_are_those_of_the_tables():
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if re.match(r"\| `\w+_lt", line)}
    for name in METHODS.keys() - {"lfme"}:  # which has a protocol of its own
        digits = re.search(r"digits (\S+?)(,|;| |$)", entries()[name]["Measured"])[1]
        assert rows[f"digits_lt/{name}"].split("|")[3].strip() == digits, name
        if (recipe := f"cifar100_lt_0.01/resnet32_{name}") in rows:
            assert f"CIFAR-100-LT {rows[recipe].split('|')[2].strip()}" in entries()[name]["Measured"]


def test_the_methods_without_a_measured_number_on_a_benchmark_are_listed():
    count, listed = re.search(
        r"The other (\d+) methods have no measured number on a benchmark\*\*:(.*?)\n\n", PAGE, re.S
    ).groups()
    without = [name for name, entry in entries().items() if not re.search("CIFAR|frozen", entry["Measured"])]
    assert sorted(re.findall("`(.+?)`", listed)) == sorted(without)
    assert int(count) == len(without)

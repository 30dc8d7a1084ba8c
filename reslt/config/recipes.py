"""Recipes: named files of settings, with the rows of the paper that each reproduces."""

from __future__ import annotations

import re
from pathlib import Path

from reslt.config.checks import NOT_IN_A_RECIPE, file_faults
from reslt.config.places import RECIPES
from reslt.config.yaml_files import read_yaml
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.core.text import listed


def is_recipe_file(recipe: str) -> bool:
    """Return whether `--recipe` names a file rather than one of the project's recipes."""
    return recipe.endswith((".yaml", ".yml"))


def list_recipes() -> list[str]:
    """Return the names of the project's recipes, such as cifar100_lt_0.01/resnet32. A name without a folder is a recipe for
    any dataset."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def in_natural_order(names: list[str]) -> list[str]:
    """Sort names, with numbers in them by value: 0.02 before 0.1, resnet50 before resnet152."""

    def key(name: str) -> list:
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        return [float(part) if i % 2 else part for i, part in enumerate(parts)]  # text and number alternate

    return sorted(names, key=key)


def no_such_recipe(flag: str, recipe: str) -> UserError:
    """Return the error for a missing file, or for an unknown name: with the closest name and the dataset's recipes, or else
    the known datasets."""
    if recipe.endswith((".yaml", ".yml")):
        return UserError(
            f"{flag}: there is no recipe {recipe!r}, nor a file of that name; paths start from {Path.cwd()}"
        )
    known = list_recipes()
    data = recipe.partition("/")[0]
    names = [name.removeprefix(f"{data}/") for name in known if name.startswith(f"{data}/")]
    datasets = list(dict.fromkeys(name.partition("/")[0] for name in known if "/" in name))
    there = f"{data}/ has {listed(names)}" if names else f"there are some for {', '.join(datasets) or 'no dataset'}"
    if not names and (general := [name for name in known if "/" not in name]):
        there += f"; for any dataset: {', '.join(general)}"
    return UserError(f"{flag}: there is no recipe {recipe!r}{did_you_mean(recipe, known)}; {there}")


def read_recipe(recipe: str) -> tuple[dict, list[dict], list[str]]:
    """Return a recipe's settings, the rows of the paper that it reproduces, and its faults, given its name or file. Raises
    UserError if there is no such file.

    A row states `table` or `figure` with its number, `row` (its label), and the paper's values of many, medium, few and all.
    It also states `split: standard` if its groups are those of the standard shot split although the dataset has the paper's;
    `protocol: own` if its settings are those that the method's authors published, not those that all rows share; and
    `settings: ours` if one of them is this suite's choice, since neither the paper nor any public code states it.

    In a figure, `series` and `x` (with the name `axis`) place the row, `sweep` maps one setting to the plotted values, and
    `kind` states how the row is drawn if not in the figure's usual way."""
    path = Path(recipe) if is_recipe_file(recipe) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise no_such_recipe("--recipe", recipe)
    settings = read_yaml(path)
    rows = settings.pop("paper", None) or []
    rows = rows if isinstance(rows, list) else [rows]
    faults = file_faults(settings, path, NOT_IN_A_RECIPE)
    if not all(isinstance(row, dict) and ("table" in row) != ("figure" in row) for row in rows):
        faults.append(f"{path}: paper: must map table (or figure), row, many, medium, few, all to their values")
        rows = []
    return settings, rows, faults

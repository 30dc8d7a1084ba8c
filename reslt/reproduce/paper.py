"""The rows of the paper's tables and figures that recipes reproduce. Imports no torch."""

from __future__ import annotations

from reslt.config.recipes import in_natural_order, list_recipes, read_recipe
from reslt.core.errors import UserError

# The number of rows of each table in the paper
ROWS_OF_TABLES = {1: 5, 2: 13, 3: 11, 4: 11, 5: 74, 6: 16, 7: 12, 8: 5, 9: 8}
KINDS = ("table", "figure")
OWN = "own"  # the value of `protocol:` for a method's own published settings
OURS = "ours"  # the value of `settings:` for settings that are not published
WHY_OURS = "with settings of this suite, since neither the paper nor public code states them"


def stated_rows() -> list[tuple[str, dict]]:
    """Return each recipe with each row of the paper that it reproduces, in natural order. `data` and `model` of the recipe
    complete the row."""
    found = []
    for recipe in in_natural_order(list_recipes()):
        settings, rows, _ = read_recipe(recipe)
        of_recipe = {name: str(settings.get(name, "")) for name in ("data", "model")}
        found += [(recipe, of_recipe | row) for row in rows]
    return found


def key_of(row: dict) -> tuple:
    """Return the key that identifies a row of the paper: table, dataset, model and label; for a figure, also its position.

    Several recipes may reproduce one row, for example one of them with the evaluation of the authors' code."""
    kind = next(kind for kind in KINDS if kind in row)
    position = (row.get("series"), str(row.get("x"))) if kind == "figure" else ()
    model = row["model"].partition(".")[0]  # without the tag of pretrained weights
    return (kind, row[kind], row["data"], model, str(row.get("row", "")), *position)


def follows_own_protocol(recipe: str, row: dict) -> bool:
    """Return whether a recipe has the published settings of its method instead of those that all rows of this suite share.
    Raises UserError if `protocol` is invalid."""
    protocol = row.get("protocol")
    if protocol not in (None, OWN):
        raise UserError(
            f"recipe {recipe}: paper: protocol: {protocol!r} is not `{OWN}`, the method's own published settings; leave it "
            "out for those that all rows share"
        )
    return protocol == OWN


def has_our_settings(recipe: str, row: dict) -> bool:
    """Return whether a recipe has settings that this suite chose, since neither the paper nor public code states them. Raises
    UserError if `settings` is invalid."""
    if (settings := row.get("settings")) not in (None, OURS):
        raise UserError(
            f"recipe {recipe}: paper: settings: {settings!r} is not `{OURS}`, chosen by this suite; leave it out for those "
            "that the paper or public code states"
        )
    return settings == OURS


def without_own_protocols(stated: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Leave out recipes with a method's own protocol, except for rows that no other recipe reproduces."""
    shared = {key_of(row) for recipe, row in stated if not follows_own_protocol(recipe, row)}
    return [(recipe, row) for recipe, row in stated if row.get("protocol") != OWN or key_of(row) not in shared]


def coverage(stated: list[tuple[str, dict]] | None = None) -> str:
    """Return the number of rows of each table and figure that a command reproduces, as text. `stated`: the result of
    `stated_rows`, which reads every recipe."""
    by_number: dict[tuple[str, int], set[tuple]] = {}
    published = set()  # rows that a recipe reproduces without settings of ours
    for recipe, row in stated_rows() if stated is None else stated:
        key = key_of(row)
        by_number.setdefault(key[:2], set()).add(key)
        published |= set() if has_our_settings(recipe, row) else {key}
    lines, total, covered = [], 0, 0
    for table, rows in ROWS_OF_TABLES.items():
        here = len(by_number.get(("table", table), ()))
        missing = f", {rows - here} without recipe" * (rows > here)
        lines.append(f"table {table}: {here} of {rows} rows{missing}")
        total, covered = total + rows, covered + here
    figures = sorted(number for kind, number in by_number if kind == "figure")
    lines += [f"figure {number}: {len(by_number['figure', number])} rows" for number in figures]
    of_tables = set().union(*(by_number.get(("table", table), ()) for table in ROWS_OF_TABLES))
    ours = len(of_tables - published)
    of_which = f", of which {ours} {WHY_OURS}" * bool(ours)
    return "\n".join([*lines, f"{covered} of {total} rows of the paper's tables have a command{of_which}"])

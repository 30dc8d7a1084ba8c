"""The rows of a table or figure of the paper, and the runs of each row. Imports no torch."""

from __future__ import annotations

import fnmatch
import itertools
import re
from dataclasses import dataclass, replace

from reslt.config.checks import NOT_IN_A_RECIPE
from reslt.config.command_line import without_flags
from reslt.config.recipes import in_natural_order, list_recipes, no_such_recipe, read_recipe
from reslt.config.resolve import resolve
from reslt.config.schema import FIELDS, HINTS, SETTING_OF_FLAG, Config, flag_of
from reslt.config.values import coerce
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.data.groups import SHOTS
from reslt.reproduce.paper import KINDS, has_our_settings, stated_rows, without_own_protocols

COLUMNS = (*SHOTS, "all")
MARK = "†"
MOST_NAMED = 12  # recipes in a message
DRAWINGS = ("lines", "branches", "bars", "groups", "clusters")  # kinds of figures, each drawn by a function of `figure`
NOT_PASSED_ON = {
    "recipe": "the recipes are chosen with --table, --figure or --recipes",
    "seed": "the seeds are given with --seeds",
    "experiment": "runs are named after their recipe and seed",
    "resume": "every run resumes from its last checkpoint",
    "profile_trace": "each run would replace the file of the others; --profile prints into their logs",
    "overwrite": "finished work is kept; start over with another --output, or remove the run's folder",
}


@dataclass(frozen=True, eq=False)
class Run:
    """One run: the arguments of train.py, and the resulting configuration. Rows that require the same run share it. If a
    recipe requires something that is missing, such as a file of weights, there is a fault and no configuration."""

    recipe: str
    settings: dict[str, object]
    seed: int
    arguments: tuple[str, ...]
    config: Config | None
    fault: str | None = None
    first_stage: Run | None = None  # the run from which it starts, perhaps with others
    teachers: tuple[Run, ...] = ()  # the runs from which it learns

    @property
    def requires(self) -> tuple[Run, ...]:
        """The runs that must be done before it."""
        return (*((self.first_stage,) if self.first_stage else ()), *self.teachers)

    @property
    def name(self) -> str:
        """Recipe, varied settings and seed, for the console."""
        varied = [f"{name} {as_text(value)}" for name, value in self.settings.items()]
        return " ".join([self.recipe, *varied, f"seed {self.seed}"])


@dataclass(frozen=True)
class Row:
    """A line of the table: a recipe with one value of each varied setting, and its runs, one per seed."""

    recipe: str
    label: str  # its name in the paper
    settings: dict[str, object]
    stated: dict[str, float]  # those of many, medium, few and all that the paper states
    runs: list[Run]
    series: str  # of a figure: the line that the point is on
    x: float | str | None  # its position on that line
    axis: str | None  # the name of x: the setting, if x is the value of one
    shot_split: str = "paper"  # of its groups; "standard" even if the dataset has the paper's
    drawing: str | None = None  # one of DRAWINGS; None: the usual one of the figure
    is_ours: bool = False  # whether this suite chose some settings; see `paper.has_our_settings`

    @property
    def marked(self) -> str:
        """The label, with a mark if some settings are this suite's."""
        return f"{self.label} {MARK}".strip() if self.is_ours else self.label


class NotUsed(UserError):
    """A varied setting that a run does not use, or a value that the run rejects."""

    def __init__(self, setting: str, reason: str):
        super().__init__(f"--vary {setting}: {reason}")
        self.setting = setting


@dataclass
class Selection:
    """Recipes, each with the row of the paper that it reproduces."""

    chosen: list[tuple[str, dict]]

    def only(self, patterns: list[str]) -> Selection:
        """Return the recipes with a pattern in name or label (fnmatch, any case). Raises UserError if there are none."""
        names = [f"{recipe} {row.get('row', '')}".strip() for recipe, row in self.chosen]
        anywhere = [f"*{pattern}*".lower() for pattern in patterns]
        kept = [any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in anywhere) for name in names]
        if not any(kept):
            lines = "\n".join(f"  {name}" for name in names)
            raise UserError(
                f"--rows {' '.join(patterns)}: no row matches; there are\n{lines}\n(--own adds recipes with their methods' "
                "own settings)"
            )
        return replace(self, chosen=list(itertools.compress(self.chosen, kept)))

    def rows(
        self, seeds: list[int], output: str, flags: list[str], varied: dict[str, list]
    ) -> tuple[list[Row], list[str]]:
        """Return the rows with their runs, and the warnings of the configurations. Recipes that do not use a varied setting
        are left out, with a warning. Raises UserError if no run is possible, for example because a flag is invalid."""
        parts, by_folder, warnings, not_used = [], {}, {}, {}
        for recipe, row in self.chosen:
            swept = _sweep(recipe, row)
            for values in itertools.product(*(swept | varied).values()):
                settings = dict(zip(swept | varied, values, strict=True))
                _check_passed_on(flags, settings)
                try:
                    created = [create_run(recipe, settings, seed, output, flags) for seed in seeds]
                except NotUsed as reason:
                    not_used[recipe] = reason
                    continue
                runs = []
                for run, surprises in created:
                    warnings |= dict.fromkeys(surprises)
                    if run.fault:
                        runs.append(run)
                        continue
                    same = by_folder.setdefault(run.config.run_folder, run)
                    if same.config != run.config:
                        raise UserError(
                            f"{same.name} and {run.name} would share {same.config.run_folder}; rename one of the recipes"
                        )
                    runs.append(same)
                parts.append((recipe, row, settings, next(iter(swept), None), runs))
        if not_used and not parts:
            raise next(iter(not_used.values()))
        warnings |= dict.fromkeys(_left_out(not_used, {recipe for recipe, *_ in parts}))
        faults = [run.fault for *_, runs in parts for run in runs]
        if all(faults):
            raise UserError(faults[0])
        return [_create_row(*of_row) for of_row in parts], list(warnings)


def of_the_paper(
    kind: str, number: int, own_protocols: bool = True, stated: list[tuple[str, dict]] | None = None
) -> Selection:
    """Return the recipes with a row in a table or figure, in natural order.

    `own_protocols`: whether recipes with a method's own published settings are included, even if another recipe reproduces
    the row; `stated`: the result of `stated_rows`, which reads every recipe. Raises UserError if there are none."""
    stated = stated_rows() if stated is None else stated
    chosen = [(recipe, row) for recipe, row in stated if row.get(kind) == number]
    if not chosen:
        numbers_of = {k: sorted({row[k] for _, row in stated if k in row}) for k in KINDS}
        known = " and ".join(f"{k}s {', '.join(map(str, numbers))}" for k, numbers in numbers_of.items() if numbers)
        raise UserError(
            f"--{kind} {number}: there is no recipe for it, only for {known or 'nothing'}; give one of these"
        )
    shared = without_own_protocols(chosen)  # also raises UserError for an invalid protocol
    return Selection(chosen if own_protocols else shared)


def of_recipes(wanted: list[str]) -> Selection:
    """Return recipes by name, pattern or file, each with its first row in a table of the paper, else in a figure. Raises
    UserError if a name or pattern has no recipe."""
    known, names = list_recipes(), {}
    for pattern in wanted:
        found = [pattern] if pattern.endswith((".yaml", ".yml")) else fnmatch.filter(known, pattern)
        if not found:
            raise no_such_recipe("--recipes", pattern)
        names |= dict.fromkeys(in_natural_order(found))
    chosen = []
    for name in names:
        rows = [row for row in read_recipe(name)[1] if "sweep" not in row]
        first = next((row for row in rows if "table" in row), rows[0] if rows else {})
        kind = next((kind for kind in KINDS if kind in first), None)
        label = ", ".join([f"{kind} {first[kind]}", *([first["row"]] if "row" in first else [])]) if kind else ""
        chosen.append((name, first | {"row": label}))
    return Selection(chosen)


def parse_varied(items: list[str]) -> dict[str, list]:
    """['alpha=0,0.5', 'branch_sizes=65 30,50 20'] -> {'alpha': [0.0, 0.5], ...}. Raises UserError if invalid."""
    varied = {}
    for item in items:
        key, equals, texts = item.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if not equals or name not in FIELDS:
            hint = did_you_mean(name, list(FIELDS)) if equals else ""
            raise UserError(f"--vary {item}: give a setting and its values, such as alpha=0,0.5,0.9{hint}")
        if name in (*NOT_PASSED_ON, "output", "imports"):
            raise UserError(f"--vary {name}: {NOT_PASSED_ON.get(name, f'all runs share {flag_of(name)}')}")
        if name in varied:
            raise UserError(f"--vary {item}: {name} is already varied; give all its values in one --vary")
        if "dict" in str(HINTS[name]):
            raise UserError(f"--vary {name}: its values contain commas; write a recipe for each value")
        varied[name] = list(dict.fromkeys(_value(f"--vary {item}", name, text) for text in texts.split(",")))
    return varied


def _create_row(recipe: str, row: dict, settings: dict, swept: str | None, runs: list[Run]) -> Row:
    # The paper does not state for which value of a sweep its result is.
    stated = {} if swept else {column: row[column] for column in COLUMNS if column in row}
    for column, value in stated.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"recipe {recipe}: paper: {column}: {value!r} is not a number; give top-1 in percent")
    if (split := row.get("split", "paper")) not in ("paper", "standard"):
        raise UserError(f"recipe {recipe}: paper: split: {split!r} is neither paper nor standard")
    if (drawing := row.get("kind")) not in (None, *DRAWINGS):
        raise UserError(f"recipe {recipe}: paper: kind: {drawing!r} is unknown; give one of {', '.join(DRAWINGS)}")
    data = next((run.config.data.data for run in runs if run.config), recipe)
    # --vary makes a curve over the first setting, with a series per value of the others.
    is_curve = "figure" not in row and bool(settings)
    axis = next(iter(settings)) if is_curve else swept
    others = [f"{name} {as_text(value)}" for name, value in settings.items() if name != axis]
    series = recipe if is_curve else str(row.get("series", data))
    return Row(
        recipe=recipe,
        label=str(row.get("row", "")),
        settings=settings,
        stated=stated,
        runs=runs,
        series=", ".join([series, *others]),
        x=settings[axis] if axis else row.get("x"),
        axis=axis or row.get("axis"),
        shot_split=split,
        drawing=drawing,
        is_ours=has_our_settings(recipe, row),
    )


def create_run(recipe: str, settings: dict, seed: int, output: str, flags: list[str]) -> tuple[Run, list[str]]:
    """Return a run, named as by train.py, with varied settings before the seed, and the warnings of its configuration. Raises
    NotUsed if the run does not use one of the `settings`."""
    arguments = ["--recipe", recipe, "--seed", str(seed), "--output", output, "--resume", "auto", *flags]
    arguments += [part for name, value in settings.items() for part in as_flag(name, value)]
    try:
        resolved = resolve(arguments, ignore_unused=True)
    except UserError as fault:
        if settings and create_run(recipe, {}, seed, output, flags)[0].config is not None:
            raise NotUsed(next(iter(settings)), str(fault)) from None
        return Run(recipe, settings, seed, tuple(arguments), None, str(fault)), []
    stem = resolved.config.run.experiment.removesuffix(f"-seed{seed}")
    varied = "".join(f"-{name}{as_text(value)}" for name, value in settings.items())
    experiment = f"{stem}{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', varied)}-seed{seed}"
    config = resolved.config.changed(experiment=experiment)
    if unused := sorted(config.unused & settings.keys()):
        why = config.without_effect.get(unused[0], f"method {config.method.method} does not use it")
        raise NotUsed(unused[0], why)
    arguments = without_flags(arguments, config.unused)  # train.py would reject them
    return Run(recipe, settings, seed, (*arguments, "--experiment", experiment), config), resolved.warnings


def _left_out(not_used: dict[str, NotUsed], kept: set[str]) -> list[str]:
    """Return a warning for each varied setting that some recipes do not use. `kept`: recipes of which some rows are left,
    since they use it with other values of other settings."""
    warnings = []
    for setting in dict.fromkeys(reason.setting for reason in not_used.values()):
        names = [f"{n} (some rows)" if n in kept else n for n, r in not_used.items() if r.setting == setting]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        warnings.append(
            f"--vary {setting}: recipes that do not use it are left out: {', '.join(names[:MOST_NAMED])}{more}"
        )
    return warnings


def as_flag(name: str, value: object) -> list[str]:
    """Return a setting as arguments of train.py."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", *(f"{key}={item!r}" for key, item in value.items())]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"--{flag}", *("none" if item is None else str(item) for item in values)]


def as_text(value: object) -> str:
    """Return a value of a setting for names and tables: 0.5, 65-30, true, none."""
    if isinstance(value, (list, tuple)):
        return "-".join(map(as_text, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={as_text(item)}" for key, item in value.items())
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def flag_names(flags: list[str]) -> list[str]:
    """Return the names of the settings that command-line flags set."""
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    return [SETTING_OF_FLAG.get(name, name[2:].replace("-", "_").removeprefix("no_")) for name in names]


def _check_passed_on(flags: list[str], settings: dict) -> None:
    for name in flag_names(flags):
        if reason := NOT_PASSED_ON.get(name):
            raise UserError(f"{flag_of(name)} is not passed on to train.py: {reason}")
        if name in settings:
            raise UserError(
                f"--{name.replace('_', '-')}: this setting is varied over {as_text(settings[name])}, ...; drop it"
            )


def _sweep(recipe: str, row: dict) -> dict[str, list]:
    """Return the sweep of a figure's row, such as {'alpha': [0.0, 0.5, 0.9]}; {} without one. Raises UserError if invalid."""
    sweep = row.get("sweep") or {}
    is_one = isinstance(sweep, dict) and len(sweep) <= 1
    if not is_one or not all(name in FIELDS and isinstance(values, list) and values for name, values in sweep.items()):
        raise UserError(f"recipe {recipe}: paper: sweep: {sweep!r} must map one setting to the list of its values")
    if refused := [name for name in sweep if name in NOT_IN_A_RECIPE or "dict" in str(HINTS[name])]:
        raise UserError(f"recipe {recipe}: paper: sweep: {refused[0]}: a file cannot set it")
    return {name: [_value(f"recipe {recipe}", name, v) for v in values] for name, values in sweep.items()}


def _value(where: str, name: str, value: object) -> object:
    """Convert a value to the type of its setting; a text may contain several, separated by spaces. Raises UserError."""
    if HINTS[name] is bool and value in ("true", "false"):
        return value == "true"
    if "dict" in str(HINTS[name]) and isinstance(value, str):
        return value.split()
    try:
        return coerce(name, value.split() if isinstance(value, str) and "tuple" in str(HINTS[name]) else value)
    except ValueError as reason:
        raise UserError(f"{where}: {name}: {reason}") from None

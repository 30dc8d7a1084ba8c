"""`python -m reslt.reproduce`: train the runs of a table or figure of the paper, and compare them with its numbers.

python -m reslt.reproduce --table 5 --plan                       what remains to be done, and how long it would take
python -m reslt.reproduce --table 5 --rows 'cifar10_*strong'     train missing runs, print and write the table
python -m reslt.reproduce --figure 4 --jobs 3                    three runs share the GPU; also draws the figure
python -m reslt.reproduce --table 5 --streams 9                  nine runs share a process, each on its own CUDA stream
python -m reslt.reproduce --table 5 --launcher slurm --jobs 20 --slurm partition=gpu time=2:00:00     jobs on a cluster
python -m reslt.reproduce --recipes 'places_lt/*' my/own.yaml --vary mixup=0,0.2,1.0 --seeds 0 1
python -m reslt.reproduce --plan                                 the plans of all tables of the paper
python -m reslt.reproduce --coverage                             the number of the paper's rows that have a command
Flags of train.py, such as --epochs 1 --limit-train 256 --data-dir DIR, apply to every run.
If interrupted, the same command resumes where it stopped. Exit code: 0 all done, 1 some failed, 2 an invalid command.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reslt.config.command_line import add_import_flag
from reslt.config.imports import load_imports
from reslt.config.places import dataset_folder
from reslt.config.schema import DEFAULTS, FIELDS, flag_of
from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError
from reslt.core.spelling import did_you_mean
from reslt.reproduce.first_stage import rows_of_required, share_first_stages, with_teachers
from reslt.reproduce.paper import ROWS_OF_TABLES, coverage, stated_rows
from reslt.reproduce.rows import NOT_PASSED_ON, Row, Selection, flag_names, of_recipes, of_the_paper, parse_varied
from reslt.reproduce.slurm import DEFAULTS as DEFAULTS_OF_JOBS
from reslt.reproduce.slurm import (
    LAUNCHERS,
    SETTINGS,
    Jobs,
    check_launcher,
    create_executor,
    describe_jobs,
    parse_settings,
)

if TYPE_CHECKING:
    from reslt.reproduce.rate import Rate
    from reslt.reproduce.speed import Cost

SEEDS = [0, 1, 2]
TABLES_OF_COST = (7,)  # of the paper: these state the cost of a prediction
LONGEST_NAME = 100  # of the table's folder, since there may be many patterns of rows


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own flags."""
    parser = Parser(
        prog="python -m reslt.reproduce",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=int, metavar="N", help="train the rows of a table of the paper")
    what.add_argument("--figure", type=int, metavar="N", help="train the runs of a figure of the paper")
    what.add_argument("--recipes", nargs="+", metavar="RECIPE", help="train recipes, by name, pattern or file")
    what.add_argument("--coverage", action="store_true", help="count the paper's rows that have a command, and exit")
    parser.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="only rows whose recipe or label matches a pattern"
    )
    parser.add_argument(
        "--own",
        action="store_true",
        help="also train recipes with the settings that a method's authors published, even if the row has one with the shared "
        "settings",
    )
    parser.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V1,V2", help="train a row per value of a setting"
    )
    parser.add_argument(
        "--on",
        choices=("val",),
        help="with --recipes and --vary: compare the settings only on the validation list (or on --val-from-train 0.1), "
        "choose the best mean over seeds, and evaluate that choice on test once",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, metavar="S", help="seeds of each row (default: 0 1 2)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes, or jobs of a cluster, at once (default: 1)"
    )
    parser.add_argument(
        "--streams",
        type=int,
        default=1,
        metavar="N",
        help="runs in each process, which take turns step by step, each on its own CUDA stream (default: 1)",
    )
    parser.add_argument(
        "--launcher",
        choices=("local", *LAUNCHERS),
        default="local",
        help="local: train on this machine; slurm: in jobs of a SLURM cluster (requires submitit); submitit-local: in jobs on "
        "this machine, for trials (default: local)",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"settings of the jobs: {', '.join(SETTINGS)} (default: "
        f"{' '.join(f'{name}={value}' for name, value in DEFAULTS_OF_JOBS.items())})",
    )
    parser.add_argument(
        "--name", help="name of the table's folder under DIR/reproduce/; unset: table5, figure4, recipes, ..."
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what remains to be done, and train nothing; without a selection, for all tables",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="also measure the cost of a prediction: parameters, multiply-adds, time of a batch (always for table 7)",
    )
    parser.add_argument(
        "--images-per-second", type=float, metavar="R", help="with --plan: assume this rate instead of measuring it"
    )
    parser.add_argument(
        "--output", default=DEFAULTS["output"], metavar="DIR", help="parent folder of run folders (default: output)"
    )
    add_import_flag(parser)
    return parser


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own flags, and those for train.py; import what `--import` names. Raises UserError."""
    parser = create_parser()
    given, flags = parser.parse_known_args(arguments)
    own = [action.option_strings[0] for action in parser._actions]
    for flag in flags:
        if flag.startswith("--") and not {*flag_names([flag])} <= {*FIELDS, *NOT_PASSED_ON}:
            known = [*own, *map(flag_of, FIELDS)]
            raise UserError(
                f"unknown flag {flag}{did_you_mean(flag, known)}; `python -m reslt.reproduce --help` lists this command's "
                "flags, `python train.py --help` those that it passes on"
            )
    if given.on and not (given.vary and given.recipes):
        raise UserError(
            f"--on {given.on} chooses among settings of recipes; give these with --recipes RECIPE --vary KEY=V1,V2"
        )
    given.is_of_all = not (given.recipes or given.coverage) and given.table is None and given.figure is None
    if given.is_of_all and (not given.plan or given.rows):
        reason = "--rows chooses among the rows of one of them" if given.plan else "only --plan covers all tables"
        raise UserError(f"give one of --table N, --figure N, --recipes RECIPE or --coverage; {reason}")
    given.seeds = list(dict.fromkeys(given.seeds))
    for name in ("jobs", "streams"):
        if vars(given)[name] < 1:
            raise UserError(f"--{name} {vars(given)[name]}: it must be at least 1")
    given.slurm_settings = parse_settings(given.slurm)
    if given.slurm and given.launcher == "local":
        raise UserError(f"--slurm {given.slurm[0]}: it sets up the jobs of --launcher slurm; add that, or drop it")
    if given.launcher != "local" and not given.plan:
        check_launcher(given.launcher)
    if given.images_per_second is not None and not given.images_per_second > 0:
        raise UserError(f"--images-per-second {given.images_per_second:g}: it must be above 0")
    load_imports(given.imports or ())
    return given, [*flags, *(part for name in given.imports or () for part in (flag_of("imports"), name))]


def select(given: argparse.Namespace) -> tuple[str, Selection]:
    """Return the name of the selection, and its recipes with their rows. Raises UserError."""
    if given.recipes:
        name, selection = "recipes", of_recipes(given.recipes)
    else:
        kind, number = ("table", given.table) if given.table is not None else ("figure", given.figure)
        name, selection = f"{kind} {number}", of_the_paper(kind, number, given.own)
    if given.rows:
        name, selection = f"{name}, rows {' '.join(given.rows)}", selection.only(given.rows)
    return name, selection


@entry_point
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    given, flags = parse_arguments(arguments)
    if given.coverage:
        if extra := [part for part in arguments if part != "--coverage"]:
            raise UserError(f"--coverage counts the rows of all tables and takes no other flag; drop {extra[0]}")
        print(coverage())
        return
    varied = parse_varied(given.vary)
    if given.is_of_all:
        print_plans(given, flags, varied)
        return
    name, selection = select(given)
    if given.on:
        name = f"search: {', '.join(varied)}"
    rows = rows_of(selection, given, flags, varied)
    if given.plan:
        from reslt.reproduce.rate import Rate

        print_plan(rows, given, Rate(given.images_per_second))
    elif not reproduce(name, rows, given, flags, varied):
        sys.exit(1)


def rows_of(selection: Selection, given: argparse.Namespace, flags: list[str], varied: dict[str, list]) -> list[Row]:
    """Return the rows of a selection, with the runs that they share or require. Prints the warnings."""
    if given.on:
        from reslt.reproduce.search import search_rows

        rows, warnings = search_rows(selection, given.seeds, given.output, flags, varied)
    else:
        rows, warnings = selection.rows(given.seeds, given.output, flags, varied)
        rows = share_first_stages(with_teachers(rows), given.output, flags)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return rows


def print_plans(given: argparse.Namespace, flags: list[str], varied: dict[str, list]) -> None:
    """Print the plan of each table of the paper, and the number of rows that have a command."""
    from reslt.reproduce.rate import Rate

    rate, stated = Rate(given.images_per_second), stated_rows()
    for number in ROWS_OF_TABLES:
        selection = of_the_paper("table", number, given.own, stated)
        print(f"Table {number}\n")
        print_plan(rows_of(selection, given, flags, varied), given, rate)
        print()
    print(coverage(stated).splitlines()[-1])


def print_plan(rows: list[Row], given: argparse.Namespace, rate: Rate) -> None:
    """Print the plan of the rows, without training."""
    from reslt.reproduce.jobs import visible_gpus
    from reslt.reproduce.plan import plan
    from reslt.reproduce.rate import describe_device
    from reslt.reproduce.status import read_status
    from reslt.reproduce.table import TableRow, list_costs

    lines = [TableRow(row, [(run, read_status(run)) for run in row.runs]) for row in [*rows, *rows_of_required(rows)]]
    devices = max(min(given.jobs, len(visible_gpus())), 1) if given.launcher != "slurm" else given.jobs
    print(plan(lines, rate, devices, describe_device()))
    if given.speed:
        costs = costs_of(rows)
        print(f"\n{list_costs([replace(line, cost=cost) for line, cost in zip(lines, costs, strict=False)])}")


def costs_of(rows: list[Row]) -> list[Cost | None]:
    """Measure the cost of a prediction with the network of each row; None if that is impossible."""
    from reslt.reproduce.plan import TrainingList
    from reslt.reproduce.speed import Costs

    costs, configs = Costs(), [next((run.config for run in row.runs if run.config), None) for row in rows]
    return [config and costs.of(config, TrainingList(config.data.data).num_classes) for config in configs]


def reproduce(
    name: str,
    rows: list[Row],
    given: argparse.Namespace,
    flags: list[str],
    varied: dict[str, list],
) -> bool:
    """Train the runs that are not done, and write the table after each. Return whether all runs are done."""
    from reslt.data.datasets import how_to_prepare, list_files, read_info
    from reslt.prepare.subsets import make_if_embedded
    from reslt.reproduce.figure import draw
    from reslt.reproduce.jobs import Processes
    from reslt.reproduce.rate import describe_device
    from reslt.reproduce.schedule import Trainings
    from reslt.reproduce.search import SearchState
    from reslt.reproduce.table_state import TableState

    folder = re.sub(r"[^A-Za-z0-9_.+-]+", "-", given.name or name.replace(" ", "", 1)).strip("-")[:LONGEST_NAME]
    kind = SearchState if given.on else TableState
    table = kind(name, rows, Path(given.output) / "reproduce" / folder)
    device = describe_jobs(given.slurm_settings) if given.launcher == "slurm" else describe_device()
    table.facts = [
        f"seeds {', '.join(map(str, given.seeds))}",
        settings_fact(flags, varied),
        f"device of the last call: {device}",
    ]
    to_do = table.to_do
    for data in {run.config.data.data for run in to_do}:  # before the runs, which would all create it at once
        make_if_embedded(data)
        if "train" not in list_files(dataset_folder(data)):
            table.refuse(data, how_to_prepare(dataset_folder(data), read_info(dataset_folder(data))))
    to_do = table.to_do
    if given.streams > 1 and any(run.config.run.log_with == "wandb" for run in to_do):
        raise UserError("--streams: wandb records one run per process; use --jobs, or --log-with tensorboard")
    logs = table.folder / "logs"
    if given.launcher == "local":
        launcher = Processes(given.jobs, logs, given.streams)
    else:
        executor = create_executor(given.launcher, logs / "jobs", given.slurm_settings)
        launcher = Jobs(given.launcher, executor, given.jobs, logs, given.streams)
    try:
        Trainings(launcher, table.total - len(to_do), table.total).train(to_do, table.record)
        if given.on:
            table.test_choices()
    finally:
        text = table.write()
    if given.speed or given.table in TABLES_OF_COST:  # now that no run uses the device
        table.costs = dict(enumerate(costs_of(rows)))
        text = table.write()
    if not given.on and (given.figure is not None or varied or any(row.drawing for row in rows)):
        draw(table.title, table.lines, table.folder / "figure.png", given.figure)
    print(f"\n{text}\n{' '.join(str(file) for file in table.files)}")
    return table.is_done


def settings_fact(flags: list[str], varied: dict[str, list]) -> str:
    """Return a fact for the table's header: flags and varied settings, and whether these differ from the paper's."""
    from reslt.runs.resume import NOT_COMPARED, RESUMABLE_CHANGES

    parts = [f"flags: `{shlex.join(flags)}`"] * bool(flags) + [f"varied: {', '.join(varied)}"] * bool(varied)
    is_changed = {*flag_names(flags), *varied} - RESUMABLE_CHANGES - NOT_COMPARED
    return ("; ".join(parts) or "settings: the recipes'") + (": not the paper's settings" if is_changed else "")


if __name__ == "__main__":
    main()

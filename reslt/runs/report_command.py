"""`python -m reslt.report RUN|FILE ...`: compare finished runs and evaluations of them, or, with `--html FILE`, show one.

Slow imports are inside functions, so that Ctrl-C during them ends the command in order."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from reslt.core.command import Parser, entry_point
from reslt.core.cpu import uncollected_imports
from reslt.core.errors import UserError
from reslt.core.text import counted, one_line


def create_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m reslt.report", description="Compare finished runs, or show one of them as a page.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN|FILE", help="run folder, or a result-....json of evaluate.py"
    )
    parser.add_argument(
        "--side-by-side", action="store_true", help="print the complete tables of the runs side by side"
    )
    page = parser.add_argument_group("one run, after evaluate.py --save-predictions")
    page.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page about the run")
    page.add_argument("--png", type=Path, metavar="FOLDER", help="write the page's figures as PNG files")
    page.add_argument(
        "--log-with",
        choices=("tensorboard", "wandb"),
        help="add the figures and numbers to the run's record of this tracker",
    )
    page.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="image root for the page, if it is not the recorded one"
    )
    return parser


@entry_point
def main(arguments: list[str] | None = None) -> None:
    given = create_parser().parse_args(arguments)
    if given.html or given.png or given.log_with:
        if len(given.runs) > 1 or given.side_by_side:
            raise UserError("--html, --png and --log-with show a single run; give one folder per command")
        print(show(given.runs[0], given.html, given.png, given.log_with, given.data_dir))
    elif given.data_dir:
        raise UserError("--data-dir names the images of a page; give --html FILE, or drop it")
    else:
        from reslt.runs.report import comparison, side_by_side

        print((side_by_side if given.side_by_side else comparison)(given.runs))


def show(run: Path, page: Path | None, folder: Path | None, log_with: str | None, data_dir: Path | None) -> str:
    """Write the report of one run as a page, write its figures into a folder, and log them with a tracker, each if given.
    Return a line for each. Raises UserError if the run has no saved predictions, if the page would replace another file, or
    if the tracker is not installed."""
    if log_with and importlib.util.find_spec(log_with) is None:
        raise UserError(f"--log-with: {log_with} is not installed; pip install {log_with}")

    with uncollected_imports():
        import numpy  # noqa: F401  before torch, which would swallow what a signal raises during numpy's import

        from reslt.evaluation.analysis import pictures, scalars
    from reslt.runs.folder import require_outside_checkpoints
    from reslt.runs.report_page import log_pictures, require_page, write_page, write_pictures
    from reslt.runs.reported_run import ReportedRun
    from reslt.training.accelerator import create_accelerator

    for flag, place in (("--html", page), ("--png", folder)):
        if place:
            require_outside_checkpoints(place, flag)
    if page:
        require_page(page)
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"--png {folder}: it is not a folder; give another name")
    reported = ReportedRun.read(run, data_dir)
    figures, lines = pictures(reported.analysis), []
    if page:
        write_page(reported, figures, page)
        lines.append(f"{page}: the report of {one_line(reported.name)}")
    if folder:
        lines.append(write_pictures(figures, folder))
    if log_with:
        accelerator = create_accelerator("no", log_with, run)
        accelerator.init_trackers(reported.experiment)
        log_pictures(accelerator.trackers, figures, scalars(reported.analysis), reported.step)
        accelerator.end_training()
        lines.append(f"{counted(len(figures), 'figure')} logged with {log_with}")
    return "\n".join(lines)

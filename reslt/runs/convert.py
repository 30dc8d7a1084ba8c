"""`python -m reslt.checkpoint convert`: convert a checkpoint of the authors' code to this suite's format."""

from __future__ import annotations

from pathlib import Path

import torch

from reslt.config.command_line import add_foreign_flags
from reslt.config.imports import load_imports
from reslt.core.command import Parser, entry_point
from reslt.core.errors import UserError
from reslt.models.create import create_model
from reslt.runs.checkpoint import write
from reslt.runs.folder import require_safe_outputs
from reslt.runs.released import ReleasedCheckpoint


def convert(released: ReleasedCheckpoint, model: torch.nn.Module, output: Path) -> Path:
    """Write a checkpoint of the authors' code, loaded into `model`, in this suite's format. Return its folder."""
    epochs = released.epochs_done or 0
    state = {"epochs_done": epochs, "steps_done": 0} | released.classes.stored()
    state |= {"config": released.config().stored(), "optimizer": {"state": {}, "param_groups": []}, "scaler": None}
    write(output, {"model": model.state_dict()}, state)
    return output


def create_parser() -> Parser:
    """Return the parser of the command line, with one of its own for each command."""
    parser = Parser(prog="python -m reslt.checkpoint", description="Checkpoints of other code.")
    commands = parser.add_subparsers(dest="command", required=True)
    converted = commands.add_parser("convert", help="write a checkpoint of the authors' code in this suite's format")
    converted.add_argument("file", type=Path, metavar="FILE.pth.tar", help="the file that the authors' code wrote")
    converted.add_argument("--output", type=Path, required=True, help="folder to write")
    add_foreign_flags(converted, data="name or folder of the dataset that the file was trained on")
    return parser


@entry_point
def main(arguments: list[str] | None = None) -> None:
    given = create_parser().parse_args(arguments)
    load_imports(given.imports or ())
    if given.output.exists():
        raise UserError(f"--output {given.output}: it already exists; choose another")
    require_safe_outputs(given.output)
    released = ReleasedCheckpoint.read(given.file, given)
    config = released.config()
    model = create_model(config.model, config.method, released.classes.number, config.augment.img_size)
    released.load_evaluated(model)
    print(f"evaluate it with: python evaluate.py --ckpt {convert(released, model, given.output)}")


if __name__ == "__main__":
    main()

"""The commands of a page's bash blocks, parsed without running them: programs, flags, values, recipes and targets exist.

Bash itself splits the blocks: with no program in reach, it hands every command, its quotes, variables and loops resolved, to a
function that records it."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

from tests.docs.pages import PROJECT, Block

RECORDER = """
command_not_found_handle() { printf '%s\\0' "$#" "$@" >>"$RECORD"; }
cd() { :; }; source() { :; }; .() { :; }; exit() { :; }; wait() { :; }; kill() { :; }; exec() { "$@"; }
"""
ASSIGNMENT = re.compile(r"""(?:export )?[A-Za-z_]\w*=(?:[^\s"'`$()]*|"[^"`]*"|'[^']*')(?:\s+#.*)?""")
OTHER_PROGRAMS = frozenset(
    # Those of the system, and of packages whose flags are their own.
    """awk cat cp curl df du find git grep head hf hostname less ln ls mkdir mv nohup nvidia-smi open pip rm rsync ruff sbatch
    scancel scontrol scp sed seq sleep sort squeue ssh tail tar tee tensorboard tmux touch unzip uv wandb watch wc wget""".split()  # noqa: SIM905
)
PARSERS = {  # of each command: the module and its function that returns the parser
    "train.py": ("reslt.config.command_line", "train_parser"),
    "evaluate.py": ("reslt.config.command_line", "evaluation_parser"),
    "reslt.prepare": ("reslt.prepare.__main__", "create_parser"),
    "reslt.reproduce": ("reslt.reproduce.__main__", "create_parser"),
    "reslt.report": ("reslt.runs.report_command", "create_parser"),
    "reslt.predict": ("reslt.deploy.predict", "create_parser"),
    "reslt.export": ("reslt.deploy.export", "parser"),
    "reslt.checkpoint": ("reslt.runs.convert", "create_parser"),
}
# Settings whose value may be a file or folder that exists only for a reader, and one that exists here; None: left out.
PATHS = {"init_from": ".", "pretrained_file": "train.py", "data_dir": ".", "resume": None, "teachers": "."}


def commands_of(blocks: list[Block], block: Block, folder: Path) -> list[list[str]]:
    """Return the commands of a bash block, each as its list of words. Variables of earlier blocks of the page are set.

    Raises ValueError with bash's message if it is not valid."""
    record = folder / "commands"
    record.write_bytes(b"")
    text = block.text.replace(".venv/bin/", "")
    script = "\n".join([RECORDER, assignments(blocks[: blocks.index(block)]), text])
    bash = shutil.which("bash")
    variables = {"RECORD": str(record), "PATH": str(folder / "nothing"), "HOME": str(folder), "USER": "user"}
    done = subprocess.run(
        [bash, "-c", script],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    if done.stderr:
        raise ValueError(done.stderr.strip())
    words, found = record.read_bytes().decode().split("\0")[:-1], []
    while words:  # the number of a command's words, then these
        end = 1 + int(words[0])
        found.append(words[1:end])
        del words[:end]
    return found


def assignments(blocks: list[Block]) -> str:
    """Return the lines of bash blocks that do nothing but set a variable."""
    lines = [line for block in blocks if block.language == "bash" for line in block.text.splitlines()]
    return "\n".join(line for line in lines if ASSIGNMENT.fullmatch(line))


def check(command: list[str]) -> None:
    """Raise an error if a command cannot be meant as it is: UserError of its own parser, or ValueError."""
    words = list(command)
    if words and words[-1] == "...":
        words.pop()
    while words and words[0] in ("srun", "time", "nohup", "env", "bash", "torchrun", "accelerate"):
        words = _after_launcher(words)
    if not words:
        return
    program, *arguments = words
    if program in ("python", "python3"):
        if arguments[:1] == ["-m"]:
            _check_module(arguments[1], arguments[2:])
        elif arguments and arguments[0].endswith(".py"):
            _check_script(arguments[0], arguments[1:])
    elif program.endswith(".py"):
        _check_script(program, arguments)
    elif program == "make":
        _check_targets(arguments)
    elif program not in OTHER_PROGRAMS:
        raise ValueError(f"{program}: an unknown program")


def _after_launcher(words: list[str]) -> list[str]:
    """Return the command that a launcher starts, after its own flags, which must exist."""
    launcher, *rest = words
    if launcher == "accelerate":
        if rest[:1] != ["launch"]:
            if rest[:1] in (["config"], ["env"], ["test"]):
                return []
            raise ValueError(f"accelerate {' '.join(rest[:1])}: an unknown command")
        rest = rest[1:]
    if launcher == "bash" and rest[:1] == ["-c"]:
        return shlex.split(rest[1])
    programs = ("python", "torchrun", "accelerate", "bash")
    starts = [i for i, word in enumerate(rest) if word.endswith(".py") or word in programs]
    starts += [i + 1 for i, word in enumerate(rest) if word == "-m"] if launcher in ("accelerate", "torchrun") else []
    if not starts:
        raise ValueError(f"{' '.join(words)}: it starts no program")
    sources = {"accelerate": ("accelerate", "commands/launch.py"), "torchrun": ("torch", "distributed/run.py")}
    if launcher in sources:
        known = _flags_in(*sources[launcher])
        for word in rest[: min(starts)]:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag.replace("-", "_") not in known:
                raise ValueError(f"{launcher}: unknown flag {flag}")
    start = min(starts)
    return ["python", "-m", *rest[start:]] if rest[start - 1 : start] == ["-m"] else rest[start:]


@functools.cache
def _flags_in(package: str, file: str) -> frozenset[str]:
    """Return the flags that a package's file states, with _ for each -. It is not imported."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    flags = re.findall(r'"(--[\w-]+)"', (folder / file).read_text(encoding="utf-8"))
    return frozenset(flag.replace("-", "_") for flag in flags)


def _check_script(script: str, arguments: list[str]) -> None:
    name = Path(script).name
    if name == "train.py":
        check_training(arguments)
    elif name == "evaluate.py":
        _parse(name, arguments)
    elif not Path(script).is_file():
        raise ValueError(f"{script}: there is no such file; write it in a block whose first line is # {script}")


def check_training(arguments: list[str]) -> None:
    """Raise UserError unless `train.py` would begin with these arguments, given the files that they name."""
    from reslt.config.command_line import train_parser, unknown_arguments
    from reslt.config.places import dataset_folder
    from reslt.config.resolve import resolve
    from reslt.core.errors import UserError

    if "--help" in arguments:
        return
    given, unknown = train_parser().parse_known_args(arguments)
    if unknown:
        raise ValueError("; ".join(unknown_arguments(unknown)))
    settings = vars(given)
    replaced = {name: value for name, value in PATHS.items() if settings.get(name, "none") != "none"}
    if "recipe" in settings and settings["recipe"].isupper():  # as in --recipe NAME
        replaced["recipe"] = None
    if "data" in settings:
        try:
            dataset_folder(settings["data"])
        except UserError:
            replaced["data"] = "digits_lt"
    kept, dropping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            dropping = argument.split("=")[0][2:].replace("-", "_") in {*replaced, "overwrite"}
        if not dropping:
            kept.append(argument)
    for name, value in replaced.items():
        if value is not None:
            kept += [f"--{name.replace('_', '-')}", *[value] * (3 if name == "teachers" else 1)]
    with mock.patch.dict("os.environ", {"WORLD_SIZE": "1"}):
        resolve([*kept, "--overwrite"])


def _check_module(module: str, arguments: list[str]) -> None:
    if module == "reslt.reproduce":
        check_reproduction(arguments)
    elif module in PARSERS:
        _parse(module, arguments)
    elif module.split(".")[0] == "tests":
        _check_flags_of_source(module, arguments)
    elif module.split(".")[0] == "reslt" or importlib.util.find_spec(module.split(".")[0]) is None:
        raise ValueError(f"python -m {module}: there is no such command")


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of one of the project's commands. That of reslt.checkpoint imports torch."""
    module, function = PARSERS[command]
    return getattr(importlib.import_module(module), function)()


def _parse(command: str, arguments: list[str]) -> None:
    with suppress(SystemExit), redirect_stdout(io.StringIO()):  # of --help
        parser_of(command).parse_args(arguments)


def check_reproduction(arguments: list[str]) -> None:
    """Raise UserError unless `python -m reslt.reproduce` would start runs with these arguments."""
    from reslt.reproduce.__main__ import parse_arguments
    from reslt.reproduce.rows import of_recipes, of_the_paper, parse_varied

    if arguments == ["--coverage"] or "--help" in arguments:
        return
    given, flags = parse_arguments([*arguments, "--plan"])
    varied = parse_varied(given.vary)
    if given.is_of_all:
        return
    if given.recipes:
        selection = of_recipes(given.recipes)
    else:
        kind = "table" if given.table is not None else "figure"
        selection = of_the_paper(kind, given.table or given.figure, given.own, _stated_rows())
    if given.rows:
        selection = selection.only(given.rows)
    if varied or given.recipes:
        rows, _ = _finder(given, selection)(given.seeds[:1], given.output, flags, varied)
        faults = [run.fault for row in rows for run in row.runs if run.config is None]
        if faults:
            raise ValueError(faults[0])
    else:
        check_training(["--data", "digits_lt", *flags])


def _finder(given: argparse.Namespace, selection) -> Callable:
    """Return the function that makes the rows of a selection; that of --on val imports torch."""
    if not given.on:
        return selection.rows
    from reslt.reproduce.search import search_rows

    return functools.partial(search_rows, selection)


@functools.cache
def _stated_rows() -> list[tuple[str, dict]]:
    """Return every recipe with its rows of the paper; all recipes are read once."""
    from reslt.reproduce.paper import stated_rows

    return stated_rows()


def _check_flags_of_source(module: str, arguments: list[str]) -> None:
    """Raise ValueError unless a module of the tests exists and states the flags, or its neighbors do."""
    path = PROJECT / module.replace(".", "/")
    files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
    if not files:
        raise ValueError(f"python -m {module}: there is no such module")
    known = "".join(file.read_text(encoding="utf-8") for file in files[0].parent.glob("*.py"))
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in (argument.split("=")[0] for argument in own if argument.startswith("--")):
        if f'"{flag}"' not in known:
            raise ValueError(f"python -m {module}: unknown flag {flag}")


def _check_targets(arguments: list[str]) -> None:
    targets = re.search(r"^\.PHONY:(.*)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    for argument in arguments:
        if "=" not in argument and not argument.startswith("-") and argument not in targets:
            raise ValueError(f"make {argument}: the Makefile has no such target")

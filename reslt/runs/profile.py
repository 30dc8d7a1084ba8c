"""The report of `--profile`, even if the run ends early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator

from reslt.config.schema import RunSettings
from reslt.core.errors import UserError
from reslt.core.files import write_atomically
from reslt.core.log import logger, warn_once
from reslt.core.phases import Phases


def require_place_of_trace(file: str | None) -> None:
    """Raise UserError if the trace of `--profile-trace` could not be written at the end of the run."""
    if file is None:
        return
    folder = next(parent for parent in Path(file).absolute().parents if parent.exists())
    if Path(file).is_dir():
        raise UserError(f"--profile-trace {file}: it is a folder; give a file")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            f"--profile-trace {file}: {folder} is not a folder that can be written to; give a file elsewhere"
        )


@contextmanager
def profile_reported(phases: Phases, run: RunSettings, accelerator: Accelerator) -> Iterator[None]:
    """Report the phases of a run when the block ends, for whatever reason: the main process prints them with `--profile`,
    and writes the trace of `--profile-trace`."""
    is_requested = run.profile or run.profile_trace is not None
    try:
        with _compilation_counted(phases) if is_requested and run.torchcompile else nullcontext():
            yield
    finally:
        phases.begin("end")
        if accelerator.is_main_process and run.profile:
            logger.info(phases.table())
        if accelerator.is_main_process and run.profile_trace is not None:
            try:
                write_atomically(Path(run.profile_trace), phases.trace())
            except OSError as fault:
                warn_once("trace", f"--profile-trace {run.profile_trace}: it cannot be written: {fault.strerror}")


@contextmanager
def _compilation_counted(phases: Phases) -> Iterator[None]:
    """Count the time of torch.compile within the block as a phase of its own, through a private interface of torch."""
    from torch._dynamo.callback import callback_handler

    before = []
    hooks = {
        "start": lambda *_: before.append(phases.begin("compile")),
        "end": lambda *_: phases.begin(before.pop()),
    }
    for name, hook in hooks.items():
        getattr(callback_handler, f"register_{name}_callback")(hook)
    try:
        yield
    finally:
        for name, hook in hooks.items():
            getattr(callback_handler, f"remove_{name}_callback")(hook)

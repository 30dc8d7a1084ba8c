"""Accelerate's view of the machine, with its pitfalls told plainly."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from reslt.errors import UserError
from reslt.loader import available_cores


def create_accelerator(
    mixed_precision: str, log_with: str | None = None, project_dir: Path | None = None
) -> Accelerator:
    """Device and precision. Raises UserError for more than one process, or a precision that the device has not."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(
            f"{processes} processes were launched, but only one is supported so far; use "
            "`accelerate launch --num_processes 1 train.py ...`"
        )
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, log_with=log_with, project_dir=project_dir)
    except (ValueError, RuntimeError) as fault:
        raise UserError(f"--mixed-precision {mixed_precision}: {fault}; use no or bf16") from None
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16: it needs a GPU, and this run is on the CPU; use no or bf16")
    if mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _cpu_multiplies_bf16():
        say("--mixed-precision bf16: this CPU has no bf16 arithmetic, so it will be slower than --mixed-precision no")
    cores = available_cores()
    if (
        accelerator.device.type == "cpu"
        and torch.get_num_threads() == 1 < cores
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        say(
            f"`accelerate launch` leaves torch 1 of {cores} CPU cores; "
            f"`accelerate launch --num_cpu_threads_per_process {cores} ...` uses them all"
        )
    return accelerator


def say(warning: str) -> None:
    """One clear line on standard error."""
    print(f"warning: {warning}", file=sys.stderr)


def _cpu_multiplies_bf16() -> bool:
    """torch asks the processor in private functions; where they are gone, no warning is better than a wrong one."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, lambda: True)() for question in questions)

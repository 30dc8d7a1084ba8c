"""Accelerate's setup of device and processes, with clear errors for its pitfalls."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from reslt.core.cpu import available_cores
from reslt.core.errors import UserError
from reslt.core.log import logger, warn_once

T = TypeVar("T")


# Newer versions of torch call it forward_sync_buffers, which Accelerate cannot pass on yet.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def create_accelerator(
    mixed_precision: str, log_with: str | None = None, project_dir: Path | None = None
) -> Accelerator:
    """Set up device, precision and processes. Raises UserError for a precision that the device does not support, and if
    Accelerate would not run the processes that were launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise UserError(
            "`accelerate launch --cpu` starts one process whatever --num_processes says; for several on CPUs: "
            "`accelerate launch --multi_gpu --num_processes 2 train.py ...`, without --cpu (for one: --num_processes 1, "
            "and MASTER_ADDR unset)"
        )
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    if on_this_machine > 1 and torch.cuda.is_available() and on_this_machine > torch.cuda.device_count():
        raise UserError(
            f"{on_this_machine} processes were launched on a machine with {torch.cuda.device_count()} GPUs; "
            f"use `accelerate launch --num_processes {torch.cuda.device_count()} train.py ...` (one process per GPU)"
        )
    right = f"launch with `accelerate launch --multi_gpu --num_processes {launched} train.py ...`"
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # each process has its own, those of BatchNorm
    try:
        accelerator = Accelerator(
            cpu=launched > 1 and not torch.cuda.is_available(),  # else Accelerate would not join the processes
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=project_dir,
            kwargs_handlers=[buffers],
        )
    except (ValueError, RuntimeError) as fault:
        if launched > 1:
            raise UserError(f"WORLD_SIZE is {launched}, but the processes cannot connect: {fault}; {right}") from None
        raise UserError(f"--mixed-precision {mixed_precision}: {fault}; use no or bf16") from None
    if accelerator.num_processes != launched:
        raise UserError(f"WORLD_SIZE is {launched}, but Accelerate runs {accelerator.num_processes}; {right}")
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed-precision fp16: it requires a GPU, and this run is on the CPU; use no or bf16")
    if mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _cpu_multiplies_bf16():
        logger.warning(
            "--mixed-precision bf16: this CPU has no bf16 arithmetic, so it will be slower than --mixed-precision no"
        )
    cores = available_cores()
    if (
        accelerator.device.type == "cpu"
        and torch.get_num_threads() == 1 < cores // on_this_machine
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        logger.warning(
            f"`accelerate launch` limits torch to 1 of {cores} CPU cores per process; "
            f"`accelerate launch --num_cpu_threads_per_process {cores // on_this_machine} ...` uses all of them"
        )
    return accelerator


def broadcast_from_main(find: Callable[[], T], accelerator: Accelerator) -> T:
    """Run `find` on the main process and broadcast its result, UserError or OSError; no process is left waiting."""
    found, raised = None, None
    if accelerator.is_main_process:
        try:
            found = find()
        except (UserError, OSError) as fault:
            raised = fault
    found, text = broadcast_object_list([found, None if raised is None else str(raised)])
    if text is not None:
        raise raised or UserError(text)
    return found


def end_training(accelerator: Accelerator) -> None:
    """End the trackers and the process group. A tracker that fails (no network, a full disk) costs its record only."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as fault:
            warn_once(
                "trackers", f"--log-with {tracker.name}: {type(fault).__name__}: {fault}; its record may lack values"
            )
    accelerator.trackers = []
    accelerator.end_training()


def _cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 arithmetic, by private functions of torch; True if torch no longer has them."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, lambda: True)() for question in questions)

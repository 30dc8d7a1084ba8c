"""Precision, memory layout and compilation of a model in inference."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch

from reslt.config.schema import RunSettings
from reslt.loading.pipeline import SMALL

WORTH_COMPILING = 200_000  # images: compiling takes up to a minute, and saves a fraction of a millisecond of each


@dataclass(frozen=True)
class Execution:
    """The precision, memory layout and compilation of a model in inference. `remark`: why it is not compiled, although it
    was in training."""

    mixed_precision: str = "no"
    channels_last: bool = False
    torchcompile: bool = False
    remark: str = ""

    @classmethod
    def of(
        cls,
        typed: Namespace,
        trained: RunSettings | None,
        device: str,
        images: int | None = None,
        img_size: int | None = None,
    ) -> Execution:
        """Choose the typed settings (None: unset), and, on a GPU, those of training for the others (`trained` None: unknown).
        On a CPU, the settings of training do not count, since most CPUs have no bf16 arithmetic.

        `device`: its type; any type other than cpu is a GPU. Unless compilation is typed, a model is compiled only for at
        least WORTH_COMPILING `images` (None: not yet known). Images of up to SMALL pixels a side (`img_size`; None: not yet
        known) are never worth it."""
        settings = RunSettings(mixed_precision="no") if trained is None or device == "cpu" else trained
        precision = settings.mixed_precision or "no" if typed.mixed_precision is None else typed.mixed_precision
        layout = settings.channels_last if typed.channels_last is None else typed.channels_last
        compiles, remark = bool(typed.torchcompile), ""
        if typed.torchcompile is not False and (compiles or settings.torchcompile):
            if img_size is not None and img_size <= SMALL:
                compiles, remark = False, f"images of up to {SMALL} pixels"
            elif not compiles and images is not None:
                compiles = images >= WORTH_COMPILING
                remark = "" if compiles else f"fewer than {WORTH_COMPILING:,} images"
        return cls(precision, layout, compiles, remark)

    def described(self, device: torch.device) -> str:
        """Return a line for the console."""
        parts = [f"on {device}", f"precision {self.mixed_precision}"] + ["channels-last"] * self.channels_last
        not_compiled = f"not compiled ({self.remark})" if self.remark else ""
        return ", ".join(filter(None, [*parts, "compiled" if self.torchcompile else not_compiled]))


def is_on_cpu() -> bool:
    """Return whether Accelerate will choose the CPU."""
    from accelerate.utils import parse_flag_from_env

    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return not has_gpu or parse_flag_from_env("ACCELERATE_USE_CPU")

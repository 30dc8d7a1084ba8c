"""torch.compile, applied in place, with a cache that outlives a reboot."""

from __future__ import annotations

import os

import torch

from reslt.core.cache import cache_folder, make_writable
from reslt.core.log import warn_once
from reslt.core.turns import own_turn

MOST_COMPILED = 10_000  # compiled variants of a function, in a process that trains several runs


def compile_model(model: torch.nn.Module) -> None:
    """Apply torch.compile in place, for fixed shapes: otherwise, a second batch size would be compiled for any size.

    Compiled code is cached in the suite's cache folder, since torch's default folder is lost at a reboot. If the cache
    folder cannot be written to, torch's default applies.

    Only the model is compiled. Learning rate, epochs and seeds are outside the model, so runs that differ only in these
    find the code of the first run in the cache."""
    if (cache := cache_folder()) is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        compiled = cache / "compiled"
        try:
            make_writable(compiled)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
        except OSError as fault:
            warn_once("compiled", f"{compiled}: compiled code cannot be kept there ({fault.strerror})")
    if own_turn() is not None:  # torch counts variants over all models of the process, with limits per thread
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = MOST_COMPILED
    model.compile(dynamic=False)

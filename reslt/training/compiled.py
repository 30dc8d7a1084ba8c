"""torch.compile: in place, with its cache beside the other ones."""

from __future__ import annotations

import os

import torch

from reslt.core.cache import cache_folder, make_writable
from reslt.core.log import warn_once
from reslt.core.turns import own_turn

MOST_COMPILED = 10_000  # forms of a function in a process that trains several runs


def compile_model(model: torch.nn.Module) -> None:
    """Apply torch.compile, in place, for fixed shapes: a second size of batches would otherwise be compiled for any size.
    Its cache is next to the other ones: torch's own place, which is used if that cannot be written, is lost at a reboot.

    Only the model is compiled. Learning rate, epochs and seeds are outside of it, so that runs that differ in these find
    the code of the first one in the cache."""
    if (cache := cache_folder()) is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        compiled = cache / "compiled"
        try:
            make_writable(compiled)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
        except OSError as fault:
            warn_once("compiled", f"{compiled}: compiled code cannot be kept there ({fault.strerror})")
    if own_turn() is not None:  # torch counts what it compiles for all models of the process, by limits of each thread
        torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = MOST_COMPILED
    model.compile(dynamic=False)

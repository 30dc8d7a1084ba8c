"""Seeds for everything random, derived from integers such as (seed, epoch, sample)."""

from __future__ import annotations


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit integer that looks random, a function of these integers (the finalizer of SplitMix64, applied to each
    in turn)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1

"""The values of `evaluate.py --sweep`: tau=0:2:0.1, or tau=0,0.5,1. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from reslt.config.values import coerce
from reslt.core.errors import UserError
from reslt.core.text import shown

KEYS = ("tau", "prior_tau", "tde")
MOST = 1000
DIGITS = 10  # values are rounded to as many decimals, so that 7 steps of 0.1 are 0.7


@dataclass(frozen=True)
class Sweep:
    """A setting of prediction, and its values in ascending order."""

    key: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Read KEY=FROM:TO:STEP, which includes TO, or KEY=a,b,c. Raises UserError."""
        key, equals, spec = text.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in KEYS:
            raise _fault(text, f"give one of {', '.join(KEYS)}, as in tau=0:2:0.1 or tau=0,0.5,1")
        try:
            if ":" in spec:
                if len(numbers := [float(number) for number in spec.split(":")]) != 3:
                    raise ValueError("it is not FROM:TO:STEP")
                first, last, step = numbers
                count = round((last - first) / step, DIGITS) if step > 0 else -1.0
                if not 0 <= count < MOST:
                    raise _fault(text, f"it is not FROM:TO:STEP with FROM <= TO, STEP > 0 and at most {MOST} values")
                numbers = [first + number * step for number in range(int(count) + 1)]
            else:
                numbers = [coerce(key, number) for number in spec.split(",")]
            values = sorted({coerce(key, round(number, DIGITS)) for number in numbers})
        except (ValueError, OverflowError) as fault:
            raise _fault(text, f"{fault}; give numbers, as in tau=0:2:0.1 or tau=0,0.5,1") from None
        if len(values) > MOST:
            raise _fault(text, f"at most {MOST} values can be compared")
        return cls(key, tuple(values))


def _fault(text: str, reason: str) -> UserError:
    return UserError(f"--sweep {shown(text)}: {reason}")

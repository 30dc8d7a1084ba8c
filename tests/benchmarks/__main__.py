"""The benchmarks that end in ratios on a CPU, one after the other, each in a process of its own: `make bench`.

At the end, one table shows their ratios and bars."""

import math
import sys

from tests.benchmarks.rows import command_line, run_each, write_rows

NAMES = ("step", "loader", "chain", "predict", "auto_augment", "inference", "end_to_end", "cifar_run", "streams")


def main(arguments: list[str] | None = None) -> None:
    """Exit with the code of the first benchmark that failed. A bar that is not met is no failure."""
    given = command_line(__doc__).parse_args(arguments)
    rows, failed = run_each([([name], math.inf) for name in NAMES])
    write_rows(rows, given.json)
    sys.exit(failed)


if __name__ == "__main__":
    main()

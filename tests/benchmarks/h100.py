"""All measurements with a bar on an H100, in one command of at most nine minutes.

    python -m tests.benchmarks.h100 [PART ...]

The parts, in order: runs (CIFAR-100-LT 0.01 for 200 epochs with cold and warm caches, without and with AutoAugment, and the
phases of each), auto_augment, end_to_end (500 x 375 JPEGs, decoded by the host and by the GPU), step, streams (nine runs in
one process), inference. Each runs other benchmarks, each of them in a process of its own; at the end, one table shows their
ratios and bars. The part runs requires CIFAR-100-LT 0.01 and its images (see docs/datasets.md). A benchmark that takes
too long is ended, so that the others are not lost; those for which no time is left are named."""

from tests.benchmarks.rows import command_line, run_each, write_rows

SECONDS = 540  # of all parts together
# part: commands, each with the seconds that it may take
PARTS = {
    "runs": [
        (["cifar_run", "--runs", "0", "--twice", "--profile"], 230),
        (["cifar_run", "--runs", "1", "--warm", "--profile"], 110),  # the network is already compiled
    ],
    "auto_augment": [(["auto_augment", "--check"], 30), (["auto_augment", "--rounds", "3"], 40)],
    "end_to_end": [
        (["end_to_end", "--steps", "150", "--rounds", "1", "--decode", "device"], 180),
        (["end_to_end", "--steps", "150", "--rounds", "1"], 90),
    ],
    "step": [(["step", "--compile", "--rounds", "2"], 90)],
    "streams": [(["streams", "--rounds", "3"], 60)],
    "inference": [(["inference", "--rounds", "3"], 60)],
}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; none: all")
    given = parser.parse_args(arguments)
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"{unknown[0]} is not a part; give some of {', '.join(PARTS)}")
    rows, _ = run_each([command for part in given.parts or PARTS for command in PARTS[part]], SECONDS)
    write_rows(rows, given.json)


if __name__ == "__main__":
    main()

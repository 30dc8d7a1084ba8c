"""`python -m tests.docs`: a table of the documentation's pages, and of how their code blocks are tested.

python -m tests.docs cli     write docs/cli.md from the parsers of the commands"""

from __future__ import annotations

import argparse

from tests.docs.pages import counts_of, pages, totals


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("table", "cli"), default="table")
    if parser.parse_args(arguments).what == "cli":
        from tests.docs.reference import write

        print(write())
        return
    found = pages()
    print(f"{'page':<28} {'lines':>6} {'fast':>5} {'slow':>5} {'not run':>8}  reasons")
    for page in found:
        counts = counts_of([page])
        reasons = ", ".join(f"{key[1]} ({n})" for key, n in counts.items() if isinstance(key, tuple))
        numbers = f"{counts['fast']:>5} {counts['slow']:>5} {counts['not run']:>8}"
        print(f"{page.name:<28} {len(page.text.splitlines()):>6} {numbers}  {reasons}".rstrip())
    print(totals(found))


if __name__ == "__main__":
    main()

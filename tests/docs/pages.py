"""The pages of the documentation: their code blocks, with the comments that say how each is tested, and their links.

An HTML comment line directly above a block's fence, invisible to readers, classifies it:

    (none)                                  it runs in the fast tests
    <!-- slow -->                           it runs in the slow tests
    <!-- with: train.py --epochs 1 -->      these flags are appended to each command of train.py
    <!-- not run: reason -->                it does not run; its commands are parsed
    <!-- output -->                         a text block: what the block before it prints; ... matches anything
    <!-- output: other numbers -->          the same, except that each number may differ

A python, yaml or text block whose first line is a comment with a file name is written to that file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PLACES = (
    "README.md",
    "CHANGELOG.md",
    "docs/*.md",
    "data_lists/README.md",
    "reslt/recipes/README.md",
    "tests/parity/README.md",
)
LANGUAGES = ("bash", "python", "yaml", "text")
WIDEST = 127  # characters of a line outside tables and blocks of text
FENCE = re.compile(r"^(?P<indent>\s*)```(?P<language>\S*)\s*$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<text>.*?)\s*-->\s*$")
FILE_NAME = re.compile(r"^# (?P<name>[\w.-]+(?:/[\w.-]+)*\.\w+)$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\((?P<target>[^()\s]+)\)|<img[^>]*\ssrc=\"(?P<image>[^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(?P<text>.+?)\s*#*$")


@dataclass(frozen=True)
class Block:
    """A fenced block. `notes`: the texts of the comments directly above it."""

    page: str
    line: int  # of the fence, from 1
    language: str
    text: str
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """PAGE:LINE."""
        return f"{self.page}:{self.line}"

    @property
    def is_slow(self) -> bool:
        """Whether it runs only in the slow tests."""
        return "slow" in self.notes

    @property
    def why_not_run(self) -> str | None:
        """The reason of `not run: reason`; None if it runs."""
        reasons = [note.partition(":")[2].strip() for note in self.notes if note.partition(":")[0] == "not run"]
        return reasons[0] if reasons else None

    @property
    def is_output(self) -> bool:
        """Whether it shows what the block before it prints."""
        return any(note.partition(":")[0] == "output" for note in self.notes)

    @property
    def more_flags(self) -> list[tuple[str, str]]:
        """The programs whose commands get more flags, with these."""
        stated = [note.removeprefix("with:").split(maxsplit=1) for note in self.notes if note.startswith("with:")]
        return [(program, flags[0] if flags else "") for program, *flags in stated]

    @property
    def file(self) -> str | None:
        """The name of the file that it is written to, if it is one."""
        if self.language == "bash":
            return None
        found = FILE_NAME.match(self.text.partition("\n")[0])
        return found and found["name"]

    @property
    def kind(self) -> str:
        """How it is tested: fast, slow, or not run."""
        return "not run" if self.why_not_run is not None else "slow" if self.is_slow else "fast"

    def shows(self, printed: str) -> bool:
        """Return whether what was printed is what this block shows. White space may differ."""
        text = re.sub(r"\.\.\.(?=\s|$)", "\0", self.text)
        words = [re.escape(word) for word in text.split()]
        if "output: other numbers" in self.notes:
            words = [re.sub(r"(?:\\-)?\d+(?:(?:\\\.|,)\d+)*", r"-?\\d+(?:[.,]\\d+)*", word) for word in words]
        pattern = r"\s+".join(words).replace(r"\s+" + re.escape("\0"), r".*").replace(re.escape("\0") + r"\s+", r".*")
        pattern = pattern.replace(re.escape("\0"), ".*")
        return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@dataclass
class Page:
    """A Markdown file of the project, by its path from the project's root."""

    name: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)  # the other lines, with their numbers
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lines, notes, opened = self.text.splitlines(), [], None
        for number, line in enumerate(lines, 1):
            fence = FENCE.match(line)
            if opened is None and fence:
                opened = (number, fence, [])
            elif opened is not None and line.strip() == "```":
                start, fence, content = opened
                indent = len(fence["indent"])
                text = "".join(f"{row[indent:] if not row[:indent].strip() else row}\n" for row in content)
                self.blocks.append(Block(self.name, start, fence["language"], text, tuple(notes)))
                notes, opened = [], None
            elif opened is not None:
                opened[2].append(line)
            else:
                comment = COMMENT.match(line)
                notes = [*notes, comment["text"]] if comment else []
                self.prose.append((number, line))
        if opened is not None:
            self.faults.append(f"{self.name}:{opened[0]}: this block has no end")

    @property
    def folder(self) -> Path:
        """The folder that its links start from."""
        return (PROJECT / self.name).parent

    @cached_property
    def links(self) -> list[tuple[int, str]]:
        """The targets of its links and images, with their lines; those of other hosts are left out."""
        found = []
        for number, line in self.prose:
            for link in LINK.finditer(re.sub(r"`[^`]*`", "``", line)):
                target = link["target"] or link["image"]
                if not re.match(r"[a-z]+:", target):
                    found.append((number, target))
        return found

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors of its headings, as GitHub names them."""
        seen, anchors = Counter(), set()
        for _, line in self.prose:
            if heading := HEADING.match(line):
                slug = slug_of(heading["text"])
                anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
                seen[slug] += 1
        return anchors


def slug_of(heading: str) -> str:
    """Return GitHub's anchor of a heading: its text in lower case, without punctuation, spaces as hyphens."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def pages() -> list[Page]:
    """Return all pages of the project."""
    files = [file for place in PLACES for file in sorted(PROJECT.glob(place))]
    return [Page(file.relative_to(PROJECT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def faults_of(page: Page, others: dict[str, Page]) -> list[str]:
    """Return what breaks the rules of a page: unclassified blocks, links that lead nowhere, lines that are too long."""
    faults = [*page.faults, *_faults_of_blocks(page.blocks), *_faults_of_links(page, others)]
    for number, line in page.prose:
        if len(line) > WIDEST and not line.lstrip().startswith(("|", "<", "[![")):
            faults.append(f"{page.name}:{number}: {len(line)} characters; wrap it at {WIDEST}")
    return faults


def _faults_of_blocks(blocks: list[Block]) -> Iterator[str]:
    for i, block in enumerate(blocks):
        if block.language not in LANGUAGES:
            yield f"{block.place}: language {block.language!r}; give one of {', '.join(LANGUAGES)}"
        for note in block.notes:
            name, _, rest = note.partition(":")
            is_known = note in ("slow", "output", "output: other numbers") or (
                name in ("with", "not run") and rest.strip()
            )
            if not is_known:
                yield f"{block.place}: <!-- {note} --> is not one of slow, with:, not run:, output"
        if block.why_not_run is not None and len(block.notes) > 1:
            yield f"{block.place}: it is not run, so no other comment applies"
        if block.language == "text" and not (block.is_output or block.file or block.why_not_run):
            yield f"{block.place}: text needs <!-- output -->, <!-- not run: reason --> or a file name in its first line"
        if block.is_output and (block.language != "text" or not i or blocks[i - 1].language not in ("bash", "python")):
            yield f"{block.place}: <!-- output --> belongs above a text block right after a bash or python block"
        elif block.is_output and (blocks[i - 1].why_not_run or blocks[i - 1].file):
            yield f"{block.place}: the block before it is not run; mark this one <!-- not run: reason --> too"
        if block.language == "bash" and (long := [row for row in block.text.splitlines() if len(row) > WIDEST]):
            yield f"{block.place}: a line of {len(long[0])} characters; wrap it at {WIDEST}"


def _faults_of_links(page: Page, others: dict[str, Page]) -> Iterator[str]:
    for number, target in page.links:
        path, _, anchor = target.partition("#")
        file = (page.folder / path).resolve() if path else PROJECT / page.name
        if not file.exists():
            yield f"{page.name}:{number}: {target}: there is no such file"
            continue
        name = file.relative_to(PROJECT).as_posix() if file.is_relative_to(PROJECT) else None
        if anchor and name in others and anchor not in others[name].anchors:
            yield f"{page.name}:{number}: {target}: {name} has no such heading"


def counts_of(pages: list[Page]) -> Counter:
    """Return the numbers of blocks that run in the fast and in the slow tests and of those that do not run, by reason.
    Outputs count with the blocks that print them."""
    counts = Counter()
    for block in (block for page in pages for block in page.blocks if not block.is_output):
        counts[block.kind] += 1
        if block.why_not_run is not None:
            counts["not run", block.why_not_run] += 1
    return counts


def totals(pages: list[Page]) -> str:
    """Return one line: the numbers of pages, lines and blocks."""
    counts = counts_of(pages)
    lines = sum(len(page.text.splitlines()) for page in pages)
    return (
        f"documentation: {len(pages)} pages, {lines:,} lines; blocks: {counts['fast']} run, {counts['slow']} run in the slow "
        f"tests, {counts['not run']} not run"
    )

"""The documentation: its code runs and prints what it shows, its commands exist, its links lead somewhere."""

from pathlib import Path

import pytest

from tests.docs.commands import check, commands_of
from tests.docs.pages import PROJECT, Page, faults_of, pages
from tests.docs.reference import FILE, reference
from tests.docs.workplace import Workplace, add_run, at, copy_workplace, make_workplace

PAGES = {page.name: page for page in pages()}
OF_EACH_PAGE = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory) -> Path:
    """The folder that every page begins with."""
    return make_workplace(tmp_path_factory.mktemp("docs") / "birds")


@pytest.fixture(scope="module")
def after_training(first_steps, tmp_path_factory) -> Path:
    """The folder that every page with slow blocks begins with."""
    folder = copy_workplace(first_steps, tmp_path_factory.mktemp("docs") / "trained")
    add_run(folder)
    return folder


def report(faults: list[str]) -> None:
    """Fail with these faults alone, if there are any."""
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def without_links(folder: Path) -> Path:
    for entry in folder.iterdir():
        if entry.is_symlink():
            entry.unlink()
    return folder


@OF_EACH_PAGE
def test_a_page_keeps_the_rules_and_its_links_lead_somewhere(page):
    report(faults_of(page, PAGES))


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry")  # timm keeps the models of a page's modules
@OF_EACH_PAGE
def test_the_commands_of_a_page_exist_and_its_fast_blocks_run(page, first_steps, tmp_path):
    place = Workplace(copy_workplace(first_steps, tmp_path / "page"))
    faults = place.run(page, is_slow=False)
    for block in page.blocks:
        if block.language == "bash" and block.kind != "fast":
            with at(place.folder):
                for command in commands_of(page.blocks, block, place.folder):
                    try:
                        check(command)
                    except Exception as fault:
                        faults.append(f"{block.place}: {' '.join(command)}: {fault}")
    report(faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES.values() if any(b.kind == "slow" for b in p.blocks)], ids=lambda p: p.name
)
def test_the_slow_blocks_of_a_page_run(page, after_training, tmp_path):
    faults = Workplace(copy_workplace(without_links(after_training), tmp_path / "page")).run(page, is_slow=True)
    report(faults)


WRONG = """# A page
[nowhere](#elsewhere)

```
without a language
```
<!-- quick -->
```bash
echo one
```
<!-- output -->
```text
two
```
<!-- not run: a GPU -->
```bash
python train.py --method ce --alpha 0.5 && make tea
accelerate launch --num_proceses 2 train.py --recipe no/such
```
"""


def test_a_page_with_faults_is_refused(first_steps, tmp_path):
    page = Page("docs/wrong.md", WRONG)
    rules = faults_of(page, {page.name: page})
    assert [fault.partition(": ")[0] for fault in rules] == [f"docs/wrong.md:{line}" for line in (4, 8, 2)]
    place = Workplace(copy_workplace(first_steps, tmp_path / "page"))
    (differs,) = place.run(page, is_slow=False)
    assert differs.startswith("docs/wrong.md:12: ValueError: the block before it prints\none")
    with at(place.folder):
        commands = commands_of(page.blocks, page.blocks[-1], place.folder)
        for command, fault in zip(commands, ("--alpha: method ce does not", "make tea", "--num_proceses"), strict=True):
            with pytest.raises(Exception, match=fault):
                check(command)


def test_every_page_of_the_docs_is_linked_from_the_readme():
    linked = {(PROJECT / target.partition("#")[0]).resolve() for _, target in PAGES["README.md"].links}
    assert {name for name in PAGES if name.startswith("docs/") and PROJECT / name not in linked} == set()


def test_the_reference_of_flags_is_that_of_the_parsers():
    assert FILE.read_text(encoding="utf-8") == reference(), "write it again with: python -m tests.docs cli"

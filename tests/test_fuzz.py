"""Any content of a list, an info.yaml, a recipe or the command line is either accepted or reported as the user's error.

The examples are the same in every run; RESLT_FUZZ=10 makes ten times as many. The slow test draws new ones and prints
their seed.
"""

import ntpath
import os
import posixpath
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from reslt.config.resolve import resolve
from reslt.config.schema import FIELDS, HINTS, flag_of
from reslt.core.errors import UserError
from reslt.data import lists
from reslt.data.datasets import INFO_KEYS, load_dataset
from reslt.data.lists import read_list, write_list

FACTOR = int(os.environ.get("RESLT_FUZZ", "1"))
LONGEST_MESSAGE = 1000
ANY_BLOCK = 1 << 22


def examples(count: int, **changed) -> settings:
    fixed = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    return settings(**(fixed | {"max_examples": count * FACTOR} | changed))


# List files: lines that are mostly good, made of good and bad parts, and bytes in random order.
anything = st.text(st.characters(codec="utf-8"), max_size=4)
good_part = st.sampled_from(
    ["a", "n0144", "sea gull", "ä", "..b", "b..", "...", ".", "~", "~root", "'", '"', "%s", "x:y", "C", "-1", "3", "猫"]
    + ["\x0b", "\x0c", "\x85", "\u2028", "\u00a0", "\ufeff", "\U000e0001", "\x1c", "e\u0301", " ", "  b"]
)
good_path = st.lists(good_part, min_size=1, max_size=3).map("/".join)
bad_path = st.sampled_from(
    ["..", "../a", "a/..", "a/../b", "..\\a", "a\\..", "a\\../b", "a/ /..", "/", "/a", "//a/b", "\\a", "\\\\a\\b"]
    + ["C:\\a", "c:/a", "C:a", "z:", "C:..", "C:..\\a", "", "\t", "a\0b", "a\rb", "\ufeffa", "./..", "../..", "x y/.."]
)
good_label = st.one_of(
    st.integers(0, 12).map(str),
    st.integers(0, 10**9 - 1).map(str),
    st.sampled_from(["0", "00", "007", "000000000", "999999999"]),
)
bad_label = st.sampled_from(
    ["", "-1", "+1", "1.0", "1.", "1e3", "0x1", "1_000", "1,", "½", "²", "١٢", "\uff11", "nan", "None", "/", ":", "1:"]
    + ["1000000000", "0000000001", "9" * 30, "1" * 5000, "\u00a01", "1\x0b", "1\x85", "\ufeff1", "\x001", "1\0"]
)
gap = st.sampled_from([" ", "\t", "  ", " \t"])
good_end = st.sampled_from(["\n", "\n", "\r\n", " \n", "\t \r\n", "\n\n", "\n \t\n", "\n\r\n"])
bad_end = st.sampled_from(["", "\r", "\r\r\n", " \r \n", "\x0b\n", "\x0c\n", "\u2028", "\x85\n", "\n\ufeff", " 0\n"])

good_line = st.builds("{}{}{}{}".format, good_path, gap, good_label, good_end)
lead_line = st.builds(" {}".format, good_line)
bad_line = st.one_of(
    st.builds("{}{}{}{}".format, bad_path, gap, good_label, good_end),
    st.builds("{}{}{}{}".format, good_path, gap, bad_label, good_end),
    st.builds("{}{}{}{}".format, good_path, gap, good_label, bad_end),
    st.builds("{}{}{}{}".format, anything, gap, anything, good_end),
    st.sampled_from(
        ["a\n", "7\n", " 7\n", "\t7 \n", " /a 1\n", " ../a 1\n", "a" * 6000 + "\n", "\U000e0001" * 500 + " x\n"]
    ),
)
blank_line = st.sampled_from(["\n", " \n", "\t\r\n", "  \t\n"])
good_file = st.lists(st.one_of(good_line, good_line, good_line, lead_line, blank_line), min_size=1, max_size=12)
mixed_file = st.lists(st.one_of(good_line, good_line, good_line, blank_line, bad_line), max_size=8)
odd_bytes = st.sampled_from(
    [
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b" ",
        b"\t",
        b"..",
        b"/",
        b"\\",
        b":",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xe4",
    ]
    + [
        b"\xef\xbb\xbf",
        b"\xf4\x90\x80\x80",
        b"\x80",
        b"0",
        b"-",
        b"\x0b",
        b"\x0c",
        b"\x85",
        b"\xe2\x80\xa8",
        b"\xfe\xff",
    ]
)


@st.composite
def changed_file(draw) -> bytes:
    """Good lines, with a few bytes inserted, removed or replaced."""
    content = "".join(draw(good_file)).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.one_of(odd_bytes, st.just(b""))) + content[at + draw(st.integers(0, 2)) :]
    return content


def joined(lines: list[str]) -> bytes:
    return "".join(lines).encode()


list_file = st.one_of(
    good_file.map(joined),
    good_file.map(lambda lines: joined(lines).rstrip()),
    mixed_file.map(joined),
    changed_file(),
    st.lists(st.one_of(odd_bytes, st.sampled_from([b"a", b"1", b"b 2\n"])), max_size=12).map(b"".join),
    st.binary(max_size=60),
)
blocks = st.one_of(st.integers(1, 40), st.just(ANY_BLOCK))


def read_one_line(number: int, line: bytes) -> tuple[tuple[str, str] | None, set[str]]:
    """Return (path, label) of a line, None if it is blank, and the messages that fit it, none if it is good."""
    faults = set()
    if number == 1 and line[:3] == b"\xef\xbb\xbf":
        faults.add("a byte order mark")
    if line[-1:] == b"\r":
        line = line[:-1]
    if b"\0" in line:
        faults.add("a NUL byte")
    if b"\r" in line:
        faults.add("a carriage return inside the line")
    try:
        text = line.decode("utf-8").replace("\t", " ")
    except UnicodeDecodeError:
        return None, faults | {"not UTF-8 text"}
    if faults or not text.strip(" "):
        return None, faults
    head, _, label = text.rstrip(" ").rpartition(" ")
    path = line.decode("utf-8")[: len(head.rstrip(" "))]
    if not path:
        return None, {"no path" if text[0] == " " else "no label"}
    if not 1 <= len(label) <= 9 or set(label) - set(string.digits):
        return None, {"is not a whole number from 0"}
    parts = path.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or (path[0] in string.ascii_letters and path[1:2] == ":"):
        return None, {"the path leaves the image root"}
    return (path, label), faults


def read_plainly(content: bytes) -> tuple[list[tuple[str, int, int]], dict[int, set[str]]]:
    """The documented format, line by line -> (path, label, line number) of the images, and each bad line's faults."""
    images, faults = [], {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        image, message = read_one_line(number, line)
        if message:
            faults[number] = message
        elif image:
            images.append((image[0], int(image[1]), number))
    return images, faults


def stays_inside(path: str) -> bool:
    """Return whether a path joined to a root stays below it, here and on Windows."""
    here = posixpath.normpath(posixpath.join("/root/images", path))
    there = ntpath.normpath(ntpath.join("R:\\root\\images", path))
    # `ntpath` takes any character before a colon for a drive; only letters are drives, and no file is named "1:a" there
    no_drive = path[1:2] == ":" and path[0] not in string.ascii_letters
    return (here + "/").startswith("/root/images/") and (no_drive or (there + "\\").startswith("R:\\root\\images\\"))


def result_or_message(function: Callable, *arguments) -> tuple[object, str | None]:
    """Return (the function's result, None), or (None, the message of the user's error that it raised)."""
    try:
        return function(*arguments), None
    except UserError as fault:
        return None, str(fault)


def check_list(file: Path, content: bytes, block: int, num_classes: int) -> str:
    """Read `content` and compare with the plain reading. Return 'accepted', 'refused' or 'label outside'."""
    expected, faults = read_plainly(content)
    file.write_bytes(content)
    lists.CHUNK_BYTES = block
    images, message = result_or_message(read_list, file)
    if message:
        assert faults or not expected, f"a good list was refused: {message}"
        assert len(message) < LONGEST_MESSAGE
        assert "path label" in message
        if not faults:
            assert message.startswith(f"{file}: the list contains no image")
            return "refused"
        line, reason = re.match(re.escape(str(file)) + r":(\d+): (.*)", message, re.DOTALL).groups()
        assert any(phrase in reason.split(": ")[0] for phrase in faults[int(line)]), message
        return "refused"
    assert not faults, f"accepted in spite of {faults}"
    assert [(images.path(i), int(images.labels[i]), images.line(i)) for i in range(len(images))] == expected
    assert all(stays_inside(path) for path, _, _ in expected)
    outside = [line for _, label, line in expected if label >= num_classes]
    _, message = result_or_message(images.check_labels, num_classes)
    assert bool(message) == bool(outside)
    assert not message or message.startswith(f"{file}:{outside[0]}: label ")
    return "label outside" if message else "accepted"


def check_lists(folder: Path, chosen: settings, monkeypatch, seeded=lambda test: test) -> Counter:
    """Return how many of many list files were accepted and refused."""
    monkeypatch.setattr(lists, "CHUNK_BYTES", ANY_BLOCK)
    file, seen = folder / "train.txt", Counter()

    @seeded
    @chosen
    @given(list_file, blocks, st.sampled_from([2, 13, 1000, 10**9]))
    @example(b"C:a.jpg 1\n", ANY_BLOCK, 2)  # a drive without a slash, for which Windows leaves the image root too
    @example(("\U000e0001" * 300 + " 1x\n").encode(), ANY_BLOCK, 2)  # one character that is printed as ten
    @example(("a " + "\U000e0001" * 300 + "\n").encode(), ANY_BLOCK, 2)
    @example(b"a 1\n\n \nb 2\n", 1, 13)
    @example(b"a 1\nb 1:\n", ANY_BLOCK, 13)  # the characters next to the digits
    @example(b"a 1\nb /\n", ANY_BLOCK, 13)
    def is_read_or_refused(content, block, num_classes):
        seen[check_list(file, content, block, num_classes)] += 1

    is_read_or_refused()
    return seen


def test_any_list_file_is_read_like_its_documented_format_or_refused_with_its_line(tmp_path, monkeypatch):
    seen = check_lists(tmp_path, examples(1000), monkeypatch)
    assert min(seen["accepted"], seen["label outside"]) > 0.05 * seen.total()
    assert seen["accepted"] + seen["label outside"] > 0.2 * seen.total()
    assert seen["refused"] > 0.2 * seen.total()


@pytest.mark.slow
def test_twenty_thousand_random_list_files_are_read_or_refused(tmp_path, monkeypatch, capsys):
    number = random.SystemRandom().randrange(2**32)
    with capsys.disabled():
        print(f"\nseed {number}")
        chosen = settings(examples(1), max_examples=20_000, derandomize=False)
        seen = check_lists(tmp_path, chosen, monkeypatch, seed(number))
        read = seen["accepted"] + seen["label outside"]
        print(
            f"{seen.total():,} list files: {read:,} read ({seen['label outside']:,} of them with a label outside the "
            f"classes), {seen['refused']:,} refused, 0 uncaught, 0 disagreements"
        )
    assert seen.total() >= 20_000
    assert read > 0.2 * seen.total()


# YAML files: tokens in any order, any value under any key, and files that are mostly valid.
yaml_token = st.sampled_from(
    ["[", "]", "{", "}", ": ", ", ", "- ", "? ", "\n", "\n  ", " ", "\t", "#", "|", ">", "'", '"', "%", "@", "`", "~"]
    + ["&a ", "*a", "<<: *a", "---\n", "...\n", "a", "0", "-1", "1.5", ".nan", ".inf", "1e400", "0x1f", "0b", "1:30:99"]
    + ["yes", "null", "2001-13-45", "2001-01-01", "2001-01-01 00:00:00+99:00", "\ufeff", "\0", "\x85", "\u2028", "ä"]
    + [
        f"!!{tag} "
        for tag in ("int", "float", "bool", "null", "str", "map", "seq", "set", "omap", "pairs", "timestamp")
    ]
    + ["!!binary ", "!a ", "!", "!!merge ", "!!python/object/apply:os.mkdir [made]", "!!python/name:os.system ", "''"]
)
scalar = st.one_of(
    st.sampled_from(
        [None, True, False, "", "none", "auto", "equal", "~no-such-user/a", "..", "/", "\0", "\ud800", "a" * 5000]
    ),
    st.sampled_from([0, -1, 2, 3, 10**30, -(10**30), 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf")]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=4),
    st.dates(),
    st.datetimes(),
)
key = st.one_of(st.text(max_size=4), st.none(), st.booleans(), st.integers(), st.floats(), st.dates())
value = st.recursive(
    scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(key, inner, max_size=3), st.sets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)
count = st.integers(0, 120)
shot_split = st.one_of(
    st.fixed_dictionaries({"by": st.just("count"), "many_above": count, "few_below": count}),
    st.fixed_dictionaries(
        {"by": st.sampled_from(["rank", "class_index"]), "many": count, "medium": count, "few": count}
    ),
    st.sampled_from([dict(by="rank", many=1, medium=1, few=1), dict(by="class_index", many=3, medium=0, few=0)]),
    st.just({"by": "count", "many_above": 2, "few_below": 2}),
    value,
)


def dumped(content: object) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()


def random_text(keys: list[str]) -> st.SearchStrategy[bytes]:
    """Random bytes, and YAML tokens in any order, alone or after one of the keys."""
    keyed = st.builds("{}: {}".format, st.sampled_from(keys), st.lists(yaml_token, max_size=6).map("".join))
    tokens = st.lists(st.one_of(yaml_token, keyed, keyed.map("\n{}\n".format)), max_size=8).map("".join)
    return st.one_of(st.binary(max_size=40), keyed.map(str.encode), tokens.map(str.encode))


@st.composite
def mostly_right(draw, right: dict[str, st.SearchStrategy], wrong: st.SearchStrategy, most: int = 4) -> bytes:
    """A mapping of valid values; one in three has any value under one more key."""
    names = draw(st.lists(st.sampled_from(sorted(right)), max_size=most, unique=True))
    content = {name: draw(right[name]) for name in names}
    if draw(st.integers(0, 2)) == 0:
        content[draw(st.one_of(st.sampled_from(sorted(right)), wrong))] = draw(value)
    return dumped(content)


info_values = dict(
    description=st.text(max_size=9),
    num_classes=st.sampled_from([3] * 9 + [None, 2, 4]),
    class_names=st.sampled_from(
        [["cat", "sea gull", "ä"], ["a", "b", "c"], [1, 2, 3], None, ["a", "a", "b"], ["a", "b"], [True, 1, 2]]
    ),
    class_names_from_path=st.sampled_from([0, 1, 2, 9, 99, 10**30, None, -1]),
    images=st.sampled_from(["photos", "..", "/", "~", "~no-such-user"]),
    image_root=st.sampled_from(["images", "/data", "~/images", "~no-such-user/images", "", None, 3, ["a"]]),
    layout=st.text(max_size=9),
    path_variants=value,
    prepare=st.text(max_size=9),
    training_images=count,
    published=value,
    shot_split=shot_split,
    paper_split=shot_split,
    defaults=value,
)
regex = st.lists(
    st.sampled_from(
        [
            "a",
            ".",
            "/",
            "(",
            ")",
            "(a)",
            "(?P<n>",
            "(?P=n)",
            "(?i)",
            "(?L)",
            "(?a)",
            "(?u)",
            "(?<=a)",
            "(?<=a*)",
            "(?(1)a|b)",
        ]
        + [
            "[",
            "]",
            "[^/]",
            "*",
            "+",
            "?",
            "{2}",
            "{99999999999}",
            "{,4294967295}",
            "|",
            "^",
            "$",
            "\\",
            "\\1",
            "\\Z",
            "\\x",
        ]
    ),
    max_size=5,
).map("".join)
replacement = st.lists(
    st.sampled_from(
        ["b", "/", "..", "\\", "\\0", "\\1", "\\2", "\\g<1>", "\\g<n>", "\\g<", "\\777", "\\q", "\\n", "\0"]
    ),
    max_size=3,
).map("".join)
rule = st.fixed_dictionaries({"match": regex, "replace": replacement})
local_values = dict(image_root=info_values["image_root"], path_rules=st.one_of(rule, st.lists(rule, max_size=3), value))
local_file = st.one_of(
    mostly_right(local_values, st.sampled_from(sorted(local_values))),
    mostly_right(local_values | {"path_rules": st.just([{"match": "^a/(.*)", "replace": r"A/\1"}])}, key),
    random_text(sorted(local_values)),
    st.builds(lambda one: dumped({"path_rules": one}), rule),
)


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """A folder of one good list of three classes, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESLT_DATA", raising=False)
    folder = tmp_path / "birds"
    folder.mkdir()
    (folder / "train.txt").write_text("a/x.png 0\nb/y.png 1\nb/y.png 1\nc z.png 2\n")
    return folder


def load(folder: Path):
    """Return the dataset of a folder, None if it is refused. Accepted rules must rewrite any path."""
    loaded, message = result_or_message(lambda: load_dataset(str(folder), images_needed=False))
    if message:
        return None
    assert loaded.num_classes == 3
    assert loaded.class_names is None or len(loaded.class_names) == 3
    assert all(sum(groups.values()).tolist() == [1, 1, 1] for groups in loaded.shot_groups.values())
    for path in ("a/x.png", "aaaa", "ab/a b"):
        loaded.image_root.file(path)
    return loaded


LEAST_SHARE = (
    0.1  # of contents that are accepted, and of those that are refused; how many there are varies with hypothesis
)


def shares(seen: Counter) -> list[float]:
    return [seen[kind] / seen.total() for kind in (True, False)]


def test_any_info_yaml_gives_a_dataset_or_the_users_error(dataset):
    seen = Counter()

    @examples(150)
    @given(st.one_of(mostly_right(info_values, key), random_text(sorted(INFO_KEYS)), mostly_right(info_values, key)))
    @example(b"num_classes: !!int ''")
    @example(b"num_classes: !!float ''")
    @example(b"num_classes: !!bool maybe")
    @example(b"num_classes: !!timestamp a")
    @example(b"published: !!map [a, b]")
    @example(b"num_classes: 0x" + b"f" * 5000)  # Python prints no whole number of more than 4,300 digits
    @example(b"shot_split: 0x" + b"f" * 5000)
    @example(b"published: " + b"[" * 3000)
    @example(b"class_names: &a [*a]")
    @example(b"shot_split: &a {by: *a}")
    @example(b"image_root: ~no-such-user/images")
    def is_accepted_or_refused(content):
        (dataset / "info.yaml").write_bytes(content)
        seen[load(dataset) is not None] += 1

    is_accepted_or_refused()
    assert min(shares(seen)) > LEAST_SHARE


def test_any_local_yaml_gives_a_dataset_or_the_users_error(dataset):
    seen = Counter()

    @examples(150)
    @given(local_file)
    @example(b"path_rules: {match: 'a{99999999999}', replace: ''}")
    @example(b"path_rules: {match: '(?L)a', replace: ''}")
    @example(b"path_rules: {match: '" + b"(" * 3000 + b"', replace: ''}")
    @example(b"image_root: ~no-such-user/images")
    def is_accepted_or_refused(content):
        (dataset / "local.yaml").write_bytes(content)
        seen[load(dataset) is not None] += 1

    is_accepted_or_refused()
    assert min(shares(seen)) > LEAST_SHARE


def test_aliases_that_make_a_billion_values_are_refused_at_once(dataset):
    levels = ["&a0 [lol]"] + [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    laughs = f"[{', '.join(levels)}]"
    for key in ("num_classes", "class_names", "shot_split", "published", "defaults"):
        (dataset / "info.yaml").write_text(f"{key}: {laughs}")
        with pytest.raises(UserError, match="alias"):
            load_dataset(str(dataset), images_needed=False)
    (dataset / "info.yaml").write_text("shot_split: &a {by: count, many_above: 2, few_below: 2}\npaper_split: *a")
    assert load(dataset).splits["paper"]["many_above"] == 2


@pytest.mark.parametrize("tag", ["object/apply", "object/new", "name", "module"])
def test_no_tag_of_a_yaml_file_calls_anything(dataset, tag):
    for content in (f"!!python/{tag}:os.mkdir [made]", f"num_classes: !!python/{tag}:os.mkdir [made]"):
        (dataset / "info.yaml").write_text(content)
        with pytest.raises(UserError, match="not readable as YAML"):
            load_dataset(str(dataset), images_needed=False)
        with pytest.raises(UserError, match="not readable as YAML"):
            resolve(["--recipe", str(dataset / "info.yaml")])
    assert not Path("made").exists()


# Configurations: any value under any field's name, in a recipe and on the command line.
def plausible(name: str) -> st.SearchStrategy:
    """Values that are valid for the field by itself; combined with others they may be invalid."""
    m, hint = FIELDS[name].metadata, str(HINTS[name])
    if name in ("mean", "std"):
        return st.sampled_from([None, (0.5, 0.4, 0.3)])
    if m["choices"]:
        return st.sampled_from(list(m["choices"]))
    if HINTS[name] is bool:
        return st.booleans()
    if "tuple" in hint or "dict" in hint or "str" in hint:
        return st.sampled_from([FIELDS[name].default] if "dict" not in hint else [{}, {"width": 2}])
    low = m["low"] if m["low"] is not None else (m["above"] or 0)
    high = m["high"] if m["high"] is not None else m["below"] or low + 50
    exclusive = {"exclude_min": m["above"] is not None, "exclude_max": m["below"] is not None}
    return st.integers(low, high) if "int" in hint else st.floats(low, high, **exclusive)


right = {name: plausible(name) for name in FIELDS if name not in ("data", "log_with", "resume", "pretrained_file")}
wrong_name = st.one_of(st.sampled_from([*FIELDS, "paper", "alhpa", "per_model", "recipe"]), key)
row = st.one_of(
    st.fixed_dictionaries({"table": value, "all": value}),
    st.dictionaries(st.sampled_from(["table", "figure", "row", "sweep", "all"]), value, max_size=3),
    value,
)
recipes = st.one_of(
    mostly_right(right, wrong_name, 6),
    mostly_right(right, wrong_name, 2),
    mostly_right(right | {"paper": st.one_of(row, st.lists(row, max_size=2))}, st.just("paper")),
    random_text([*FIELDS, "paper"]),
)


def is_resolved(arguments: list[str]) -> bool:
    """Return whether arguments give a configuration. If not, they are the user's error or name a file that cannot exist (the
    name is too long): that system error contains the name, and `entry_point` reports it like a user's error."""
    try:
        resolved, message = result_or_message(resolve, arguments)
    except OSError as fault:
        if not fault.filename:
            raise
        return False
    if message:
        return False
    assert resolved.config["experiment"]
    assert all(isinstance(row, dict) for row in resolved.paper)
    return True


def test_any_recipe_gives_a_configuration_or_the_users_error(dataset):
    recipe, seen = dataset / "mine.yaml", Counter()

    @examples(150)
    @given(recipes, st.integers(0, 3))
    @example(b"data: ~no-such-user/birds", 0)
    @example(b"data: " + b"a" * 5000, 0)
    @example(b"model: " + b"a" * 5000, 1)
    @example(b"epochs: 0x" + b"f" * 5000, 1)
    @example(b"model_kwargs: {width: 0x" + b"f" * 5000 + b"}", 1)
    def is_accepted_or_refused(content, with_data):
        recipe.write_bytes(content)
        seen[is_resolved(["--recipe", str(recipe)] + ["--data", str(dataset)] * (with_data > 0))] += 1

    is_accepted_or_refused()
    assert min(shares(seen)) > LEAST_SHARE


def test_any_defaults_of_a_dataset_give_a_configuration_or_the_users_error(dataset):
    seen = Counter()
    settings_of_models = st.dictionaries(
        st.sampled_from(["resnet50", "resnet18"]),
        st.one_of(st.fixed_dictionaries({"lr": right["lr"]}), value),
        max_size=2,
    )
    defaults = mostly_right(right | {"per_model": settings_of_models}, wrong_name)

    @examples(100)
    @given(defaults, st.sampled_from([[], ["--model", "resnet18"], ["--model", ""]]))
    def is_accepted_or_refused(content, flags):
        (dataset / "info.yaml").write_bytes(b"defaults:\n  " + content.replace(b"\n", b"\n  "))
        seen[is_resolved(["--data", str(dataset), *flags])] += 1

    is_accepted_or_refused()
    assert min(shares(seen)) > LEAST_SHARE


def as_arguments(name: str, content: object) -> list[str]:
    """Return the command-line arguments for a field's value."""
    flag = flag_of(name)
    if isinstance(content, bool):
        return [flag if content else flag.replace("--", "--no-", 1)]
    if isinstance(content, dict):
        return [flag, *(f"{k}={v!r}" for k, v in content.items())] if content else []
    many = content if isinstance(content, tuple) else ["none" if content is None else content]
    return [flag, *map(str, many)] if many else []


good_flag = st.sampled_from(sorted(right)).flatmap(lambda name: right[name].map(lambda v: as_arguments(name, v)))
flag_name = st.sampled_from([*map(flag_of, FIELDS)] + ["--recipe", "--no-nesterov"])
argument = st.one_of(
    st.sampled_from(
        ["", "-", "--", "-x", "-1", "1", "0.5", "nan", "none", "a=[", "a={[]}", "a={[]: 1}", "a=1_0", "\udcff", "%"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=6),
)
any_flag = st.one_of(
    st.lists(argument, max_size=2),
    st.builds(lambda flag, rest: [flag, *rest], flag_name, st.lists(argument, max_size=3)),
    st.builds("{}={}".format, flag_name, argument).map(lambda one: [one]),
)
command_line = st.one_of(
    st.lists(good_flag, max_size=4),
    st.builds(lambda some, one: [*some, one], st.lists(good_flag, max_size=2), any_flag),
).map(lambda flags: [argument for flag in flags for argument in flag])


def test_any_command_line_gives_a_configuration_or_the_users_error(dataset):
    seen = Counter()

    @examples(150)
    @given(command_line.filter(lambda arguments: not {"-h", "--help"} & set(arguments)))
    @example(["--data", "~no-such-user/birds"])
    @example(["--data", "a" * 5000])
    @example(["--recipe", "a" * 5000])
    @example(["--model", "a" * 5000])
    @example(["--model-kwargs", "a={[]: 1}"])
    @example(["--model-kwargs", "a=" + "-" * 100_000 + "1"])
    @example(["--model-kwargs", "a=" + "(" * 5000])
    def is_accepted_or_refused(arguments):
        seen[is_resolved(["--data", str(dataset), *arguments])] += 1

    is_accepted_or_refused()
    assert min(shares(seen)) > LEAST_SHARE


def test_help_alone_ends_the_process(capsys):
    with pytest.raises(SystemExit) as ended:
        resolve(["--alpha", "0.5", "--help"])
    assert ended.value.code == 0
    assert "--alpha" in capsys.readouterr().out


def test_the_home_of_an_unknown_user_is_not_a_folder(dataset):
    with pytest.raises(UserError, match=r"image root ~no-such-user/images \(from --data-dir\) is not a folder"):
        load_dataset(str(dataset), "~no-such-user/images")
    with pytest.raises(UserError, match="'~no-such-user/birds' is neither a folder nor a dataset"):
        resolve(["--data", "~no-such-user/birds"])


def test_two_dots_name_the_folder_above(dataset, monkeypatch):
    (dataset / "lower").mkdir()
    monkeypatch.chdir(dataset / "lower")
    assert load_dataset("..", images_needed=False).folder.resolve() == dataset


def test_a_list_that_was_read_is_the_same_after_writing_and_reading(tmp_path):
    file = tmp_path / "train.txt"

    @examples(100)
    @given(good_file)
    def comes_back(lines):
        file.write_bytes(joined(lines))
        images, message = result_or_message(read_list, file)
        if message:  # only blank lines, or a byte order mark at the start
            return
        expected = [(images.path(i), int(images.labels[i])) for i in range(len(images))]
        if not expected[0][0].startswith("\ufeff"):
            write_list(file, expected)
            again = read_list(file)
            assert [(again.path(i), int(again.labels[i])) for i in range(len(again))] == expected

    comes_back()

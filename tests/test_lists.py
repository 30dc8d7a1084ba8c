"""Image lists: the parser agrees with a simple one, and every malformed line is reported."""

import multiprocessing
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reslt.core.errors import UserError
from reslt.data import lists
from reslt.data.lists import read_list, write_list
from tests.benchmarks import lists as benchmark


def parsed(file: Path) -> list[tuple[str, int, int]]:
    images = read_list(file)
    return [(images.path(i), int(images.labels[i]), images.line(i)) for i in range(len(images))]


def test_paths_may_contain_spaces_and_blank_lines_are_skipped(tmp_path):
    file = tmp_path / "train.txt"
    file.write_bytes("train/sea gull/ä b.jpg 3\n\n \t\nx.png\t12 \r\ny..z.png   007".encode())
    assert parsed(file) == [("train/sea gull/ä b.jpg", 3, 1), ("x.png", 12, 4), ("y..z.png", 7, 5)]


path_text = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=8
)
paths = st.lists(path_text, min_size=1, max_size=3).map(" ".join)
valid_lines = st.tuples(
    paths, st.integers(0, 10**9 - 1), st.sampled_from([" ", "\t", "  "]), st.sampled_from(["", " ", "\r"])
)


@given(
    st.lists(st.one_of(valid_lines, st.sampled_from(["", "  ", "\r"])), max_size=20), st.integers(10, 60), st.booleans()
)
@settings(max_examples=300, deadline=None)
def test_the_parser_agrees_with_rsplit_line_by_line_for_any_block_size(tmp_path_factory, rows, block, last_newline):
    lines = [row if isinstance(row, str) else f"{row[0]}{row[2]}{row[1]}{row[3]}" for row in rows]
    expected = []
    for number, line in enumerate(lines, 1):
        if line.strip(" \t\r"):
            path, label = re.fullmatch(r"(.*?)[ \t]+(\d+)[ \t\r]*", line).groups()
            expected.append((path, int(label), number))
    outside = [p for p, _, _ in expected if ".." in re.split(r"[/\\]", p) or re.match(r"/|\\|[A-Za-z]:", p)]
    file = tmp_path_factory.mktemp("lists") / "train.txt"
    file.write_bytes(("\n".join(lines) + "\n" * last_newline).encode())
    before, lists.CHUNK_BYTES = lists.CHUNK_BYTES, block
    try:
        if expected and not outside and not expected[0][0].startswith("\ufeff"):
            assert parsed(file) == expected
        else:
            with pytest.raises(UserError):
                read_list(file)
    finally:
        lists.CHUNK_BYTES = before


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a.jpg 1\nb.jpg\n", ":2", "no label"),
        ("a.jpg 1\n\n7\n", ":3", "no label"),
        ("a.jpg 1\nb.jpg -1\n", ":2", "the label '-1' is not a whole number"),
        ("a.jpg 1.0\n", ":1", "the label '1.0' is not a whole number"),
        ("a.jpg 1\nb c\n", ":2", "the label 'c' is not a whole number"),
        ("a.jpg 99999999999\n", ":1", "is not a whole number"),
        ("a.jpg 1\n/etc/a.jpg 1\n", ":2", "leaves the image root"),
        ("a/../../b.jpg 1\n", ":1", "leaves the image root"),
        ("..\\b.jpg 1\n", ":1", "leaves the image root"),
        ("C:\\b.jpg 1\n", ":1", "leaves the image root"),
        ("a.jpg 1\rb.jpg 1\n", ":1", "carriage return"),
        ("a.jpg 1\nb\0.jpg 1\n", ":2", "NUL"),
        ("\ufeffa.jpg 1\n", ":1", "byte order mark"),
        ("\n \n", "", "contains no image"),
        ("", "", "contains no image"),
    ],
)
def test_a_malformed_line_is_reported_with_its_place_and_the_reason(tmp_path, text, place, reason):
    file = tmp_path / "train.txt"
    file.write_bytes(text.encode())
    with pytest.raises(UserError) as raised:
        read_list(file)
    assert str(raised.value).startswith(f"{file}{place}:")
    assert reason in str(raised.value)
    assert "path label" in str(raised.value)


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    file = tmp_path / "train.txt"
    file.write_bytes(b"a.jpg 1\nb\xff.jpg 1\n")
    with pytest.raises(UserError, match=r"train.txt:2: not UTF-8"):
        read_list(file)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_read_as_a_list_or_refused_with_a_users_error(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("lists") / "train.txt"
    file.write_bytes(content)
    try:
        images = read_list(file)
    except UserError:
        return
    assert all(images.path(i) and ".." not in images.path(i).split("/") for i in range(len(images)))


def test_a_label_out_of_range_names_file_line_and_range(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("a 0\n\nb 10\nc 9\nd 11\n")
    with pytest.raises(UserError, match=r"train.txt:3: label 10 is outside 0\.\.9 \(2 such lines\); .*num_classes"):
        read_list(file).check_labels(10)


def test_a_missing_list_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt"):
        read_list(tmp_path / "none.txt")


def test_a_written_list_is_read_back_unchanged(tmp_path):
    lines = [("a b/c.png", 0), ("ü.png", 41)]
    write_list(tmp_path / "train.txt", lines)
    assert [(p, y) for p, y, _ in parsed(tmp_path / "train.txt")] == lines
    assert [p.name for p in tmp_path.iterdir()] == ["train.txt"]


def test_a_list_is_kept_as_three_arrays_instead_of_python_strings(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("".join(f"dir/{i:06d}.jpg {i % 7}\n" for i in range(1000)))
    images = read_list(file)
    assert all(isinstance(part, np.ndarray) for part in (images.text, images.ends, images.labels))
    assert images.text.nbytes + images.ends.nbytes + images.labels.nbytes == 1000 * (14 + 8 + 4)


def test_a_list_can_be_read_from_a_pipe(tmp_path):
    pipe = tmp_path / "train.txt"
    os.mkfifo(pipe)
    lines = [(f"dir/{i:06d}.jpg", i % 7) for i in range(200_000)]
    content = "".join(f"{path} {label}\n" for path, label in lines)
    writer = threading.Thread(target=pipe.write_text, args=(content,), daemon=True)
    writer.start()
    images = read_list(pipe)
    writer.join()
    assert len(images) == len(lines)
    assert images.path(199_999) == "dir/199999.jpg"
    assert images.labels.tolist() == [label for _, label in lines]


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    """Run in this process, it prints meaningless numbers, but all of its code runs."""
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *arguments: function(*arguments))
    start_method = multiprocessing.get_start_method(allow_none=True)
    try:
        benchmark.main(["--lines", "20000", "--samples", "5120", "--workers", "1", "--start-methods", "fork"])
    finally:
        multiprocessing.set_start_method(start_method, force=True)
    out = capsys.readouterr().out
    assert re.match(r".* cores, .* GiB RAM; Python .*, numpy .*, torch ", out)
    assert "20,000 lines, 8,142 classes, 62.6 characters a path" in out
    for row in ("parse", "class counts, shot groups, branch sets", "an epoch's permutation, to the first batch"):
        assert re.search(rf"^{row} +\d+\.\d+ s", out, re.MULTILINE)
    sizes = Path("/proc/self/smaps_rollup")
    if sizes.exists() and "Pss_Anon" in sizes.read_text():
        assert re.search(r"^peak resident memory when parsed +\d+\.\d\d GiB", out, re.MULTILINE)
        assert re.search(r"^fork, 1 worker( +\d+ -> \d+){3}$", out, re.MULTILINE)

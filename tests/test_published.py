"""Published lists: fetched from a server on this machine or adopted from copies, and verified."""

import http.server
import re
import threading
import time
from pathlib import Path

import pytest
import yaml

from reslt.core.errors import UserError
from reslt.data.datasets import load_dataset
from reslt.data.groups import branch_sets
from reslt.prepare import published
from reslt.prepare.published import blob_id, prepare

CONTENT = {
    "Toy_train.txt": b"".join(b"train/c%d/%04d.jpg %d\n" % (i % 3, i, i % 3) for i in range(2000)),
    "Toy_val.txt": b"train/c0/x.jpg 0\n",
}


class Server(http.server.BaseHTTPRequestHandler):
    """A server of CONTENT that records the names requested. It breaks the connection after `sent_share` of a file."""

    content, requested, sent_share, delay_seconds = dict(CONTENT), [], 1.0, 0.0

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.requested.append(name)
        time.sleep(self.delay_seconds)
        if name not in self.content:
            return self.send_error(404)
        body = self.content[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: int(len(body) * self.sent_share)])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    class Fresh(Server):
        content, requested = dict(CONTENT), []

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    Fresh.address = f"http://127.0.0.1:{running.server_port}/lists"
    yield Fresh
    running.shutdown()
    running.server_close()


@pytest.fixture
def toy(project, server, monkeypatch) -> Path:
    """The folder of a dataset whose info.yaml names the server. Its test list is published as Toy_val.txt."""
    monkeypatch.setattr(published, "SOURCES", ("http://127.0.0.1:",))
    folder = project / "data_lists/toy_lt"
    folder.mkdir()
    lists = {}
    for split, name in (("train", "Toy_train.txt"), ("test", "Toy_val.txt")):
        lists[split] = {"file": name, "lines": CONTENT[name].count(b"\n"), "blob": blob_id(CONTENT[name])}
    info = {"prepare": "toy_lt", "published": {"source": server.address, "lists": lists}}
    (folder / "info.yaml").write_text(yaml.safe_dump(info))
    return folder


def test_a_blob_id_is_what_git_computes():
    """`printf 'hello\\n' | git hash-object --stdin` prints ce0136..."""
    assert blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_lists_are_fetched_verified_and_not_fetched_again(toy, server, run_prepare):
    outcome = run_prepare("toy_lt")
    assert outcome.code == 0, outcome.err
    assert (toy / "train.txt").read_bytes() == CONTENT["Toy_train.txt"]
    assert (toy / "test.txt").read_bytes() == CONTENT["Toy_val.txt"]
    assert "train 2,000, test 1 images; 3 classes with 667..666 training images" in outcome.out
    assert sorted(p.name for p in toy.iterdir()) == ["info.yaml", "test.txt", "train.txt"]
    before = len(server.requested)
    assert run_prepare("toy_lt").code == 0
    assert len(server.requested) == before


def test_a_broken_connection_is_reported_and_leaves_nothing(toy, server, run_prepare):
    server.sent_share = 0.5
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert "Toy_train.txt: cannot be fetched: IncompleteRead(" in outcome.err
    assert "Run this again, or put a copy of Toy_train.txt at" in outcome.err
    assert sorted(p.name for p in toy.iterdir()) == ["info.yaml"]
    server.sent_share = 1.0
    assert run_prepare("toy_lt").code == 0
    assert (toy / "train.txt").read_bytes() == CONTENT["Toy_train.txt"]


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout(toy, server):
    server.delay_seconds = 2
    with pytest.raises(UserError, match="cannot be fetched: timed out"):
        prepare("toy_lt", timeout_seconds=0.1)


def test_a_fetched_file_that_is_not_the_published_list_is_refused(toy, server, run_prepare):
    server.content["Toy_train.txt"] = CONTENT["Toy_train.txt"].replace(b"0007", b"0008")
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert "it has the right 2,000 lines, but its git blob id is" in outcome.err
    assert sorted(p.name for p in toy.iterdir()) == ["info.yaml"]


def test_without_a_network_the_path_for_a_copy_is_named(toy, run_prepare):
    info = yaml.safe_load((toy / "info.yaml").read_text())
    info["published"]["source"] = "http://127.0.0.1:9/nothing"
    (toy / "info.yaml").write_text(yaml.safe_dump(info))
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert f"put a copy of Toy_train.txt at {toy / 'train.txt'} by hand" in outcome.err
    (toy / "train.txt").write_bytes(CONTENT["Toy_train.txt"])
    (toy / "test.txt").write_bytes(CONTENT["Toy_val.txt"])
    assert run_prepare("toy_lt").code == 0


def test_an_address_that_is_gone_is_reported(toy, server, run_prepare):
    del server.content["Toy_train.txt"]
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert "Toy_train.txt: cannot be fetched: Not Found" in outcome.err


def test_a_list_copied_by_hand_that_differs_is_refused_and_kept(toy, run_prepare):
    (toy / "train.txt").write_bytes(CONTENT["Toy_train.txt"] + b"train/c0/more.jpg 0\n")
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert "train.txt: it has 2,001 lines, the published list has 2,000; remove it" in outcome.err
    assert (toy / "train.txt").exists()


def test_copies_are_recognized_by_their_content_not_by_their_names(toy, tmp_path, server, run_prepare):
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "a.txt").write_bytes(CONTENT["Toy_train.txt"])
    (copies / "train.txt").write_bytes(CONTENT["Toy_val.txt"])
    outcome = run_prepare("toy_lt", "--from-dir", copies)
    assert outcome.code == 0, outcome.err
    assert (toy / "train.txt").read_bytes() == CONTENT["Toy_train.txt"]
    assert (toy / "test.txt").read_bytes() == CONTENT["Toy_val.txt"]
    assert server.requested == []


def test_a_list_that_the_copies_lack_can_be_fetched_later(toy, tmp_path, server, run_prepare):
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "val.txt").write_bytes(CONTENT["Toy_val.txt"])
    outcome = run_prepare("toy_lt", "--from-dir", copies)
    assert outcome.code == 0
    assert "train.txt: MISSING" in outcome.out
    assert "fetch it with: python -m reslt.prepare toy_lt" in outcome.out
    assert run_prepare("toy_lt").code == 0
    assert server.requested == ["Toy_train.txt"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "Toy_train.txt",
            lambda c: c.replace(b"0007", b"0008"),
            "the right 2,000 lines, but its git blob id is .*: some line",
        ),
        ("train.txt", lambda c: c[:-1], "right 2,000 lines, but its git blob id"),
        ("train.txt", lambda c: c.replace(b"\n", b"\r\n"), "it has Windows line ends; convert"),
        ("train.txt", lambda c: c[: len(c) // 2], r"it has 1,0\d\d lines, the published list has 2,000"),
        ("other.txt", lambda c: b"x 0\n", r"contains none of the published lists \(Toy_train.txt, Toy_val.txt\)"),
    ],
)
def test_a_copy_that_differs_is_refused_and_nothing_is_written(toy, tmp_path, run_prepare, name, change, reason):
    copies = tmp_path / "copies"
    copies.mkdir()
    if name != "other.txt":
        (copies / "val.txt").write_bytes(CONTENT["Toy_val.txt"])
    (copies / name).write_bytes(change(CONTENT["Toy_train.txt"]))
    outcome = run_prepare("toy_lt", "--from-dir", copies)
    assert outcome.code == 2
    assert re.search(reason, outcome.err), outcome.err
    assert sorted(p.name for p in toy.iterdir()) == ["info.yaml"]


def test_a_malformed_description_is_reported(toy, run_prepare):
    (toy / "info.yaml").write_text("published: {source: http://x}")
    outcome = run_prepare("toy_lt")
    assert outcome.code == 2
    assert "published: must contain source: URL and lists:" in outcome.err


def test_training_on_an_unprepared_benchmark_names_the_command_that_prepares_it(project, run_script):
    for name in ("imagenet_lt", "places_lt", "inaturalist2018"):
        outcome = run_script("train", "--data", name, "--no-pretrained")
        assert outcome.code == 2
        assert (
            f"train.txt does not exist; make the lists of {name} with: python -m reslt.prepare {name}\n" in outcome.err
        )
    outcome = run_script("train", "--data", "cifar100_lt_0.02")
    assert "with: python -m reslt.prepare cifar100 --imb-factor 0.02\n" in outcome.err


REAL = [("places_lt", {"train", "val", "test"}), ("imagenet_lt", {"val", "test"}), ("inaturalist2018", {"test"})]


@pytest.mark.parametrize(("name", "splits"), REAL)
def test_the_real_lists_are_adopted_and_a_changed_byte_is_refused(
    project, real_images, tmp_path, run_prepare, name, splits
):
    folder, source = project / "data_lists" / name, real_images / "lists" / name
    outcome = run_prepare(name, "--from-dir", source)
    assert outcome.code == 0, outcome.err
    assert {p.stem for p in folder.glob("*.txt")} == splits
    if name == "places_lt":
        assert "many / medium / few: 131 / 163 / 71 classes" in outcome.out
    copies = tmp_path / "changed"
    copies.mkdir()
    for file in source.glob("*.txt"):
        (copies / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("*.txt"):
        file.unlink()
    victim = copies / "val.txt"
    content = bytearray(victim.read_bytes())
    content[20] ^= 1
    victim.write_bytes(content)
    outcome = run_prepare(name, "--from-dir", copies)
    assert outcome.code == 2
    assert "val.txt: not the published" in outcome.err
    assert "nothing was adopted" in outcome.err
    assert not list(folder.glob("*.txt"))


def test_the_real_list_of_places_lt_gives_the_published_groups(project, real_images, run_prepare):
    run_prepare("places_lt", "--from-dir", real_images / "lists/places_lt")
    dataset = load_dataset("places_lt", images_needed=False)
    groups = dataset.shot_groups["standard"]
    assert [int(groups[shot].sum()) for shot in ("many", "medium", "few")] == [131, 163, 71]
    assert branch_sets(dataset.images_per_class, 3).sum(1).tolist() == [365, 343, 152]
    assert dataset.class_names[:2] == ("airfield", "airplane_cabin")

# SPDX-License-Identifier: Apache-2.0
"""`runner.records`: whole files, claimed directories, digests, archives, secrets."""

import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import string
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from runner.errors import RecordError
from runner.parse import to_plain
from runner.records.digests import digest_file, digest_leaves, digest_plain
from runner.records.files import (
    canonical_json,
    claim_directory,
    write_atomically,
)
from runner.records.reading import open_run
from runner.records.secrets import SECRET, find_secrets
from runner.spec import parse_spec

SPAWN = multiprocessing.get_context("spawn")
WORKERS = 6

calm = settings(deadline=None)  # a busy machine is no failure

# --- claim_directory


def _claim(gate: Any, wanted: str, exact: bool, answers: Any) -> None:
    gate.wait()
    for _ in range(1 if exact else 10):
        try:
            answers.put(str(claim_directory(Path(wanted), exact=exact)))
        except RecordError as error:
            answers.put(error)
    gate.wait()  # a claim holds as long as its process lives


def race(wanted: Path, *, exact: bool) -> list[Any]:
    """What several processes get that claim one directory at the same moment."""
    gate, answers = SPAWN.Barrier(WORKERS), SPAWN.Queue()
    claims = [
        SPAWN.Process(target=_claim, args=(gate, str(wanted), exact, answers))
        for _ in range(WORKERS)
    ]
    for process in claims:
        process.start()
    got = [answers.get(timeout=60) for _ in range(WORKERS * (1 if exact else 10))]
    for process in claims:
        process.join(60)
        process.close()
    answers.close()
    answers.join_thread()
    return got


def test_no_directory_is_claimed_twice(tmp_path: Path) -> None:
    got = race(tmp_path / "deep" / "12-00-00", exact=False)
    assert len(set(got)) == WORKERS * 10
    names = {"12-00-00", *(f"12-00-00-{n}" for n in range(1, WORKERS * 10))}
    assert {Path(path).name for path in got} == names
    assert set(os.listdir(tmp_path / "deep")) == names


def test_a_named_directory_is_claimed_once(tmp_path: Path) -> None:
    got = race(tmp_path / "mine", exact=True)
    assert len([path for path in got if isinstance(path, str)]) == 1


def test_a_named_directory_with_a_run_is_refused(tmp_path: Path) -> None:
    mine = claim_directory(tmp_path / "mine", exact=True)
    (mine / "run.json").write_text("{}")
    with pytest.raises(RecordError, match=r"^hydra\.run\.dir: holds a run already"):
        claim_directory(mine, exact=True)
    assert os.listdir(mine) == ["run.json"]


def test_an_existing_directory_without_a_run_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert claim_directory(tmp_path, exact=True) == tmp_path
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_files_of_anothers_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RecordError, match=f"holds a {name} already"):
        claim_directory(tmp_path, exact=True)
    assert (tmp_path / name).read_text() == "mine"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("exact", [True, False])
def test_what_can_not_be_written_is_refused(tmp_path: Path, exact: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deeper")
    for place in ("file/below", "file/far/below", "x" * 300):
        with pytest.raises(RecordError, match=r"^hydra\.run\.dir: can't be written"):
            claim_directory(tmp_path / place, exact=exact)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


# --- write_atomically


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    texts = {json.dumps({"n": n, "fill": "x" * 50_000}) for n in range(8)}
    write_atomically(file, min(texts))
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(file.read_text())

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(6):
        for text in sorted(texts):
            write_atomically(file, text)
    done.set()
    for reader in readers:
        reader.join()
    assert len(seen) > 20
    assert set(seen) <= texts
    assert os.listdir(tmp_path) == ["run.json"]


def test_the_file_is_on_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the new file, rename, fsync of the directory: in this order."""
    told: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(number: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{number}"))
        told.append("directory" if name.is_dir() else f"fsync {name.stat().st_size}")
        fsync(number)

    def note_replace(self: Path, target: Path) -> Path:
        told.append("replace")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name a descriptor")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "run.json", "12345")
    assert told == ["fsync 5", "replace", "directory"]


def test_a_last_file_takes_the_room_that_was_kept_for_it(tmp_path: Path) -> None:
    """Its very blocks, with nothing freed between: others may fill the disk."""
    file, room = tmp_path / "run.json", tmp_path / ".reserve"
    write_atomically(file, "old")
    write_atomically(room, bytes(2**14))
    with room.open() as kept:  # also of a file without a name
        write_atomically(file, "new", room=room)
        assert (kept.read(), file.read_text()) == ("new", "new")
    assert list(tmp_path.iterdir()) == [file]
    write_atomically(file, "without", room=room)
    assert file.read_text() == "without"


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomically(tmp_path / "run.json", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "old"


@calm
@given(st.text())
def test_any_text_is_written(tmp_path_factory: Any, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.txt"
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    write_atomically(file, text)
    assert file.read_bytes().decode() == text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1} x', b'{"a": NaN}'])
def test_damaged_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    files = open_run(str(tmp_path))
    with pytest.raises(RecordError, match=r"run\.json is damaged"):
        files.read_json("run.json")
    with pytest.raises(RecordError, match=r"none\.json is missing"):
        files.read_json("none.json")


# --- digests

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@calm
@given(plain)
def test_plain_digests_survive_json(value: Any) -> None:
    again = json.loads(json.dumps(value))
    assert digest_plain(again) == digest_plain(value)
    text = canonical_json(value)
    assert digest_plain(value) == hashlib.sha256(text.encode()).hexdigest()


@calm
@given(st.dictionaries(st.text(), plain))
def test_plain_digests_know_no_order(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert digest_plain(turned) == digest_plain(value)


def test_plain_digests_tell_apart() -> None:
    values = [0, 0.0, -0.0, False, None, "", "0", [], {}, [0], [[0]], {"0": 0}, [0, 0]]
    assert len({digest_plain(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_plain(float("nan"))


KINDS = ("<f4", "<f8", "<i4", "<u4", "|u1", "|b1", "<f2")
leaves = st.sampled_from(KINDS).flatmap(
    lambda kind: arrays(kind, array_shapes(min_dims=0, min_side=0, max_side=3))
)


@calm
@given(st.dictionaries(st.text(string.ascii_letters + "/"), leaves, max_size=4))
def test_leaves_digest_names_kinds_shapes_and_bytes(named: dict[str, Any]) -> None:
    whole = digest_leaves(named)
    assert digest_leaves(dict(reversed(named.items()))) == whole
    assert digest_leaves({k: np.array(v, order="F") for k, v in named.items()}) == whole
    assert digest_leaves({**named, "new": np.zeros(0)}) != whole
    for name, leaf in named.items():
        rest = {k: v for k, v in named.items() if k != name}
        assert digest_leaves(rest) != whole
        assert digest_leaves({**rest, f"{name}_": leaf}) != whole
        assert digest_leaves({**rest, name: leaf[None]}) != whole
        if leaf.size:
            other = leaf.copy()
            view = other.reshape(-1).view(np.uint8)
            view[-1] ^= 1
            assert digest_leaves({**rest, name: other}) != whole


def test_leaves_digest_tells_zero_from_minus_zero() -> None:
    zeros = [np.zeros(2, "<f4"), -np.zeros(2, "<f4"), np.zeros(2, "<i4"), np.zeros(1)]
    assert len({digest_leaves({"a": zero}) for zero in zeros}) == len(zeros)
    one = digest_leaves({"a": np.zeros(2, "<f4"), "b": np.zeros(0, "<f4")})
    assert one != digest_leaves({"a": np.zeros(0, "<f4"), "b": np.zeros(2, "<f4")})


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    wanted = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert digest_file(tmp_path / "file") == wanted


def test_a_spec_with_numbers_for_keys_round_trips(compose_config: Any) -> None:
    """`boundaries_and_scales: {100: 0.1}` of optax has integers for keys."""
    schedule = "{_target_: optax.piecewise_constant_schedule, init_value: 0.1, "
    schedule += "boundaries_and_scales: {100: 0.5, 200: 0.1}}"
    config = compose_config(f"optimizer.learning_rate={schedule}")
    spec = parse_spec(config)
    again = parse_spec(yaml.safe_load(yaml.safe_dump(to_plain(spec), sort_keys=False)))
    assert again == spec


# --- archives

GOOD = {"run.json": b'{"a": 1}', "keys/ledger.json": b"[2]"}
Write = Callable[[Path, dict[str, bytes]], None]


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


each_kind = pytest.mark.parametrize("write", [write_zip, write_tar])


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory in which nothing is written."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    yield tmp_path / "archive"
    assert os.listdir(home) == []
    assert set(os.listdir(tmp_path)) <= {"home", "archive"}


@each_kind
@pytest.mark.parametrize("top", ["", "run/", "a/b/run/", "./"])
def test_a_run_is_found_in_its_archive(empty: Path, write: Write, top: str) -> None:
    write(empty, {"notes.txt": b"", **{top + k: v for k, v in GOOD.items()}})
    files = open_run(str(empty))
    assert files.read_json("run.json") == {"a": 1}
    assert files.read_json("keys/ledger.json") == [2]
    with pytest.raises(RecordError, match=r"config\.json is missing"):
        files.read_json("config.json")


@each_kind
def test_of_several_runs_the_outermost_is_read(empty: Path, write: Write) -> None:
    inner = {f"run/wandb/{k}": b"0" for k in GOOD}
    write(empty, {**inner, **{f"run/{k}": v for k, v in GOOD.items()}})
    assert open_run(str(empty)).read_json("run.json") == {"a": 1}


@each_kind
@pytest.mark.parametrize("name", ["../run.json", "/run.json", "a/../../run.json"])
def test_no_name_leads_out(empty: Path, write: Write, name: str) -> None:
    outside = empty.parent / "run.json"
    write(empty, {name: b'{"evil": 1}', "keys/ledger.json": b"[]"})
    with pytest.raises(RecordError, match="leads out"):
        open_run(str(empty))
    assert not outside.exists()


@each_kind
def test_only_names_of_the_archive_are_read(empty: Path, write: Write) -> None:
    write(empty, GOOD)
    files = open_run(str(empty))
    for wanted in ("/etc/hostname", "../../../../etc/hostname"):
        with pytest.raises(RecordError, match="is missing"):
            files.read_json(wanted)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_an_archive_are_not_followed(empty: Path, kind: bytes) -> None:
    with tarfile.open(empty, "w:gz") as archive:
        for name, link in (("run.json", "/etc/hostname"), ("x.json", "run.json")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            archive.addfile(info)
    with pytest.raises(RecordError, match=r"it has no run\.json"):
        open_run(str(empty))


def test_links_in_a_zip_are_not_followed(empty: Path) -> None:
    with zipfile.ZipFile(empty, "w") as archive:
        info = zipfile.ZipInfo("run.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/hostname")
    with pytest.raises(RecordError):
        open_run(str(empty)).read_json("run.json")


@each_kind
def test_members_that_nobody_asks_for_are_not_read(empty: Path, write: Write) -> None:
    size = 8 * 2**20
    write(empty, {f"x/{n}.json": bytes(size) for n in range(8)} | GOOD)
    tracemalloc.start()
    try:
        assert open_run(str(empty)).read_json("run.json") == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()


@each_kind
def test_a_huge_member_is_refused(
    empty: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.records.reading._MOST_PLAIN", 1000)
    write(empty, GOOD | {"keys/ledger.json": b" " * 1000 + b"1"})
    files = open_run(str(empty))
    with pytest.raises(RecordError, match=r"keys/ledger\.json"):
        files.read_json("keys/ledger.json")


@each_kind
@settings(calm, max_examples=60)
@given(data=st.data())
def test_damaged_archives_are_refused(
    tmp_path_factory: Any, write: Write, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{write.__name__}"
    noise = hashlib.shake_256(b"noise").digest(400).hex().encode()
    write(path, GOOD | {"keys/ledger.json": b'"' + noise + b'"'})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        files = open_run(str(path))
        values = {name: files.read_json(name) for name in GOOD}
    except RecordError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert values.keys() == GOOD.keys()


def test_an_encrypted_zip_is_refused(empty: Path) -> None:
    write_zip(empty, GOOD)
    content = bytearray(empty.read_bytes())
    for start, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(start)
        while at >= 0:
            content[at + flag] |= 1
            at = content.find(start, at + 1)
    empty.write_bytes(content)
    with pytest.raises(RecordError):
        open_run(str(empty)).read_json("run.json")


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PK\x03\x04", b"\x1f\x8b"])
def test_what_is_no_archive_is_refused_in_one_line(empty: Path, content: bytes) -> None:
    empty.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        open_run(str(empty))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 10_000, '"\\ud800"', "NaN"])
def test_hostile_json_is_refused_or_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    try:
        open_run(str(tmp_path)).read_json("run.json")
    except RecordError as error:
        assert "run.json is damaged" in str(error)  # noqa: PT017


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such run"):
        open_run(str(tmp_path / "none"))
    with pytest.raises(RecordError, match=r"it has no run\.json"):
        open_run(str(tmp_path))


# --- secrets

secret_texts = st.text(min_size=4, max_size=30).filter(lambda s: s.strip())
NAMES = ["api_key", "key", "token", "hf_token", "PASSWORD", "password", "db_passwd"]


@calm
@given(secret_texts, st.sampled_from(NAMES), plain)
def test_named_secrets_are_shown_as_secret(value: str, name: str, other: Any) -> None:
    config = {"model": {name: value, "deep": [{name: value}]}, "other": "o"}
    secrets = find_secrets(config, config)
    shown = secrets.redact(config)
    assert shown["model"] == {name: SECRET, "deep": [{name: SECRET}]}
    if value not in SECRET:
        assert value not in secrets.blot(f"failed with {value}, twice: {value}!")
    assert config["model"][name] == value


@calm
@given(secret_texts, st.text(max_size=5), st.text(max_size=5))
def test_values_of_the_environment_are_shown_as_written(
    value: str, before: str, after: str
) -> None:
    written = "x${oc.env:SOME}y"
    raw = {"a": written, "b": ["${oc.env:SOME, null}"], "c": "${a}"}
    resolved = {"a": f"{before}{value}{after}", "b": [value], "c": value}
    secrets = find_secrets(raw, resolved)
    shown = secrets.redact(resolved)
    assert shown["a"] == written
    assert shown["b"] == ["${oc.env:SOME, null}"]
    if value not in SECRET:
        assert value not in shown["c"]


@calm
@given(st.dictionaries(st.sampled_from(["keys", "tokens", "a", "keyboard"]), plain))
def test_what_is_no_secret_is_left_alone(config: dict[str, Any]) -> None:
    secrets = find_secrets(config, config)
    if "://" not in json.dumps(config):
        assert secrets.redact(config) == config
    assert dataclasses.asdict(secrets) == {"shown": {}, "values": ()}


@calm
@given(secret_texts, secret_texts)
def test_a_secret_within_a_secret_goes_as_well(one: str, two: str) -> None:
    config = {"a_key": one, "b_key": f"{one}{two}", "c_key": f"{two}{one}"}
    secrets = find_secrets(config, config)
    assert secrets.blot(f"{one}{two}") == SECRET
    assert secrets.blot(f"{two}{one}") == SECRET


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://bob:pw@host/x", "https://<secret>@host/x"),
        ("at s3://id:p%40w@bucket, twice", "at s3://<secret>@bucket, twice"),
        ("https://token@host https://t2@h", "https://<secret>@host https://<secret>@h"),
        ("https://bob:p@ss@host/x", "https://<secret>@host/x"),
        ("https://host/@path", "https://host/@path"),
        ("mail@host", "mail@host"),
        ("https:/bob:pw@host/x", "https:/<secret>@host/x"),
    ],
)
def test_user_info_goes(text: str, shown: str) -> None:
    assert find_secrets({}, {}).blot(text) == shown
    assert find_secrets({}, {}).redact({"a": [text]}) == {"a": [shown]}

# SPDX-License-Identifier: Apache-2.0
"""Records made by strangers with ill intent: one line, exit 2, and nothing is run."""

import gzip
import io
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forging import Parts, forge, make_probe, make_run, pack, seal_checkpoints

from runner.cli import main
from runner.records import reading

pytestmark = [
    *(pytest.mark.promotes, pytest.mark.timeout(120)),
    pytest.mark.xdist_group("malicious"),
]

VERBS = ("keys", "resume", "reproduce", "diff", "report")
ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\r\nerror: none"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def run(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("good") / "run", env=user_env)


@pytest.fixture(scope="module")
def probe(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_probe(tmp_path_factory.mktemp("good") / "probe", env=user_env)


@pytest.fixture
def command(
    tmp_path: Path,
    user_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., Done]]:
    """Runs a verb in this process, in a directory of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", user_env["XDG_CACHE_HOME"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler, raises = signal.getsignal(signal.SIGINT), logging.raiseExceptions
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]

    def run(*args: object) -> Done:
        capfd.readouterr()
        words = list(map(str, args))
        if words[0] == "resume" and not any("train.steps=" in w for w in words):
            words.append("train.steps=25")  # a complete run would be let be
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capfd.readouterr()
        return Done(int(caught.value.code or 0), said.out, said.err)

    yield run
    signal.signal(signal.SIGINT, handler)
    logging.raiseExceptions = raises
    jax.config.update("jax_compilation_cache_dir", cache)


Command = Callable[..., Done]


def arguments(verb: str, record: Path) -> list[object]:
    return [verb, record, record] if verb == "diff" else [verb, record]


def refusal(command: Command, *args: object) -> str:
    """The one line, when all that is true of every refusal was checked."""
    before = sorted(Path.cwd().rglob("*"))
    done = command(*args)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.err.rstrip("\n").isprintable()
    assert sorted(Path.cwd().rglob("*")) == before
    return done.err


# --- what a config names

TARGETS = (
    *("os.system", "posix.system", "subprocess.Popen", "builtins.eval"),
    *("models.os.system", "runner.models.os.system", "runner.os.system"),
    *("flax.linen.module.sys.modules", "flax.linen.module.os.system"),
    *("flax.linen.module.importlib.import_module", "flax.linen.__builtins__.eval"),
    *("flax.linen.Module.apply", "flax.linen.module.Module.__class__"),
    *("jax.numpy.load", "jax.numpy.save", "jax.numpy.fromfile", "jax.numpy.vectorize"),
    *("jax.pure_callback", "jax.debug.callback", "jax.experimental.io_callback"),
    *("jax._src.api.os.system", "optax._src.base.sys.exit", "optax.os.system"),
    *("functools.partial", "operator.methodcaller", "numpy.load", "pickle.loads"),
    *("hydra.utils.call", "flax.serialization.from_bytes", "..os.system", "os..system"),
    *("", ".", "os", "o\0s.system", "__main__.main", "runner.cli.main"),
)


@pytest.mark.parametrize("target", TARGETS)
def test_no_such_target_is_built(
    command: Command, run: Path, tmp_path: Path, target: str
) -> None:
    canary = tmp_path / "canary"

    def edit(parts: Parts) -> None:
        parts.config["model"] = {"_target_": target, "_args_": [f"touch {canary}"]}

    said = refusal(command, "reproduce", forge(run, tmp_path / "x", edit))
    assert "model" in said
    assert not canary.exists()
    if target == "os.system":
        assert "--trust" not in said  # it would not help


PLACES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "optimizer": lambda config, node: config.update(optimizer=node),
    "argument": lambda config, node: config["model"].update(dropout_rate=node),
    "list": lambda config, node: config["model"].update(features=[node]),
    "partial": lambda config, node: config.update(model={**node, "_partial_": True}),
    "lift": lambda config, node: config.update(
        model={"lift": "remat", "module": node, "name": "x"}
    ),
    "lift's argument": lambda config, node: config.update(
        model={"lift": "remat", "module": config["model"], "policy": node}
    ),
    "chain": lambda config, node: config.update(
        optimizer={"_target_": "optax.chain", "_args_": [node]}
    ),
    "activation": lambda config, node: config.update(
        model={"_target_": "models.Sequential", "layers": [node]}
    ),
    "data": lambda config, node: config.update(data=node),
    "task": lambda config, node: config.update(task=node),
    "stream": lambda config, node: config["rng"]["streams"].update(dropout=node),
    "sink": lambda config, node: config["sinks"].update(_callback_=node),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("verb", ["reproduce", "resume"])
def test_no_place_builds_a_command(
    command: Command, run: Path, tmp_path: Path, verb: str, place: Any
) -> None:
    canary = tmp_path / "canary"
    node = {"_target_": "os.system", "_args_": [f"touch {canary}"]}
    record = forge(run, tmp_path / "x", lambda parts: place(parts.config, node))
    done = command(verb, record)
    assert not canary.exists()
    if verb == "reproduce" and place is PLACES["sink"]:
        assert done.code == 0  # its sinks are not the record's
    else:
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done


def test_a_package_is_trusted_by_hand_alone(
    command: Command, run: Path, tmp_path: Path
) -> None:
    """A record's own list of trusted packages does not count."""
    canary = tmp_path / "canary"
    package = Path.cwd() / "evil_layers"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import pathlib\nfrom flax import linen as nn\n"
        f"pathlib.Path({str(canary)!r}).touch()\n"
        "class Net(nn.Dense):\n    pass\n"
    )

    def edit(parts: Parts) -> None:
        parts.config["trusted"] = ["evil_layers"]
        parts.config["model"] = {"_target_": "evil_layers.Net", "features": 10}

    record = forge(run, tmp_path / "x", edit)
    for verb in ("reproduce", "resume"):  # which locks it for this process
        assert "evil_layers" in refusal(command, verb, record)
    assert not canary.exists()
    again = forge(run, tmp_path / "again", edit)
    command("reproduce", again, "--trust", "evil_layers")
    assert canary.exists()
    del sys.modules["evil_layers"]


@pytest.mark.parametrize("name", ["hydra.yaml", "config.yaml", "overrides.yaml"])
def test_hydras_own_files_are_not_read(
    command: Command, run: Path, tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    text = (
        f"hydra: {{callbacks: {{x: !!python/object/apply:os.system [touch {canary}]}}}}"
    )
    record = forge(run, tmp_path / "x")
    (record / ".hydra" / name).write_text(text)
    assert command("keys", record).code == 0
    assert command("reproduce", record, "--steps", 2).code == 0
    assert not canary.exists()


# --- what YAML and JSON can do

TEXTS = {
    "python": "x: !!python/object/apply:os.system ['touch CANARY']",
    "python/name": "x: !!python/name:os.system",
    "python/module": "x: !!python/module:os",
    "own tag": "x: !touch 1",
    "binary": "x: !!binary aGk=",
    "alias": "x: &a [1]\ny: *a",
    "alias bomb": "a: &a [x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "merge": "x: {<<: {a: 1}}",
    "deep": "x: " + "[" * 10_000 + "]" * 10_000,
    "deep map": "{x: " * 5000,
    "twice": "x: 1\nx: 2",
    "date": "x: 2001-01-01",
    "nan": "x: .nan",
    "long number": "x: 0x" + "f" * 50_000,
    "key": "? [a]\n: 1",
    "several": "--- {}\n--- {}",
    "bytes": "\x00\x01",
    "empty": "",
    "list": "[1, 2]",
    "escape": "x: \x1b[31m",
    "large": "x: " + "y" * 5_000_000,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_yaml_is_plain_data(
    command: Command, run: Path, tmp_path: Path, verb: str, text: str
) -> None:
    canary = tmp_path / "canary"
    record = forge(run, tmp_path / "x")
    (record / "config.yaml").write_text(text.replace("CANARY", str(canary)))
    done = command(*arguments(verb, record))
    assert not canary.exists()
    if done.code == 1:  # it parses, and is not what was recorded
        assert "config.yaml is not the file that was recorded" in done.out
        assert verb == "reproduce"
    else:
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
        assert "config.yaml" in done.err


JSONS = {
    "deep": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "twice": '{"schema": 1, "schema": 2}',
    "nan": '{"schema": NaN}',
    "infinite": '{"schema": 1e999}',
    "long number": '{"schema": ' + "9" * 10_000 + "}",
    "half a character": '{"schema": "\\ud800"}',
    "list": "[]",
    "text": '"' + "\\u001b[31m" * 9 + '"',
    "empty": "",
    "cut": '{"schema": 1',
    "no JSON": "\x1b[31m{}",
    "other schema": '{"schema": 2}',
    "no schema": "{}",
}


@pytest.mark.parametrize("name", ["run.json", "keys/ledger.json"])
@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS)
def test_json_is_plain_data(
    command: Command, run: Path, tmp_path: Path, name: str, text: str
) -> None:
    record = forge(run, tmp_path / "x")
    (record / name).write_text(text)
    assert name in refusal(command, "keys", record)


@pytest.mark.parametrize(
    "text",
    ["${oc.env:HOME}", "${seed}", "${oc.decode:x}", "a ${b", "<secret>", "x<secret>y"],
)
@pytest.mark.parametrize("verb", ["reproduce", "resume"])
def test_no_interpolation_is_resolved(
    command: Command, run: Path, tmp_path: Path, verb: str, text: str
) -> None:
    def edit(parts: Parts) -> None:
        parts.config["model"]["activation"] = text

    said = refusal(command, verb, forge(run, tmp_path / "x", edit))
    assert "model.activation: the record does not hold the value" in said
    assert os.environ["HOME"] not in said.replace(str(tmp_path), "")


ODD = (None, True, 3, -(2**70), 1.5, "x", [], {}, [None], {"x": {"y": [1]}})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, child in value.items() if isinstance(value, dict) else ():
        yield from leaves(child, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_any_field_of_the_manifest_may_have_any_type(
    command: Command, run: Path, tmp_path: Path
) -> None:
    """Each place by each value, with digests that fit: a table, or one line."""
    manifest = json.loads((run / "run.json").read_text())
    paths = [path for path in leaves(manifest) if path and path[0] != "digest"]
    codes = set()
    every = [(path, new) for path in paths for new in ODD]
    for i, (path, new) in enumerate(every[::13]):  # 13 and 10 have no common divisor
        verbs = ["keys"] if i % 7 else ["keys", "diff"]
        codes |= _try_field(command, run, tmp_path, verbs, "manifest", path, new)
    assert codes == {0, 2}


def test_any_field_of_the_ledger_may_have_any_type(
    command: Command, run: Path, tmp_path: Path
) -> None:
    ledger = json.loads((run / "keys" / "ledger.json").read_text())
    paths = [path for path in leaves(ledger) if path]
    odd = (None, -1, 2**31, "x", [], {"x": 1}, {"offset": -1, "axes": {"x": -1}})
    codes = set()
    for i, (path, new) in enumerate((p, n) for p in paths for n in odd):
        if i % 20 == 0:
            codes |= _try_field(command, run, tmp_path, ["keys"], "ledger", path, new)
    assert codes == {0, 2}


def _try_field(
    command: Command,
    run: Path,
    tmp_path: Path,
    verbs: list[str],
    part: str,
    path: tuple[Any, ...],
    new: Any,
) -> set[int]:
    record = tmp_path / "x"

    def edit(parts: Parts) -> None:
        parts.keeps = ("config", "keys", "metrics", "states")
        parts.keeps = parts.keeps if path[0] == "digests" else ()
        put(getattr(parts, part), path, new)

    forge(run, record, edit)
    codes = set()
    for verb in verbs:
        done = command(*arguments(verb, record))
        assert done.code in (0, 1, 2), (path, new, done)
        assert "Traceback" not in done.err, (path, new, done)
        assert done.err.count("\n") == (done.code == 2), (path, new, done)
        codes.add(0 if done.code == 1 else done.code)
    shutil.rmtree(record)
    return codes


# --- archives and files that are none


@pytest.mark.parametrize("name", ["../../evil", "/evil", "run/../../evil", "run/\0"])
@pytest.mark.parametrize("kind", ["x.zip", "x.tar.gz", "x.tar"])
def test_no_archive_writes_outside(
    command: Command, run: Path, tmp_path: Path, name: str, kind: str
) -> None:
    archive = pack(run, tmp_path / kind)
    if kind == "x.zip":
        if "\0" in name:
            pytest.skip("zipfile cuts such a name itself")
        with zipfile.ZipFile(archive, "a") as zipped:
            zipped.writestr(name, "evil")
    else:
        content = archive.read_bytes()
        content = gzip.decompress(content) if kind.endswith("gz") else content
        archive.write_bytes(content)
        with tarfile.open(archive, "a") as tarred:
            info = tarfile.TarInfo(name)
            info.pax_headers = {"path": name}
            tarred.addfile(info, io.BytesIO())
    before = {path for path in tmp_path.rglob("*") if path.name != "x"}
    done = [command(*arguments(verb, archive)) for verb in VERBS]
    assert {(each.code, each.err.count("\n")) for each in done} <= {(2, 1), (0, 0)}
    if "\0" not in name:
        assert {each.code for each in done} == {2}
        assert all("leads out" in each.err for each in done)
    else:
        assert {p.name for p in tmp_path.rglob("*")} >= {p.name for p in before}
    assert not list(tmp_path.rglob("evil"))
    assert not Path("/evil").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE],
)
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "checkpoints/24.json"])
def test_links_and_devices_of_an_archive_are_none(
    command: Command, run: Path, tmp_path: Path, kind: bytes, name: str
) -> None:
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tarred:
        for path in sorted(run.rglob("*")):
            info = tarred.gettarinfo(path, path.relative_to(run).as_posix())
            if info.name == name:
                info.type, info.linkname, info.size = kind, str(path), 0
                info.devmajor, info.devminor = 1, 5
                tarred.addfile(info)
            elif path.is_file():
                tarred.addfile(info, io.BytesIO(path.read_bytes()))
    done = command("keys", archive)
    assert done.code == (0 if "checkpoints" in name else 2)
    assert done.err.count("\n") == (done.code == 2)


BOMBS = ("zip", "tar.gz", "sparse", "header", "backwards", "many")


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_in_a_line(
    command: Command,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bomb: str,
) -> None:
    monkeypatch.setattr(reading, "_FREE_RATIO", 4 * 2**20)
    monkeypatch.setattr(reading, "_MOST_FILES", 2000)
    archive = pack(run, tmp_path / ("x.zip" if bomb == "zip" else "x.tar"))
    size = 64 * 2**20
    if bomb == "zip":
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("run/zeros", bytes(size))
    else:
        with tarfile.open(archive, "a") as tarred:
            _add_bomb(tarred, bomb, size)
        if bomb == "backwards":
            _turn_back(archive)
    if bomb in ("tar.gz", "header"):
        archive.write_bytes(gzip.compress(archive.read_bytes()))
    limits = ("times its own size", "more than", "damaged", "not an archive", "size")
    said = refusal(command, "keys", archive)
    assert any(limit in said for limit in limits)


def _add_bomb(tarred: tarfile.TarFile, bomb: str, size: int) -> None:
    info = tarfile.TarInfo("run/zeros")
    if bomb == "tar.gz":
        info.size = size
        tarred.addfile(info, io.BytesIO(bytes(size)))
    elif bomb == "sparse":
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1"}
        info.pax_headers |= {"GNU.sparse.size": str(2**50), "GNU.sparse.map": "0,0"}
        tarred.addfile(info, io.BytesIO())
    elif bomb == "header":
        info.pax_headers = {"comment": "x" * 3 * 2**20}
        tarred.addfile(info, io.BytesIO())
    elif bomb == "backwards":
        tarred.addfile(info, io.BytesIO())
    else:
        for i in range(3000):
            tarred.addfile(tarfile.TarInfo(f"run/{i}"), io.BytesIO())


def _turn_back(archive: Path) -> None:
    """The last member's size becomes negative, so that a reader goes back."""
    content = bytearray(archive.read_bytes())
    at = content.rfind(b"run/zeros")
    content[at + 124 : at + 136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2)
    content[at + 148 : at + 156] = b" " * 8
    total = sum(content[at : at + 512])
    content[at + 148 : at + 156] = b"%06o\0 " % total
    archive.write_bytes(content)


FIFOS = (
    *("run.json", "config.yaml", "keys/ledger.json", "metrics.jsonl", "states.jsonl"),
    *("checkpoints/24.json", "checkpoints/24/default/_METADATA", "runner.log"),
)


@pytest.mark.parametrize("name", FIFOS)
@pytest.mark.parametrize("status", ["completed", "running"])
def test_a_pipe_in_place_of_a_file_is_none(
    command: Command, run: Path, tmp_path: Path, name: str, status: str
) -> None:
    """Whoever opened it would wait forever."""

    def edit(parts: Parts) -> None:
        parts.manifest["status"] = status

    record = forge(run, tmp_path / "x", edit)
    (record / name).unlink()
    os.mkfifo(record / name)
    for verb in ("keys", "diff", "report"):
        done = command(*arguments(verb, record))
        assert done.code in (0, 2)
        assert done.err.count("\n") == (done.code == 2)
        Path("report.html").unlink(missing_ok=True)
    done = command("reproduce", record, "--steps", 2)
    assert "Traceback" not in done.err
    assert name in done.out + done.err or done.code == 0
    assert name in refusal(command, "resume", record, "train.steps=32")


def test_a_pipe_in_place_of_a_run(command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    assert "neither" in refusal(command, "keys", tmp_path / "x")


LINKED = ("metrics.jsonl", "runner.log", "checkpoints", "keys", ".reserve")


@pytest.mark.parametrize("name", LINKED)
def test_no_link_leads_what_is_written_outside(
    command: Command, run: Path, tmp_path: Path, name: str
) -> None:
    """Links are read; a run that has one is not written to."""
    record = forge(run, tmp_path / "x")
    outside = tmp_path / "outside"
    if (record / name).exists():
        (record / name).rename(outside)
    else:
        outside.write_text("mine")
    (record / name).symlink_to(outside)
    if name == "metrics.jsonl":
        assert command("reproduce", record, "--steps", 2).code == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert f"{name} is a link" in refusal(command, "resume", record, "train.steps=32")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# --- arrays


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("kind", ["objects", "pickle", "no zip", "npy", "bomb"])
def test_no_output_is_unpickled(
    command: Command,
    probe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    canary, content = tmp_path / "canary", io.BytesIO()
    monkeypatch.setattr("runner.records.arrays._MOST", 2**20)
    if kind == "objects":
        np.savez(content, output=np.array([Evil(canary)], dtype=object))
    elif kind == "pickle":
        content.write(pickle.dumps(Evil(canary)))
    elif kind == "npy":
        np.save(content, np.zeros(3))
    elif kind == "bomb":
        np.savez_compressed(content, output=np.zeros(2**20))
    else:
        content.write(b"PK\x03\x04 and no more")
    record = forge(
        probe,
        tmp_path / "x",
        lambda parts: parts.texts.update({"outputs.npz": content.getvalue()}),
    )
    assert "outputs.npz is damaged" in refusal(command, "reproduce", record)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["default/_METADATA", "default/manifest.ocdbt", "default/_sharding"]
)
def test_no_checkpoint_is_unpickled(
    command: Command, run: Path, tmp_path: Path, name: str
) -> None:
    """One whose files are not Orbax's is passed over by resume, as a damaged one."""
    canary = tmp_path / "canary"
    record = forge(run, tmp_path / "x")
    for step in (8, 16, 24):
        folder = record / "checkpoints" / str(step)
        (folder / "x.pkl").write_bytes(pickle.dumps(Evil(canary)))
        (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    seal_checkpoints(record)
    done = command("resume", record, "train.steps=25")
    assert "Traceback" not in done.err
    assert not canary.exists()


# --- what reaches the terminal

SHOWN: dict[str, Callable[[Parts], object]] = {
    "experiment": lambda parts: parts.manifest.update(experiment=ESCAPE),
    "status": lambda parts: parts.manifest.update(status=ESCAPE),
    "versions": lambda parts: parts.manifest["versions"].update({ESCAPE: ESCAPE}),
    "machine": lambda parts: parts.manifest["platform"].update(machine=ESCAPE),
    "guarantee": lambda parts: parts.manifest["guarantee"].update(level=ESCAPE),
    "canary": lambda parts: parts.manifest["rng"].update(canary={ESCAPE: ESCAPE}),
    "stream": lambda parts: parts.ledger["streams"][0].update(name=ESCAPE),
    "path": lambda parts: parts.ledger["draws"][0].update(path=[ESCAPE]),
    "why": lambda parts: parts.ledger["draws"][0]["derivation"][0].update(why=ESCAPE),
    "primitive": lambda parts: parts.ledger["draws"][0]["uses"][0].update(
        primitive=ESCAPE
    ),
    "config": lambda parts: parts.config.update(experiment=ESCAPE),
    "config key": lambda parts: parts.config.update({ESCAPE: 1}),
    "target": lambda parts: parts.config["model"].update(_target_=ESCAPE),
    "argument": lambda parts: parts.config["model"].update({ESCAPE: ESCAPE}),
    "secret": lambda parts: parts.config["model"].update({ESCAPE: "${x}"}),
    "data": lambda parts: parts.config["data"].update(name=ESCAPE),
}


@pytest.mark.parametrize("edit", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("verb", VERBS)
def test_nothing_steers_the_terminal(
    command: Command, run: Path, tmp_path: Path, verb: str, edit: Any
) -> None:
    record = forge(run, tmp_path / "x", edit)
    args = ("--steps", 2) if verb == "reproduce" else ()
    args = ("train.steps=25",) if verb == "resume" else args
    done = command(*arguments(verb, record), *args)
    assert done.code in (0, 1, 2)
    for text in (done.out, done.err):
        assert all(line.isprintable() for line in text.split("\n")), text
    assert "error: none" not in done.err.split("\n")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_names_in_an_archive_do_not_steer_it(
    command: Command, run: Path, tmp_path: Path, kind: str
) -> None:
    odd = forge(run, tmp_path / ESCAPE.replace("/", ""))
    for name in (f"checkpoints/24/{ESCAPE}", f"keys/{ESCAPE}"):
        (odd / name).write_text("x")
    archive = pack(odd, tmp_path / f"x.{kind}")
    done = command("reproduce", archive, "--steps", 2)
    assert done.code == 1
    assert "was added" in done.out
    assert all(line.isprintable() for line in done.out.split("\n"))


# --- what a record may not decide


def test_a_record_decides_nothing_but_the_run(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is written and cached, who is told of it, how XLA is set up."""
    cache, dump = tmp_path / "cache", tmp_path / "dump"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"

    def edit(parts: Parts) -> None:
        for part in (parts.config, parts.manifest, parts.ledger):
            part["experiment"] = "../../../tmp/x"
        parts.config["train"]["compile_cache"] = str(cache)
        parts.config["sinks"]["wandb"] |= {"mode": "online", "entity": "evil"}
        parts.config["sinks"]["terminal"]["mode"] = "rich"
        parts.manifest["platform"] |= {"thread_pool": 10**9, "xla_flags": flags}
        parts.manifest["platform"]["environment"] = {"LD_PRELOAD": "/evil.so"}

    record = forge(run, tmp_path / "x", edit)
    environment = dict(os.environ)
    done = command("reproduce", record)
    assert done.code in (0, 1), done
    assert dict(os.environ) == environment
    (made,) = (path.parent for path in Path.cwd().rglob("verdict.json"))
    assert made.relative_to(Path.cwd()).parts[:3] == ("outputs", "tmp", "x")
    assert not (made / "wandb").exists()
    assert not cache.exists()
    assert not dump.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "x"]


def test_a_resumed_record_names_no_cache(
    command: Command, run: Path, tmp_path: Path
) -> None:
    """What is compiled comes from a cache and runs: the user alone names one."""
    cache = tmp_path / "cache"

    def edit(parts: Parts) -> None:
        parts.config["train"]["compile_cache"] = str(cache)

    record = forge(run, tmp_path / "x", edit)
    assert command("resume", record, "train.steps=25").code == 0
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "/etc", "none"])
def test_data_are_read_from_files_alone(
    command: Command, run: Path, tmp_path: Path, kind: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = str(tmp_path / "pipe") if kind == "pipe" else kind

    def edit(parts: Parts) -> None:
        data = {"name": "arrays", "path": path, "batch_size": 4}
        parts.config["data"] = data

    assert "data.path" in refusal(
        command, "reproduce", forge(run, tmp_path / "x", edit)
    )


def test_a_line_without_end(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST", 2**20)
    line = b'{"phase": "train", "step": 0, "x": "' + b"y" * 2**21 + b'"}\n'
    record = forge(
        run, tmp_path / "x", lambda parts: parts.texts.update({"metrics.jsonl": line})
    )
    for verb in ("reproduce", "diff", "report"):
        assert "metrics.jsonl" in refusal(command, *arguments(verb, record))


ROWS = (
    *('{"phase": "train", "step": 0, "loss": 1e999}', '{"phase": 3, "step": 0}'),
    *('{"phase": "train", "step": true}', '{"phase": "train", "step": 1}'),
    *('{"phase": "train", "step": -1}', '{"phase": "eval", "step": 1, "loss": []}'),
    *('{"phase": "train", "step": 0, "loss": "nan"}', "[" * 9999, "9" * 9999, "{}"),
    *('{"phase": "train", "step": 0, "loss": 1}', '{"phase": ["train"], "step": 0}'),
)


@pytest.mark.parametrize("row", ROWS)
def test_rows_hold_numbers(
    command: Command, run: Path, tmp_path: Path, row: str
) -> None:
    record = forge(
        run,
        tmp_path / "x",
        lambda parts: parts.texts.update({"metrics.jsonl": row.encode() + b"\n"}),
    )
    for verb in ("reproduce", "diff", "report"):
        assert "metrics.jsonl" in refusal(command, *arguments(verb, record))
    done = command("resume", record, "train.steps=25")
    assert "Traceback" not in done.err

# SPDX-License-Identifier: Apache-2.0
"""The record and its mirrors: exact, readable, and never in the way of a run."""

import io
import json
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console

from runner.errors import ConfigError, RecordError
from runner.records.events import EvalRecord, RunEnd, RunStart, StreamRow, TrainRecord
from runner.records.metrics import LineWriter, format_record, read_metrics
from runner.sinks.base import Sinks, make_sinks
from runner.sinks.jsonl import JsonlSink
from runner.sinks.live import LiveSink
from runner.sinks.mirror import Mirror, MirrorError
from runner.sinks.tensorboard import make_tensorboard_sink
from runner.sinks.terminal import PlainSink, make_terminal_sink
from runner.sinks.text import clean
from runner.sinks.wandb import WandbSink, make_wandb_sink
from runner.spec import SinksSpec, TensorboardSpec, TerminalSpec, WandbSpec

EVIL = "\x1b]0;owned\x07[bold red]x[/]:smile:\u202e\x9b2J\r\n"
SHOWN = r"\x1b]0;owned\x07[bold red]x[/]:smile:\u202e\x9b2J\r\n"


def start_of(directory: Path, **changes: Any) -> RunStart:
    """A run of 100 steps with two streams."""
    directory.mkdir(parents=True, exist_ok=True)
    row = StreamRow("dropout", "jax", "fold_in(key(0), 'dropout')", "6b20 99ba", "", "")
    values = {
        "directory": directory,
        "run_id": f"run-{directory.name}",
        "experiment": "dropout",
        "config": {
            "seed": 7,
            "model": {"_target_": "models.MLP"},
            "data": {"name": "digits", "batch_size": 128},
            "task": {"name": "classification"},
            "optimizer": {"_target_": "optax.adamw", "learning_rate": 0.001},
        },
        "streams": (row, StreamRow("shuffle", "host", "Seed", "0", "train", "epoch")),
        "parameters": 12_810,
        "steps": 100,
        "objective": "accuracy",
        "notes": {"guarantee": "bit-exact"},
    }
    return RunStart(**(values | changes))


def end_of(run: RunStart, **changes: Any) -> RunEnd:
    """The end of such a run, with a record on the disk."""
    (run.directory / "keys").mkdir(exist_ok=True)
    for name in ("run.json", "keys/ledger.json"):
        (run.directory / name).write_text("{}")
    values = {
        "status": "completed",
        "reason": "",
        "steps": 100,
        "seconds": 2.0,
        "metrics": {"train/loss": 0.25, "eval/accuracy": 0.75},
        "best": (0.875, 50),
    }
    return RunEnd(**(values | changes))


def chunk(first_step: int, steps: int = 25) -> TrainRecord:
    """Train steps whose loss is 1 / (1 + step)."""
    loss = 1 / (1 + np.arange(first_step, first_step + steps, dtype=np.float32))
    return TrainRecord(first_step, {"loss": loss})


def play(sink: Any, run: RunStart, **end: Any) -> None:
    """All that a run says, to one sink."""
    sink.start(run)
    for first_step in range(0, 100, 25):
        sink.write(chunk(first_step))
    sink.write(EvalRecord(100, {"accuracy": 0.75}, best=True))
    sink.finish(end_of(run, **end))


def play_together(sinks: list[Any], runs: list[RunStart], **end: Any) -> None:
    """The same for several runs at once; the first one fails, the others stop."""
    for sink, run in zip(sinks, runs, strict=True):
        sink.start(run)
    for first_step in range(0, 100, 25):
        for sink in sinks:
            sink.write(chunk(first_step))
    for i, (sink, run) in enumerate(zip(sinks, runs, strict=True)):
        sink.write(EvalRecord(100, {"accuracy": 0.75}))
        sink.finish(end_of(run, status="interrupted" if i else "failed", **end))


# metrics.jsonl


@settings(deadline=None)
@given(arrays(np.uint32, st.integers(1, 8)), st.integers(0, 2**40))
@example(np.array([0, 1, 0x80000000, 0x7F7FFFFF, 0x7F800000], np.uint32), 0)
def test_float32_round_trip(bits: np.ndarray, first_step: int) -> None:
    values = bits.view(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "metrics.jsonl")
        writer = LineWriter(path)
        record = TrainRecord(first_step, {"loss": values, '50% "': -values})
        writer.write(format_record(record))
        writer.close()
        rows = read_metrics(path)
    assert [row["step"] for row in rows] == [first_step + i for i in range(len(values))]
    for row, value in zip(rows, values, strict=True):
        if np.isfinite(value):
            assert np.float32(row["loss"]).tobytes() == value.tobytes()
            assert np.float32(row['50% "']).tobytes() == (-value).tobytes()
        else:
            assert row == {**row, "phase": "train", "loss": None, '50% "': None}


def test_lines_as_the_contract_says(tmp_path: Path) -> None:
    play(JsonlSink(), start_of(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 101
    assert lines[2] == '{"phase": "train", "step": 2, "loss": 0.3333333432674408}'
    assert lines[-1] == '{"phase": "eval", "step": 100, "accuracy": 0.75}'


def test_one_write_per_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, written, write = LineWriter(tmp_path / "m"), [], os.write
    monkeypatch.setattr(os, "write", lambda f, b: written.append(write(f, b)) or len(b))
    writer.write(format_record(chunk(0, 1000)))
    writer.close()
    assert written == [(tmp_path / "m").stat().st_size]


@pytest.mark.parametrize("tail", ["", '{"phase": "tr', "x" * 200_000, "\0" * 9])
def test_unfinished_line(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"phase": "train", "step": 0, "loss": 1.0}\n'
    path.write_text(whole + tail)
    assert [row["step"] for row in read_metrics(path)] == [0]
    writer = LineWriter(path)
    writer.write(format_record(chunk(1, 1)))
    writer.close()
    assert path.read_text().startswith(whole + '{"phase": "train", "step": 1, ')
    path.write_text(tail)
    LineWriter(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": NaN}', "\udcff", ""])
def test_damaged_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" + line.encode(errors="surrogateescape") + b"\n{}\n")
    with pytest.raises(RecordError, match=r"metrics.jsonl: line 2 is not a JSON obj"):
        read_metrics(path)


def test_disk_errors(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"can't be read \(No such file"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(RecordError, match=r"can't be written \(Is a directory"):
        LineWriter(tmp_path)
    if Path("/dev/full").exists():
        with pytest.raises(RecordError, match=r"can't be written \(No space left"):
            LineWriter(Path("/dev/full")).write(format_record(chunk(0)))


# The fan-out


class Broken:
    """A sink that fails at one call, and notes the others."""

    def __init__(self, at: str, error: Exception) -> None:
        self.at, self.error, self.calls = at, error, list[str]()

    def start(self, run: RunStart) -> None:
        self._call("start")

    def write(self, record: TrainRecord | EvalRecord) -> None:
        self._call("write")

    def finish(self, end: RunEnd) -> None:
        self._call("finish")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise self.error


@pytest.mark.parametrize("at", ["start", "write", "finish"])
def test_mirror_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    broken, sound = Broken(at, OSError("a\nb")), Broken("", OSError())
    play(Sinks(JsonlSink(), {"x": broken, "y": sound}), start_of(tmp_path))
    assert broken.calls.count(at) == 1
    assert broken.calls[-1] == at
    assert sound.calls == ["start", *["write"] * 5, "finish"]
    assert caplog.messages == ["sinks.x: dropped, the run goes on (OSError: a b)"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 101


@pytest.mark.parametrize("at", ["write", "finish"])
def test_record_fails(tmp_path: Path, at: str) -> None:
    record, mirror = Broken(at, RecordError("full")), Broken("", OSError())
    sinks, run = Sinks(record, {"x": mirror}), start_of(tmp_path)
    with pytest.raises(RecordError, match="full"):
        play(sinks, run)
    if at == "write":
        sinks.finish(end_of(run))
    assert mirror.calls[-1] == "finish"


def test_record_does_not_start(tmp_path: Path) -> None:
    mirror = Broken("", OSError())
    sinks, run = Sinks(Broken("start", RecordError("full")), {"x": mirror}), start_of
    with pytest.raises(RecordError, match="full"):
        sinks.start(run(tmp_path))
    sinks.finish(end_of(run(tmp_path)))
    assert mirror.calls == []


def test_all_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    spec = SinksSpec(terminal=TerminalSpec("disabled"))
    play(make_sinks(spec), start_of(tmp_path))
    files = {"keys", "metrics.jsonl", "run.json", "runner.log", "states.jsonl"}
    assert {p.name for p in tmp_path.iterdir()} == files


def test_imports_wait() -> None:
    heavy = ("wandb", "rich", "tensorboardX", "jax")
    code = f"""if True:
        import sys
        from runner.sinks.base import make_sinks
        from runner.spec import SinksSpec
        make_sinks(SinksSpec())
        print([name for name in {heavy} if name in sys.modules])"""
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert shown == "[]\n"


# The terminal


def test_plain(tmp_path: Path) -> None:
    file = io.StringIO()
    run = start_of(tmp_path, experiment=EVIL, notes={EVIL: EVIL})
    play(PlainSink(file), run, status="failed", reason=EVIL, metrics={EVIL: 1.0})
    lines = file.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert f"{'experiment':{len(SHOWN)}}  {SHOWN}" in lines
    assert any(
        re.fullmatch(r"optimizer +optax.adamw, learning_rate 0.001", s) for s in lines
    )
    assert any(
        re.fullmatch(r"dropout +jax +fold_in\(key.*6b20 99ba.*", s) for s in lines
    )
    assert "eval at step 100  accuracy 0.75  best" in lines
    assert any(re.fullmatch(rf"status +failed: {re.escape(SHOWN)}", s) for s in lines)
    assert any(re.fullmatch(r"best accuracy +0.875 at step 50", s) for s in lines)
    assert any(re.fullmatch(r"speed +50 steps/s", s) for s in lines)


def test_plain_progress(tmp_path: Path) -> None:
    file = io.StringIO()
    play(PlainSink(file, interval=0.0), start_of(tmp_path))
    progress = [s for s in file.getvalue().splitlines() if s.startswith("step ")]
    assert progress[0] == "step 25 of 100  loss 0.04"
    assert re.fullmatch(
        r"step 75 of 100  loss 0\.01333  [\d,]+ steps/s  0\.0 s left", progress[2]
    )
    file = io.StringIO()
    play(PlainSink(file), start_of(tmp_path))
    assert "\nstep " not in file.getvalue()


def test_plain_in_ascii(tmp_path: Path) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    play(PlainSink(file), start_of(tmp_path, experiment="größe"))
    assert rb"gr\xf6\xdfe" in raw.getvalue()


def test_live(tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, record=True)
    run = start_of(tmp_path, experiment=EVIL, notes={EVIL: EVIL})
    sink = LiveSink(console)
    sink.start(run)
    sink.write(chunk(0))
    sink.write(EvalRecord(25, {"accuracy": 0.75}))
    sink.write(chunk(25))
    sink._progress.refresh()
    sink.finish(end_of(run, status="interrupted", reason=EVIL))
    drawn = file.getvalue()
    assert "\x1b[?25l" in drawn  # the cursor goes
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # and comes back
    commands = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", drawn)  # rich's own
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u202e]", commands)) <= {"\n", "\r"}
    said = console.export_text()
    for part in (SHOWN, "optax.adamw", "fold_in(key(0), 'dropout')", "6b20 99ba"):
        assert part in said
    assert " 50/100  loss 0.02  accuracy 0.75" in said
    assert f"interrupted: {SHOWN}" in said
    assert "0.875 at step 50" in said


def test_live_costs_little(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    sink, run, record = LiveSink(console), start_of(tmp_path, steps=10**6), chunk(0)
    sink.start(run)
    begun = time.process_time()
    for _ in range(1000):
        sink.write(record)
    cost = (time.process_time() - begun) / 1000
    sink.finish(end_of(run))
    assert cost < 500e-6  # seconds; measured 5 to 90 us


def test_logs_do_not_tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    handler = logging.StreamHandler(terminal)
    log = logging.getLogger("runner")
    log.addHandler(handler)
    try:
        sink = LiveSink(Console(force_terminal=True, width=120))
        run = start_of(tmp_path)
        sink.start(run)
        sink._progress.refresh()
        before = len(terminal.getvalue())
        log.warning("[b]a[/b] warning")
        drawn = terminal.getvalue()[before:]
        sink.finish(end_of(run))
    finally:
        log.removeHandler(handler)
    # The bar's line is erased, the warning stands alone, the bar is drawn again.
    assert re.search(r"\r\x1b\[2K\[b\]a\[/b\] warning\s*\n.*compile", drawn)
    assert handler.stream is terminal
    assert sys.stdout is terminal


@pytest.mark.parametrize(
    ("mode", "term", "tty", "kind"),
    [
        ("auto", "xterm", True, "LiveSink"),
        ("auto", "dumb", True, "PlainSink"),
        ("auto", "xterm", False, "PlainSink"),
        ("rich", "xterm", False, "LiveSink"),
        ("plain", "xterm", True, "PlainSink"),
        ("disabled", "xterm", True, "NoneType"),
    ],
)
def test_terminal_mode(
    monkeypatch: pytest.MonkeyPatch, mode: Any, term: str, tty: bool, kind: str
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", term)
    assert type(make_terminal_sink(TerminalSpec(mode))).__name__ == kind


@settings(deadline=None)
@given(st.text())
def test_clean(words: str) -> None:
    assert clean(words).isprintable()
    if words.isprintable():
        assert clean(words) == words


# W&B


@pytest.fixture
def own_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of the test's own; returns where a `wandb.py` takes wandb's place."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(fakes), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Mirror, "_shared", None)
    yield fakes
    if Mirror._shared is not None:
        Mirror._shared.close()


FAKE = """
import json, os, sys
print("noise"); print("noise", file=sys.stderr)
class Settings:
    def __init__(self, **options): pass
class Table(Settings): pass
class Artifact(Settings):
    def __init__(self, name, type): self.name = name
    def add_file(self, path, name, **options): self.path = path
class Run:
    dir = "/somewhere/files"
    def __init__(self, options):
        self.summary, self.id = {}, options["id"]
        self.note("init", {k: str(v) for k, v in options.items()})
    def note(self, *what):
        with open(os.environ["FAKE_LOG"], "a") as file:
            file.write(json.dumps([self.id, *what]) + "\\n")
    def log(self, row, step=None, commit=None):
        if "streams" not in row: self.note("log", step, row)
    def log_artifact(self, artifact):
        self.note("artifact", artifact.name, os.environ["WANDB_DATA_DIR"])
    def finish(self, exit_code): self.note("finish", exit_code, self.summary)
def init(**options): return Run(options)
"""
BROKEN = {
    "ModuleNotFoundError: No module": "raise ModuleNotFoundError('No module')",
    "RuntimeError: init": "def init(**o): raise RuntimeError('init')",
    "ConnectionResetError: gone": "def log(*args, **options):\n"
    "    raise ConnectionResetError('gone')\nRun.log = log",
    "process that runs wandb ended": "def init(**o): import os; os._exit(3)",
    "was not done within 1 s": "def init(**o): import time; time.sleep(60)",
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_wandb(
    own_child: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    message: str,
) -> None:
    (own_child / "wandb.py").write_text(FAKE + BROKEN[message])
    patience = 1.0 if "within 1 s" in message else 30.0
    sink = WandbSink(WandbSpec(), mode="offline", patience=patience)
    begun = time.monotonic()
    play(Sinks(JsonlSink(), {"wandb": sink}), start_of(tmp_path / "run"))
    assert time.monotonic() - begun < 20.0  # seconds; not 60
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert capfd.readouterr() == ("", "")


def test_full_buffer(
    own_child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_child / "wandb.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr("runner.sinks.mirror._BUFFER_LIMIT", 2**16)
    sink, begun = WandbSink(WandbSpec(every=1), mode="offline"), time.monotonic()
    sink.start(start_of(tmp_path / "run"))
    with pytest.raises(MirrorError, match="does not take what it is sent"):  # noqa: PT012
        for i in range(100):
            sink.write(chunk(1000 * i, 1000))
    assert time.monotonic() - begun < 20.0  # seconds; not 60


def said(log: Path) -> list[list[Any]]:
    """What the fake wandb was told, a list a call."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_trainer_is_killed(own_child: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (own_child / "wandb.py").write_text(FAKE)
    code = f"""if True:
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parent)]}
        from test_sinks import *
        sink = WandbSink(WandbSpec(), mode="offline")
        sink.start(start_of(Path({str(tmp_path)!r}, "run")))
        sink.write(chunk(0, 41))
        os.kill(os.getpid(), signal.SIGKILL)"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while not (log.exists() and "finish" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    steps = [call[2] for call in said(log) if call[1] == "log"]
    assert steps == [0, 10, 20, 30, 40]
    assert said(log)[-1] == ["run-run", "finish", 1, {}]


def test_online_falls_back(
    own_child: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse = (
        "    assert options['mode'] == 'offline', 'no net'\n    return Run(options)"
    )
    (own_child / "wandb.py").write_text(f"{FAKE}\ndef init(**options):\n{refuse}")
    play(WandbSink(WandbSpec(), mode="online"), start_of(tmp_path / "run"))
    assert caplog.messages == [
        "sinks.wandb: offline, not online (AssertionError: no net). "
        "Send it later: wandb sync /somewhere"
    ]
    *_, artifact, finish = said(tmp_path / "log")
    assert artifact[:3] == ["run-run-offline", "artifact", "ledger-run-run"]
    assert finish[:3] == ["run-run-offline", "finish", 0]


def test_runs_stage_files_apart(own_child: Path, tmp_path: Path) -> None:
    (own_child / "wandb.py").write_text(FAKE)
    runs = [start_of(tmp_path / name) for name in ("one", "two")]
    play_together([WandbSink(WandbSpec(), mode="offline") for _ in runs], runs)
    staged = [call[3] for call in said(tmp_path / "log") if call[1] == "artifact"]
    assert staged == [str(run.directory / "wandb" / "data") for run in runs]


def test_real_wandb(own_child: Path, tmp_path: Path) -> None:
    before = dict(os.environ), sys.exit, sys.excepthook
    spec = WandbSpec(project="p", group="g")
    runs = [start_of(tmp_path / name) for name in ("one", "two")]
    last = {"train/loss": 0.25, "eval/accuracy": 0.5}
    play_together([WandbSink(spec, mode="offline") for _ in runs], runs, metrics=last)
    assert "wandb" not in sys.modules
    assert (dict(os.environ), sys.exit, sys.excepthook) == before
    assert not (tmp_path / "home").exists()
    for run, exit_code in zip(runs, (1, 130), strict=True):
        (file,) = run.directory.glob("wandb/offline-run-*/*.wandb")
        records = inspect(file)
        head = records["run"][0]
        assert head["run_id"] == run.run_id
        assert head["display_name"] == f"dropout-{run.run_id}"
        assert (head["project"], head["run_group"]) == ("p", "g")
        config = {k: v for k, v in head["config"]["update"].items() if k != "_wandb"}
        assert config == run.config
        rows = {r["step"].get("num", 0): r["item"] for r in records["history"]}
        assert [*rows] == [*range(0, 101, 10)]
        assert rows[20]["train/loss"] == pytest.approx(1 / 21)
        assert rows[100]["eval/accuracy"] == 0.75
        assert "streams._type" in rows[0]
        (table,) = file.parent.glob("files/media/table/streams*.json")
        assert json.loads(table.read_text())["data"][0][:2] == ["dropout", "jax"]
        assert records["artifact"][-1]["name"] == f"ledger-{run.run_id}"
        contents = records["artifact"][-1]["manifest"]["contents"]
        staged = {entry["path"]: Path(entry["local_path"]) for entry in contents}
        assert sorted(staged) == ["keys/ledger.json", "run.json"]  # what is there
        for path in staged.values():
            assert path.is_relative_to(run.directory / "wandb")
            assert path.is_file()
        summary = {k: v for r in records["summary"] for k, v in r["update"].items()}
        assert summary["train/loss"] == 0.25
        assert summary["best/accuracy"] == 0.875
        assert summary["eval/accuracy"] == 0.5  # the end's word, not the last row's
        assert [r["exit_code"] for r in records["exit"]] == [exit_code]


def inspect(file: Path) -> dict[str, list[Any]]:
    """What a .wandb file holds, by type of record."""
    command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", file]
    records: dict[str, list[Any]] = {}
    for line in subprocess.check_output(command, text=True).splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records


@pytest.mark.parametrize(
    ("spec", "variable", "mode"),
    [
        ("auto", None, "offline"),
        ("auto", "online", "online"),
        ("auto", "dryrun", "offline"),
        ("auto", "disabled", None),
        ("offline", "online", "offline"),
        ("disabled", "online", None),
    ],
)
def test_wandb_mode(
    monkeypatch: pytest.MonkeyPatch, spec: Any, variable: str | None, mode: str | None
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    sink = make_wandb_sink(WandbSpec(mode=spec))
    assert (sink and sink._mode) == mode


def test_unknown_wandb_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ConfigError, match=r"^sinks.wandb.mode: .* \(got 'onlin'\)"):
        make_wandb_sink(WandbSpec())


# TensorBoard

SPEC = TensorboardSpec("enabled", every=30)


def events_of(run: RunStart) -> list[Any]:
    """What the only event file of a run holds."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (run.directory / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # length, its checksum, event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard(tmp_path: Path) -> None:
    sink, run = make_tensorboard_sink(SPEC), start_of(tmp_path)
    play(sink, run)
    events = events_of(run)
    assert not any(event.HasField("session_log") for event in events)
    points = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert points == {
        **{
            ("train/loss", step): np.float32(1 / (1 + step)) for step in (0, 30, 60, 90)
        },
        ("eval/accuracy", 100): 0.75,
    }


def test_tensorboard_hides_what_a_resumed_run_takes_again(tmp_path: Path) -> None:
    sink, run = make_tensorboard_sink(SPEC), start_of(tmp_path, first_step=40)
    play(sink, run)
    hidden = [e.step for e in events_of(run) if e.HasField("session_log")]
    assert hidden == [41]  # and all after it, as TensorBoard reads it


def test_tensorboard_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.sinks.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jax-runner\[tensorboard\]'"):
        make_sinks(SinksSpec(tensorboard=TensorboardSpec("enabled")))
    assert make_tensorboard_sink(TensorboardSpec()) is None

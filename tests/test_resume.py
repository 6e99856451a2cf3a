# SPDX-License-Identifier: Apache-2.0
"""A run goes on where it was stopped, to the bytes of one that never was, or not.

Most runs here are made in this process, from one compiled program.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from kills import left_of

from runner.cli import resume as verb
from runner.compile import compile_run
from runner.errors import RunFailedError, RunnerError
from runner.recording import Recorded, record_run
from runner.records import checkpoint
from runner.records.digests import digest_manifest
from runner.records.events import TrainRecord
from runner.records.record import read_record
from runner.records.restore import list_saved
from runner.records.secrets import Secrets
from runner.replay.resuming import find_resumption

STEPS = 40
SMALL = (
    *("task=regression", "model.num_outputs=1", "model.features=[16]", "sinks=none"),
    *("data=arrays", "data.batch_size=8", f"train.steps={STEPS}"),
    *("eval.every=8", "checkpoint.every=10", "checkpoint.keep=2"),
    *("checkpoint.digest_every=6", "train.steps_per_call=3"),
)
DIGITS = (
    *("+experiment=dropout", "model.features=[32]", "train.steps=120", "eval.every=30"),
    *("data.batch_size=64", "checkpoint.every=15", "checkpoint.digest_every=20"),
)
NO_SECRETS = Secrets({}, ())

pytestmark = [pytest.mark.promotes, pytest.mark.xdist_group("resume")]


def write_rows(path: Path, *, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    sizes = {"x_train": (80, 3), "y_train": (80,), "x_test": (20, 3), "y_test": (20,)}
    np.savez(path, **{k: draw.normal(size=n).astype("f4") for k, n in sizes.items()})
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.npz")


@pytest.fixture(scope="module")
def program(make_spec: Any, rows: Path) -> Any:
    return compile_run(make_spec(*SMALL, f"data.path={rows}"))


def other(program: Any, part: str, **values: Any) -> Any:
    """The same compiled program under another spec, which it knows nothing of."""
    section = replace(getattr(program.spec, part), **values)
    made = replace(program, spec=replace(program.spec, **{part: section}))
    vars(made)["calls"] = program.calls
    return made


def record(program: Any, directory: Path, **options: Any) -> Recorded:
    directory.mkdir(parents=True, exist_ok=True)
    return record_run(program, directory=directory, secrets=NO_SECRETS, **options)


def go_on(program: Any, directory: Path, **options: Any) -> Recorded:
    resumption = find_resumption(read_record(str(directory)), program)
    return record(program, directory, resumption=resumption, **options)


class Kill(BaseException):
    """Ends a run in this process, as far as a process can be ended from inside."""


def kill_after(step: int) -> Callable[[Any], None]:
    """Stops everything once the metrics of a step are written."""

    def listen(event: Any) -> None:
        if isinstance(event, TrainRecord) and event.first_step + event.steps > step:
            raise Kill

    return listen


def stop_after(step: int) -> dict[str, Any]:
    """Options of a run that a user stops after some step."""
    seen: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, TrainRecord):
            seen.append(event.first_step + event.steps)

    def stop() -> str:
        return "stopped by the user" if seen and seen[-1] > step else ""

    return {"listen": listen, "stop": stop}


@pytest.fixture(scope="module")
def whole(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert record(program, directory).status == "completed"
    return directory


@pytest.fixture(scope="module")
def broken(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that ended after step 33, with checkpoints 20 and 30 and none at its end."""
    directory = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(Kill):
        record(program, directory, listen=kill_after(33))
    assert list_saved(read_record(str(directory)).files) == (30, 20)
    return directory


@pytest.fixture
def run(broken: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(broken, tmp_path / "run"))


@pytest.fixture(scope="module")
def of_a_command(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an undisturbed process leaves."""
    directory = tmp_path_factory.mktemp("command") / "run"
    words = (*DIGITS, "sinks=none", f"hydra.run.dir={directory}")
    command = [sys.executable, "-m", "runner", *words]
    subprocess.run(command, cwd=directory.parent, env=user_env, check=True)
    return left_of(directory)


def files_of(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its content and time."""
    return {
        path.relative_to(directory).as_posix(): (
            path.stat().st_mtime_ns,
            path.read_bytes(),
        )
        for path in directory.rglob("*")
        if path.is_file()
    }


def refusal(*words: str | Path) -> RunnerError:
    """What `resume` refuses, in this process."""
    with pytest.raises(RunnerError) as caught:
        verb.main([str(word) for word in words])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


# Equal bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 4, 9, 10, 17, 24, 30, 38])
@pytest.mark.parametrize("end", ["kill", "stop"])
def test_bytes_are_those_of_an_undisturbed_run(
    program: Any, whole: Path, tmp_path: Path, step: int, end: str
) -> None:
    directory = tmp_path / "run"
    if end == "kill":
        with pytest.raises(Kill):
            record(program, directory, listen=kill_after(step))
    else:
        assert record(program, directory, **stop_after(step)).status == "interrupted"
    go_on(program, directory)
    here, there = left_of(directory), left_of(whole)
    if end == "stop":  # its last state is one more that is saved
        here |= {name: there[name] for name in ("saved steps", "checkpoints")}
    assert here == there


def test_calls_of_other_lengths_change_no_byte(
    make_spec: Any, rows: Path, program: Any, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        record(program, tmp_path / "run", listen=kill_after(14))
    words = (*SMALL, f"data.path={rows}", "train.steps_per_call=7")
    longer = compile_run(make_spec(*words))
    go_on(longer, tmp_path / "run")
    assert left_of(tmp_path / "run") == left_of(whole)


@pytest.mark.parametrize("first", [3, 16, 24, 33, 40, 47])
def test_training_on_is_training_longer(
    program: Any, tmp_path: Path, first: int
) -> None:
    """Also where the first end is no multiple of any interval."""
    steps = 55
    record(other(program, "train", steps=steps), tmp_path / "once")
    record(other(program, "train", steps=first), tmp_path / "twice")
    go_on(other(program, "train", steps=steps), tmp_path / "twice")
    once, twice = left_of(tmp_path / "once"), left_of(tmp_path / "twice")
    assert twice == once
    manifest = json.loads((tmp_path / "twice" / "run.json").read_text())
    assert [(s["step"], s["was"]) for s in manifest["resumed"]] == [
        (first, "completed")
    ]
    assert manifest["parent"]["run_id"] == manifest["run_id"]


def test_training_on_may_be_killed_at_once(program: Any, tmp_path: Path) -> None:
    """Its first checkpoint stands behind an end that was put off, and counts."""
    longer = other(program, "train", steps=STEPS)
    record(longer, tmp_path / "once")
    record(other(program, "train", steps=33), tmp_path / "twice")
    with pytest.raises(Kill):
        go_on(longer, tmp_path / "twice", listen=kill_after(35))
    go_on(longer, tmp_path / "twice")
    here, there = left_of(tmp_path / "twice"), left_of(tmp_path / "once")
    here |= {name: there[name] for name in ("saved steps", "checkpoints")}
    assert here == there  # but for one more that was saved
    manifest = json.loads((tmp_path / "twice" / "run.json").read_text())
    assert [session["step"] for session in manifest["resumed"]] == [33, 33]


def test_an_early_stop_comes_where_it_would(program: Any, tmp_path: Path) -> None:
    patient = other(program, "eval", every=4, patience=2, min_delta=1.0)
    record(patient, tmp_path / "once")
    once = left_of(tmp_path / "once")
    assert once["reason of run.json"].startswith("early stop at step 12")
    with pytest.raises(Kill):
        record(patient, tmp_path / "twice", listen=kill_after(10))
    go_on(patient, tmp_path / "twice")
    assert left_of(tmp_path / "twice") == once
    # more steps are nothing to it
    go_on(other(patient, "train", steps=80), tmp_path / "twice")
    assert (
        left_of(tmp_path / "twice")["reason of run.json"] == once["reason of run.json"]
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_and_on(
    runner: Run,
    of_a_command: dict[str, Any],
    user_env: dict[str, str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    sinks = ("sinks=none", "sinks.wandb.mode=offline")
    mine = tmp_path / "run"
    mirrored = number is signal.SIGTERM
    words = (*DIGITS, *sinks[: 1 + mirrored], f"hydra.run.dir={mine}")
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *words], cwd=tmp_path, env=user_env
    )
    metrics = mine / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 130
    manifest = json.loads((mine / "run.json").read_text())
    assert (manifest["status"], manifest["reason"]) == (
        "interrupted",
        "stopped by the user",
    )
    assert 0 < manifest["steps"] < 120
    done = runner("resume", str(mine))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(mine)
    here, there = left_of(mine), dict(of_a_command)
    here |= {name: there[name] for name in ("saved steps", "checkpoints")}
    here["files"] -= {"wandb"}
    assert here == there
    again = json.loads((mine / "run.json").read_text())
    assert again["run_id"] == manifest["run_id"]
    assert again["resumed"][0]["step"] == manifest["steps"]
    ids = [path.name.rpartition("-")[2] for path in mine.glob("wandb/offline-run-*")]
    assert ids == [manifest["run_id"]] * 2 * mirrored


def test_the_command_trains_on(runner: Run, tmp_path: Path) -> None:
    words = (*DIGITS, "sinks=none")
    for name, steps in (("once", 70), ("twice", 40)):
        where = f"hydra.run.dir={tmp_path}/{name}"
        assert runner(*words, where, f"train.steps={steps}").returncode == 0
    done = runner("resume", f"{tmp_path}/twice", "train.steps=70")
    assert (done.returncode, done.stderr) == (0, "")
    assert left_of(tmp_path / "twice") == left_of(tmp_path / "once")
    # and there is nothing left to do then: a script that asks again is right, too
    before = files_of(tmp_path / "twice")
    done = runner("resume", f"{tmp_path}/twice")
    assert (done.returncode, done.stderr) == (0, "")
    said, last = done.stdout.splitlines()
    assert said.startswith(f"{tmp_path}/twice: the run is complete, it took 70 steps.")
    assert last == f"{tmp_path}/twice"
    assert files_of(tmp_path / "twice") == before


# Damage ------------------------------------------------------------------------------


def array_data(folder: Path) -> Path:
    """The largest of Orbax's files: the one with the arrays."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": lambda folder: flip(array_data(folder)),
    "truncated": lambda folder: os.truncate(array_data(folder), 100),
    "deleted": lambda folder: array_data(folder).unlink(),
    "added": lambda folder: (folder / "default" / "more").write_bytes(b""),
    "all gone": shutil.rmtree,
    "list flipped": lambda folder: flip(folder.with_name(f"{folder.name}.json")),
    "list empty": lambda folder: folder.with_name(f"{folder.name}.json").write_text(""),
    "of another step": lambda folder: shutil.copy(
        folder.with_name("20.json"), folder.with_name("30.json")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    program: Any,
    whole: Path,
    run: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    DAMAGES[damage](run / "checkpoints" / "30")
    go_on(program, run)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said[0].startswith("checkpoint 30 can't be used: ")
    assert said[1] == "going on from step 20 instead"
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["resumed"][0]["step"] == 20
    assert left_of(run) == left_of(whole)


def test_without_a_checkpoint_it_starts_over(
    program: Any, whole: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in ("20", "30"):
        flip(array_data(run / "checkpoints" / step))
    go_on(program, run)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line.partition(":")[0] for line in said] == [
        "checkpoint 30 can't be used",
        "checkpoint 20 can't be used",
        "going on from step 0 instead",
    ]
    assert left_of(run) == left_of(whole)


def test_the_terminal_and_the_log_say_what_was_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(array_data(run / "checkpoints" / "30"))
    assert verb.main([str(run)]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("WARNING: checkpoint 30 can't be used: ")
    assert second == "WARNING: going on from step 20 instead"
    log = (run / "runner.log").read_text()
    assert "WARNING checkpoint 30 can't be used: " in log
    assert "WARNING going on from step 20 instead" in log


def test_a_warning_is_said_once(runner: Run, run: Path) -> None:
    """In a process of its own: absl gives a root without handlers one of its own."""
    flip(array_data(run / "checkpoints" / "30"))
    done = runner("resume", str(run))
    first, second, _ = done.stderr.splitlines()  # there are 8 devices here
    assert first.startswith("WARNING: checkpoint 30 can't be used: ")
    assert second == "WARNING: going on from step 20 instead"


def test_what_a_save_left_unfinished_is_cleared_away(
    program: Any, whole: Path, run: Path
) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "20", folder / "40")  # Orbax was done, the list was not
    shutil.copytree(folder / "20", folder / "40.orbax-checkpoint-tmp")
    (folder / ".40.json.17.new").write_text("{")
    (run / ".run.json.17.new").write_text("{")
    (run / "keys" / ".ledger.json.next.17.new").write_text("{")
    go_on(program, run)
    assert left_of(run) == left_of(whole)
    assert not [name for name in files_of(run) if name.endswith(".new")]


# Refused -----------------------------------------------------------------------------


REFUSED = {
    "train.steps=20": "train.steps: the run has taken 30 steps already (got 20)",
    "train.steps=30": "train.steps: the run has taken 30 steps already (got 30)",
    "seed=1": "seed: would make it another run (got 'seed=1')",
    "data.shuffle=null": "data.shuffle: would make it another run",
    "model.dropout_rte=0.1": "model.dropout_rte: unknown key",
    "train.steps=0": "train.steps: ",
    "+seed=1": "seed: a record's config takes plain values",
    "train.steps": "train.steps: needs a value. Say train.steps=VALUE.",
}


@pytest.mark.parametrize("word", REFUSED)
def test_another_config_is_refused(run: Path, word: str) -> None:
    before = files_of(run)
    assert str(refusal(run, word)).startswith(REFUSED[word])
    assert files_of(run) == before


def test_every_changed_field_is_named(run: Path) -> None:
    before = files_of(run)
    error = str(refusal(run, "seed=1", "train.steps=50", "eval.every=2"))
    assert error.startswith("seed, eval.every: would make it another run")
    assert files_of(run) == before


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def forge(run: Path) -> None:
    """Another config's digest, under a digest of the manifest that is right."""
    path = run / "run.json"
    manifest = json.loads(path.read_text())
    manifest["digests"]["config"] = "0" * 64
    manifest["digest"] = digest_manifest(manifest)
    path.write_text(json.dumps(manifest))


ALTERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config": (edit("config.yaml", "batch_size: 8", "batch_size: 4"), "config.yaml"),
    "config gone": (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
    "ledger": (edit("keys/ledger.json", "Dropout_0", "Dropout_1"), "keys/ledger.json"),
    "run.json": (edit("run.json", '"seed": 0', '"seed": 1'), "run.json"),
    "forged": (forge, "config.yaml"),
    "no json": (lambda run: (run / "run.json").write_text("{"), "run.json"),
    "metrics": (edit("metrics.jsonl", '"step": 3,', '"step": 4,'), "metrics.jsonl"),
    "metrics gone": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "states": (edit("states.jsonl", '"step": 6,', '"step": 5,'), "states.jsonl"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_record_is_refused(run: Path, name: str) -> None:
    change, file = ALTERED[name]
    change(run)
    before = files_of(run)
    assert str(refusal(run)).startswith(f"{run}: {file} ")
    assert files_of(run) == before


def test_other_rows_are_refused_and_the_same_elsewhere_are_not(
    make_spec: Any, whole: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.npz")
    mine = compile_run(make_spec(*SMALL, f"data.path={data}"))
    with pytest.raises(Kill):
        record(mine, tmp_path / "run", listen=kill_after(15))
    write_rows(data, seed=1)
    before = files_of(tmp_path / "run")
    error = str(refusal(tmp_path / "run"))
    assert error.startswith("data.path: the rows are not those of the record")
    assert files_of(tmp_path / "run") == before
    copy = write_rows(tmp_path / "copy.npz")
    moved = Path(shutil.copytree(tmp_path / "run", tmp_path / "moved"))
    assert verb.main([str(moved), f"data.path={copy}"]) == 0
    assert left_of(moved) == left_of(whole)


def test_an_archive_goes_on_in_a_new_directory(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", run))
    before = archive.read_bytes()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert verb.main([str(archive)]) == 0
    (made,) = (tmp_path / "here").rglob("run.json")
    assert left_of(made.parent) == left_of(whole)
    assert archive.read_bytes() == before


def test_places_that_are_no_run(tmp_path: Path, make_spec: Any) -> None:
    assert "no such run" in str(refusal(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "not a run directory" in str(refusal(tmp_path / "empty"))
    assert not list((tmp_path / "empty").iterdir())
    probe = compile_run(make_spec("+experiment=rng/submodules", "sinks=none"))
    record(probe, tmp_path / "probe")
    before = files_of(tmp_path / "probe")
    assert "a probe has nothing to go on from" in str(refusal(tmp_path / "probe"))
    assert files_of(tmp_path / "probe") == before


def test_a_run_that_another_process_writes_is_refused(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from runner.records.files import lock_directory\n"
        "print(lock_directory(Path(sys.argv[1])), flush=True); input()"
    )
    before = files_of(run)
    with subprocess.Popen(
        [sys.executable, "-c", code, run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert "another process is writing it" in str(refusal(run))
        holder.communicate("\n")
    assert files_of(run) == before


def test_another_model_is_refused(runner: Run, tmp_path: Path) -> None:
    """The config is as it was; the code that it names is not."""
    code = (
        "import flax.linen as nn\n"
        "class Mine(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train=False):\n"
        "        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))\n"
        "        x = nn.Dropout(RATE, deterministic=not train)(x)\n"
        "        return nn.Dense(10)(x)\n"
    )
    package = tmp_path / "mine"
    package.mkdir()
    module = package / "__init__.py"
    module.write_text(code.replace("RATE", "0.5"))
    words = ("+experiment=dropout", "~model", "+model={_target_: mine.Mine}")
    words += ("trusted=[mine]", "sinks=none", "train.steps=12", "checkpoint.every=4")
    done = runner(*words, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    again = ("resume", f"{tmp_path}/run", "train.steps=20")
    before = files_of(tmp_path / "run")
    done = runner(*again)  # trusted by the record alone
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    dropout = "nn.Dropout(0.5, deterministic=not train)(x)"
    changed = module.read_text().replace(dropout, f"nn.Dropout(0.1)({dropout}, False)")
    assert changed != module.read_text()
    module.write_text(changed.replace("(x, False)", "(x, deterministic=not train)"))
    done = runner(*again, "--trust", "mine")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "the program no longer draws what was recorded" in line
    assert files_of(tmp_path / "run") == before


# Faults ------------------------------------------------------------------------------


def test_a_save_that_fails_in_the_background_ends_the_run_at_once(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save, and the end of the run, are far off."""
    endless = other(program, "train", steps=10**9)
    endless = other(endless, "checkpoint", every=300)
    failed, last = threading.Event(), [0]

    def fail(folder: Path) -> dict[str, str]:
        failed.set()
        raise OSError(28, "No space left on device")

    def listen(event: Any) -> None:
        if isinstance(event, TrainRecord):
            last[0] = event.first_step + event.steps
            if last[0] > 300:
                assert failed.wait(60)
                time.sleep(0.01)

    monkeypatch.setattr(checkpoint, "_digest_folder", fail)
    with pytest.raises(RunFailedError, match=r"^checkpoints: can't be written \("):
        record(endless, tmp_path / "run", listen=listen)
    assert 300 < last[0] < 600
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["status"], manifest["steps"]) == ("failed", last[0])
    assert "checkpoints: can't be written" in manifest["reason"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.json"))


def test_a_clock_that_goes_backwards_disturbs_nothing(
    program: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600.0 * next(ticks))
    monkeypatch.setattr(time, "time_ns", lambda: int(2e18) - 3600 * next(ticks))
    with pytest.raises(Kill):
        record(program, tmp_path / "run", listen=kill_after(25))
    go_on(program, tmp_path / "run")
    assert next(ticks) > 1
    assert left_of(tmp_path / "run") == left_of(whole)


_FULL = """
set -u
mount -t tmpfs -o size=40m none "$1" || exit 77
"$2" -m runner "${@:4}" hydra.run.dir="$1/run" 2> "$3/first.err" &
first=$!
until test -e "$1/run/checkpoints/30.json" || ! kill -0 $first; do sleep 0.01; done
head -c 100m /dev/zero > "$1/filler" 2> /dev/null
wait $first; echo $? > "$3/first.rc"
cp "$1/run/run.json" "$3/failed.json"
rm "$1/filler"
"$2" -m runner resume "$1/run" 2> "$3/second.err"
echo $? > "$3/second.rc"
cp -r "$1/run" "$3/run"
"""


def test_a_full_disk_stops_a_run_and_space_lets_it_go_on(
    of_a_command: dict[str, Any], user_env: dict[str, str], tmp_path: Path
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir()
    out.mkdir()
    words = (*DIGITS, "sinks=none")
    script = ["bash", "-c", _FULL, "bash", small, sys.executable, out, *words]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) to mount a small disk with")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *script],
        cwd=tmp_path,
        env=user_env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if not (out / "first.rc").exists():
        pytest.skip(f"this machine mounts no small disk: {done.stderr.strip()}")
    # threads of TensorStore may print a traceback of a loop that was closed meanwhile
    said = (out / "first.err").read_text().splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1, said
    assert not [line for line in said if line.startswith(("ERROR", "WARNING"))]
    assert (out / "first.rc").read_text() == "1\n"
    failed = json.loads((out / "failed.json").read_text())
    assert failed["status"] == "failed"
    assert failed["digest"] == digest_manifest(failed)
    assert (out / "second.err").read_text() == ""
    assert (out / "second.rc").read_text() == "0\n"
    assert left_of(out / "run") == of_a_command
    manifest = json.loads((out / "run" / "run.json").read_text())
    assert manifest["resumed"][0]["step"] >= 30
    assert manifest["resumed"][0]["was"] == "failed"


_CLAIM = """
import sys, threading
from pathlib import Path
from runner.records.files import claim_directory
gate, said = threading.Barrier(16), []
def claim():
    gate.wait()
    said.append(str(claim_directory(Path(sys.argv[1]), exact=False)))
threads = [threading.Thread(target=claim) for _ in range(16)]
print("ready", flush=True); input()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*said, sep="\\n", flush=True); input()
"""


def test_64_claims_at_once_get_64_directories(tmp_path: Path) -> None:
    """Four processes of sixteen threads; a claim holds as long as its process."""
    wanted = tmp_path / "now"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIM, wanted],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said: list[str] = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        said += [process.stdout.readline().strip() for _ in range(16)]
    for process in processes:
        process.communicate("\n")
    names = {"now", *(f"now-{n}" for n in range(1, 64))}
    assert {Path(path).name for path in said} == names
    assert {path.name for path in tmp_path.iterdir()} == names

# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, when they are made, and that a listed one can be read."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner import course
from runner.course import Saves
from runner.errors import RunFailedError
from runner.records import checkpoint
from runner.records.checkpoint import FOLDER, Checkpoints
from runner.records.metrics import Written
from runner.records.reading import open_run
from runner.records.restore import list_saved, read_saved, restore_leaves

NOTHING = {"metrics": Written(0, "0" * 64), "states": Written(0, "0" * 64)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def keep(run: Path, **options: Any) -> Checkpoints:
    wanted = {"keep": 2, "keep_best": 0, "best": "max", **options}
    return Checkpoints(run / FOLDER, run_id="me", **wanted)


def state_at(step: int) -> dict[str, Any]:
    return {"params": {"w": np.full(3, step, np.float32)}}


def readable(run: Path) -> dict[int, float]:
    """Every listed step, its files checked, and what its array holds."""
    files = open_run(str(run))
    found = {}
    for step in list_saved(files):
        read_saved(files, step, run_id="me")
        found[step] = float(restore_leaves(files, step)["params/w"][0])
    return found


def save_all(run: Path, values: list[float | None], **options: Any) -> Checkpoints:
    """A save at steps 1, 2, ... with these objectives."""
    checkpoints = keep(run, **options)
    for step, value in enumerate(values, start=1):
        checkpoints.save(step, state_at(step), objective=value, written=NOTHING)
    return checkpoints


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 1}, {6}),
        ({"keep": 2}, {5, 6}),
        ({"keep": 9}, {1, 2, 3, 4, 5, 6}),
        ({"keep": 1, "keep_best": 1}, {2, 6}),
        ({"keep": 1, "keep_best": 2}, {2, 4, 6}),  # of equals, the first
        ({"keep": 1, "keep_best": 1, "best": "min"}, {1, 6}),
        ({"keep": 3, "keep_best": 1}, {2, 4, 5, 6}),
    ],
)
def test_what_stays(run: Path, options: dict[str, Any], left: set[int]) -> None:
    save_all(run, [0.1, 0.9, None, 0.5, 0.5, 0.2], **options).close()
    assert readable(run) == {step: float(step) for step in left}
    names = {path.name for path in (run / FOLDER).iterdir()}
    assert names == {str(s) for s in left} | {f"{s}.json" for s in left}


def test_a_step_is_saved_once(run: Path) -> None:
    checkpoints = save_all(run, [None, None])
    checkpoints.save(2, state_at(7), written=NOTHING)
    checkpoints.close()
    assert readable(run) == {1: 1.0, 2: 2.0}


def test_runs_in_threads_save_at_the_same_time(tmp_path: Path) -> None:
    def save(run: int) -> dict[int, float]:
        (tmp_path / str(run)).mkdir()
        (tmp_path / str(run) / "run.json").write_text("{}")
        checkpoints = keep(tmp_path / str(run), keep=4)
        for step in range(1, 5):
            checkpoints.save(step, state_at(100 * run + step), written=NOTHING)
        checkpoints.close()
        return readable(tmp_path / str(run))

    with ThreadPoolExecutor(6) as pool:
        for run, found in enumerate(pool.map(save, range(12))):
            assert found == {step: 100.0 * run + step for step in range(1, 5)}


def test_what_is_deleted_is_off_the_list_first(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment of a deletion is a listed step unreadable."""
    seen: list[set[int]] = []
    really = shutil.rmtree

    def look(path: Any, *args: Any, **options: Any) -> None:
        if Path(path).name.isdecimal():
            (Path(path) / "_CHECKPOINT_METADATA").unlink()  # it has begun
            seen.append(set(readable(run)))
        really(path, *args, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", look)
    save_all(run, [None] * 4).close()
    assert seen == [{2, 3}, {3, 4}]


def test_a_deletion_that_fails_leaves_no_listed_step_unreadable(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any, *_: Any, **__: Any) -> None:
        (Path(path) / "_CHECKPOINT_METADATA").unlink()
        raise OSError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", fail)
        with pytest.raises(RunFailedError, match=r"can't be written \(no more\)"):
            save_all(run, [None] * 3).close()
    assert readable(run) == {2: 2.0, 3: 3.0}
    assert (run / FOLDER / "1").is_dir()
    files = open_run(str(run))
    saved = {s: read_saved(files, s, run_id="me") for s in list_saved(files)}
    checkpoints = keep(run)
    checkpoints.begin(saved)
    checkpoints.close()
    assert not (run / FOLDER / "1").exists()
    assert readable(run) == {2: 2.0, 3: 3.0}


def test_a_failure_in_the_background_is_said_by_the_next_call(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_digest_folder", fail)
    checkpoints = keep(run)
    checkpoints.save(1, state_at(1), written=NOTHING)
    with pytest.raises(RunFailedError, match="No space left on device"):
        checkpoints.save(2, state_at(2), written=NOTHING)
    checkpoints.close()
    assert readable(run) == {}


def test_a_disk_that_is_nearly_full_is_said_before_a_byte_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(shutil.disk_usage(run))(2**40, 2**40, 5 * 2**20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: full)
    checkpoints = keep(run)
    with pytest.raises(RunFailedError, match="5 MiB free, 16 MiB needed"):
        checkpoints.save(1, state_at(1), written=NOTHING)
    checkpoints.close()
    assert not list((run / FOLDER).iterdir())


def test_what_is_given_is_all_that_stays(run: Path) -> None:
    save_all(run, [None] * 3, keep=3).close()
    files = open_run(str(run))
    two = read_saved(files, 2, run_id="me")
    (run / FOLDER / "3.json.tmp").write_text("")
    (run / FOLDER / "link").symlink_to(run)
    checkpoints = keep(run)
    checkpoints.begin({2: two})
    checkpoints.save(4, state_at(4), written=NOTHING)
    checkpoints.close()
    assert readable(run) == {2: 2.0, 4: 4.0}
    assert (run / "run.json").exists()
    assert json.loads((run / FOLDER / "2.json").read_text())["step"] == 2


# When ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(course.time, "monotonic", lambda: now[0])
    return iter([now])


def test_auto_saves_by_the_clock(make_spec: Any, clock: Any) -> None:
    (now,) = clock
    saves = Saves(make_spec("+experiment=dropout", "checkpoint.every=auto"))
    due = []
    for step in range(1, 40):
        now[0] += course._SECONDS_PER_SAVE / 8
        if saves.is_due(step, best=False):
            due.append(step)
    assert due == [8, 16, 24, 32]


def test_a_best_is_saved_and_counts_for_the_clock(make_spec: Any, clock: Any) -> None:
    (now,) = clock
    spec = make_spec("+experiment=dropout", "checkpoint.keep_best=1")
    saves = Saves(spec)
    due = []
    for step in range(1, 20):
        now[0] += course._SECONDS_PER_SAVE / 8
        if saves.is_due(step, best=step in (3, 13)):
            due.append(step)
    assert due == [3, 11, 13]


def test_null_saves_at_the_end_alone(make_spec: Any) -> None:
    saves = Saves(make_spec("+experiment=dropout", "checkpoint.every=null"))
    assert not any(saves.is_due(step, best=True) for step in range(1, 2000))

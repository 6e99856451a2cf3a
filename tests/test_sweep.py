# SPDX-License-Identifier: Apache-2.0
"""A sweep read back: what was swept over, how its jobs ended, what came of them.

Most sweeps here are forged from one real run: the code that reads them can't tell.
"""

import csv
import fcntl
import html
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.errors import RecordError
from runner.records.digests import digest_config, digest_file, digest_manifest
from runner.report.collect import collect_runs
from runner.report.page import make_page
from runner.report.sweep_charts import heat_map, parallel, points
from runner.report.sweep_tables import sweep_tables
from runner.sweep.fields import ABSENT, Field, differing_leaves, fields_of
from runner.sweep.files import write_sweep
from runner.sweep.jobs import FAILURE, Status
from runner.sweep.sweep import Sweep, read_sweep

pytestmark = pytest.mark.xdist_group("sweep")

SHORT = ("+experiment=dropout", "train.steps=20", "eval.every=10", "sinks=none")
EVIL = "<b>$\\frac{1}{0}$</b>\x1b[31m"


def runner(env: dict[str, str], cwd: Path, *args: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "runner", *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def real(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep of four jobs, of which two diverge and one is refused."""
    where = tmp_path_factory.mktemp("real")
    rates, seeds = "optimizer.learning_rate=1e20,1e-3", "seed=0,-1"
    done = runner(user_env, where, "-m", *SHORT, rates, seeds, "hydra.sweep.dir=s")
    return done, where / "s"


@pytest.fixture(scope="module")
def run(real: Any) -> Path:
    """A run that completed."""
    return Path(real[1] / "2")


Forge = Callable[..., Sweep]


@pytest.fixture
def forge(run: Path, tmp_path: Path) -> Forge:
    """A sweep of forged runs: `forge([{path: value}, ...], scores, **manifest)`."""

    def make(jobs: list[dict[str, Any]], scores: list[Any], **fields: Any) -> Sweep:
        sweep = tmp_path / "sweep"
        sweep.mkdir()
        shutil.copy(run.parent / "multirun.yaml", sweep)
        for i, (values, score) in enumerate(zip(jobs, scores, strict=True)):
            _forge(run, sweep / str(i), values, score, fields)
        return read_sweep(str(sweep))

    return make


def _forge(run: Path, to: Path, values: Mapping[str, Any], score: Any, f: Any) -> None:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    manifest = json.loads((to / "run.json").read_text())
    config = yaml.safe_load((to / "config.yaml").read_text())
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    rows = [
        {"phase": "eval", "step": step, "accuracy": step * (score or 0.0)}
        for step in (5, 10)
    ]
    (to / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (to / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    manifest |= {"metrics": {"eval/accuracy": score}, **f}
    manifest["digests"]["config"] = digest_config(config)
    manifest["digests"]["metrics"] = digest_file(to / "metrics.jsonl")
    manifest["digest"] = digest_manifest(manifest)
    (to / "run.json").write_text(json.dumps(manifest))
    words = ["+experiment=dropout", *(f"{k}={v}" for k, v in values.items())]
    (to / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))


# --- at the end of a sweep


def test_all_jobs_that_failed_are_named(real: Any) -> None:
    done, where = real
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "s"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: sweep: 3 jobs failed: 0 (loss or update not finite")
    assert ", 1, 3 (R007: " in last
    assert "Traceback" not in done.stderr
    statuses = {job.label: str(job.status) for job in read_sweep(str(where)).jobs}
    assert statuses == {"0": "failed", "1": "failed", "2": "completed", "3": "failed"}
    assert (where / "1" / FAILURE).exists()  # it left no record


def test_what_is_printed_is_what_report_prints(
    real: Any, user_env: dict[str, str], tmp_path: Path
) -> None:
    done, where = real
    kept = {name: (where / name).read_bytes() for name in ("sweep.json", "sweep.csv")}
    for name in kept:
        (where / name).unlink()
    said = runner(user_env, where.parent, "report", "s", "--out", tmp_path / "x.html")
    assert said.returncode == 0, said.stderr
    for table in sweep_tables(read_sweep(str(where))):
        for cell in (cell for row in table.rows for cell in row):
            shown = cell.replace(str(where), "s")
            assert shown in done.stdout
            assert shown in said.stdout
    for name, content in kept.items():
        assert (where / name).read_bytes() == content


def test_the_command_repeats_the_best_job(
    real: Any, user_env: dict[str, str], tmp_path: Path
) -> None:
    found = json.loads((real[1] / "sweep.json").read_text())
    python, dash, module, *words = shlex.split(found["best"]["command"])
    assert (python, dash, module) == ("python", "-m", "runner")
    assert found["best"]["job"] == "2"
    again = runner(user_env, tmp_path, *words)
    assert again.returncode == 0, again.stderr
    ours, theirs = (
        json.loads((path / "run.json").read_text())["digests"]
        for path in (Path(again.stdout.splitlines()[-1]), real[1] / "2")
    )
    assert ours == theirs


def test_a_sweep_is_read_without_jax(real: Any, user_env: dict[str, str]) -> None:
    code = (
        "import sys; from runner.sweep.sweep import read_sweep;"
        "import runner.cli.sweep, runner.sweep.files, runner.report.sweep_tables as t;"
        f"t.sweep_tables(read_sweep({str(real[1])!r}));"
        "print(*{'jax', 'matplotlib', 'flax'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=user_env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"


# --- what was swept over


def test_fields_are_what_differs_in_the_configs(forge: Forge) -> None:
    jobs = [
        {"seed": s, "rng.seed": s, "optimizer._target_": t, "optimizer.b1": b}
        for s in (0, 1)
        for t, b in (("optax.adam", 0.9), ("optax.sgd", None))
    ]
    for i, job in enumerate(jobs):
        job["sinks.wandb.group"] = str(i)  # can't matter to a bit
    sweep = forge(jobs, [0.1, 0.2, 0.3, 0.4])
    assert sweep.fields == (Field("optimizer._target_", ("optimizer.b1",)),)
    assert sweep.seeds == ("seed",)
    assert [len(group.jobs) for group in sweep.groups] == [2, 2]


def test_numbers_that_never_repeat_are_fields_of_their_own() -> None:
    configs = [{"a": x, "b": 1 / x, "o.t": f"t{x}", "o.c": str(x)} for x in (1, 2, 3)]
    fields = fields_of(differing_leaves(configs))
    assert fields == (Field("a"), Field("b"), Field("o.t", ("o.c",)))


def test_what_is_interpolated_is_no_field() -> None:
    """It is a copy of what stands beside `module`; equal by chance elsewhere is not."""
    configs = [
        {"model.rate": x, "model.module.layers[3].rate": x, "model.module.depth": 2 * x}
        | {"optimizer.rate": x, "optimizer.transform.scale": x, "train.max_norm": x}
        for x in (1, 2, 1)
    ]
    assert list(differing_leaves(configs)) == [
        *("model.rate", "model.module.depth", "optimizer.rate", "train.max_norm")
    ]


def test_an_absent_leaf_is_not_a_null_one() -> None:
    leaves = differing_leaves([{"a": None, "b": 1}, {"b": 1.0}])
    assert leaves == {"a": [None, ABSENT], "b": [1, 1.0]}


# --- what came of it


def test_means_and_deviations_over_seeds(forge: Forge) -> None:
    rates = [(rate, seed) for rate in (0.0, 0.5, 0.9) for seed in range(3)]
    scores = [0.1, 0.2, 0.4, 0.7, 0.9, 0.5, None, 0.3, 0.2]
    jobs = [{"model.dropout_rate": r, "seed": s} for r, s in rates]
    sweep = forge(jobs, scores)
    assert [g.values["model.dropout_rate"] for g in sweep.groups] == [0.5, 0.9, 0.0]
    best, middle, worst = sweep.groups
    assert best.mean == pytest.approx(0.7)
    assert best.deviation == pytest.approx(statistics.stdev([0.7, 0.9, 0.5]))
    assert (best.best and best.best.label) == "4"
    assert middle.scores == (0.3, 0.2)
    assert worst.mean == pytest.approx(0.7 / 3)
    assert (sweep.best and sweep.best.label, sweep.sign) == ("4", 1)
    write_sweep(sweep)
    plain = json.loads((sweep.directory / "sweep.json").read_text())
    assert plain["direction"] == "max"
    assert [g["completed"] for g in plain["groups"]] == [3, 2, 3]
    with (sweep.directory / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["objective"] for row in rows] == [str(x or "") for x in scores]
    assert [row["model.dropout_rate"] for row in rows] == [str(r) for r, _ in rates]


def test_less_is_better_where_it_is(forge: Forge) -> None:
    jobs = [{"eval.metric": "loss", "model.dropout_rate": r} for r in (0.1, 0.2)]
    metrics = {"eval/loss": 0.5, "eval/accuracy": 0.1, "train/loss": None}
    sweep = forge(jobs, [0.5, 0.5], metrics=metrics)
    assert (sweep.metric, sweep.sign) == ("loss", -1)
    write_sweep(sweep)
    plain = json.loads((sweep.directory / "sweep.json").read_text())
    assert [job["metrics"] for job in plain["jobs"]] == [metrics] * 2
    with (sweep.directory / "sweep.csv").open() as stream:
        for row in csv.DictReader(stream):
            cells = [row[name] for name in ("objective", *metrics)]
            assert cells == ["0.5", "0.5", "0.1", ""]


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_only_completed_jobs_count(forge: Forge, status: str) -> None:
    sweep = forge([{"seed": 0}, {"seed": 1}], [0.1, 0.2], status=status, reason="x")
    assert (sweep.best, sweep.command) == (None, "")
    assert [group.mean for group in sweep.groups] == [None]
    expected = "killed" if status == "running" else status
    assert sweep.counts == {Status(expected): 2}


def test_a_job_that_runs_is_told_from_one_that_was_killed(
    forge: Forge, tmp_path: Path
) -> None:
    sweep = forge([{"seed": 0}, {"seed": 1}], [0.1, 0.2], status="running")
    (sweep.directory / "2").mkdir()
    (sweep.directory / "2" / "runner.log").touch()
    lock = os.open(sweep.directory / "1", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    jobs = read_sweep(str(sweep.directory)).jobs
    os.close(lock)
    assert [(str(job.status), job.reason) for job in jobs] == [
        ("killed", "before it ended"),
        ("running", ""),
        ("killed", "before its record began"),
    ]


def test_a_damaged_job_hides_no_other(forge: Forge) -> None:
    where = forge([{"seed": 0}, {"seed": 1}], [0.1, 0.2]).directory
    (where / "0" / "config.yaml").write_text("{}")
    (where / "3").mkdir()
    (where / "3" / FAILURE).write_text('"no mapping"')
    sweep = read_sweep(str(where))
    assert [str(job.status) for job in sweep.jobs] == ["damaged", "completed", "failed"]
    (where / "3" / FAILURE).unlink()
    os.mkfifo(where / "3" / FAILURE)  # would never end
    (where / "1" / ".hydra" / "overrides.yaml").unlink()
    os.mkfifo(where / "1" / ".hydra" / "overrides.yaml")
    assert " reproduce " in read_sweep(str(where)).command
    assert "config.yaml is not the file that was recorded" in sweep.jobs[0].reason
    assert [len(group.jobs) for group in sweep.groups] == [1]


def test_a_directory_without_jobs_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no job of a sweep in it"):
        read_sweep(str(tmp_path))


# --- the command that repeats


@pytest.mark.parametrize(
    "word", ["hydra.callbacks.x._target_=os.abort", "+hydra/x=y", "~seed", "a=<secret>"]
)
def test_no_override_that_runs_anything_is_printed(forge: Forge, word: str) -> None:
    where = forge([{"seed": 0}], [0.1]).directory
    words = where / "0" / ".hydra" / "overrides.yaml"
    assert read_sweep(str(where)).command.endswith("+experiment=dropout seed=0")
    words.write_text(yaml.safe_dump(["seed=1", word]))
    reproduce = f"python -m runner reproduce {shlex.quote(str(where / '0'))}"
    assert read_sweep(str(where)).command == reproduce


def test_a_config_from_elsewhere_is_repeated_from_its_record(forge: Forge) -> None:
    where = forge([{"seed": 0}], [0.1]).directory
    multirun = yaml.safe_load((where / "multirun.yaml").read_text())
    source = {"path": "/mine", "schema": "file", "provider": "command-line"}
    multirun["hydra"]["runtime"]["config_sources"].append(source)
    (where / "multirun.yaml").write_text(yaml.safe_dump(multirun))
    assert " reproduce " in read_sweep(str(where)).command


# --- the pictures


def test_what_is_drawn_of_one_field(forge: Forge) -> None:
    rates = [(rate, seed) for rate in (0.0, 0.2, 0.5) for seed in (0, 1)]
    jobs = [{"model.dropout_rate": r, "seed": s} for r, s in rates]
    sweep = forge(jobs, [0.1, 0.3, 0.5, 0.5, None, 0.2])
    ((chart,),) = (found.series for found in points(sweep))
    assert chart.jobs == ((0.0, 0.1), (0.0, 0.3), (0.2, 0.5), (0.2, 0.5), (0.5, 0.2))
    assert [mean[:2] for mean in chart.means] == [(0.0, 0.2), (0.2, 0.5), (0.5, 0.2)]
    assert chart.means[0][2] == pytest.approx(math.sqrt(0.02))
    assert (heat_map(sweep), parallel(sweep)) == (None, None)
    page = make_page(collect_runs([str(sweep.directory)]))
    assert "accuracy by model.dropout_rate" in page
    assert "eval accuracy by model.dropout_rate, mean and deviation" in page
    assert "<summary>3: model.dropout_rate=0.2 seed=1</summary>" in page


def test_rows_to_train_on_stand_beside(forge: Forge) -> None:
    """In the table and in the picture by value."""
    jobs = [
        {"model.dropout_rate": r, "seed": s} for r in (0.0, 0.2, 0.5) for s in (0, 1)
    ]
    where = forge(jobs, [0.5, 0.5, 0.6, 0.6, 0.4, 0.4]).directory
    for i, value in enumerate([1.0, 0.98, 0.9, 0.9, 0.5, 0.7]):
        path = where / str(i) / "run.json"
        manifest = json.loads(path.read_text())
        manifest["metrics"]["eval/train_accuracy"] = value
        manifest["digest"] = digest_manifest(manifest)
        path.write_text(json.dumps(manifest))
    sweep = read_sweep(str(where))
    ((tests, of_train),) = (found.series for found in points(sweep))
    assert (tests.metric, of_train.metric) == ("accuracy", "train_accuracy")
    assert [mean[:2] for mean in of_train.means] == [(0, 0.99), (0.2, 0.9), (0.5, 0.6)]
    assert tests.means[0][1] == 0.5
    groups, *_ = sweep_tables(sweep)
    at = groups.columns.index("train_accuracy")
    assert [row[at] for row in groups.rows] == ["0.9", "0.99", "0.6"]
    assert "train_accuracy</li>" in make_page(collect_runs([str(where)]))


def test_two_fields_are_a_map(forge: Forge) -> None:
    pairs = [(r, n) for r in (0.0, 0.5) for n in (1.0, None, 3.0)]
    jobs = [{"model.dropout_rate": r, "train.max_norm": n} for r, n in pairs]
    found = heat_map(forge(jobs, [0.1, 0.2, 0.3, 0.5, None, 0.4]))
    assert found is not None
    assert (found.rows, found.columns) == ("train.max_norm", "model.dropout_rate")
    assert (found.row_values, found.column_values) == (
        ("1.0", "3.0", "null"),
        ("0.0", "0.5"),
    )
    assert found.cells == ((0.1, 0.5), (0.3, 0.4), (0.2, None))
    assert found.heat[0] == (0.0, 1.0)


def test_more_fields_and_searches_are_parallel_lines(forge: Forge) -> None:
    numbers = [(0.1, 1e-4), (0.2, 1e-1), (0.7, 1e-3), (0.8, 1e-2), (0.9, 3e-3)]
    jobs = [{"model.dropout_rate": r, "optimizer.learning_rate": n} for r, n in numbers]
    sweep = forge(jobs, [0.1, 0.2, 0.9, 0.4, 0.5])
    found = parallel(sweep)
    assert heat_map(sweep) is None
    assert found is not None
    assert found.names == ("dropout_rate", "learning_rate", "accuracy")
    best = found.lines[-1]
    assert best[0] == pytest.approx(0.75)
    assert best[1] == pytest.approx(1 / 3)  # of three decades
    assert (best[2], found.heat[-1], found.heat[0]) == (1.0, 1.0, 0.0)


def test_what_a_stranger_swept_over_is_text(forge: Forge) -> None:
    jobs = [
        {"model.note": f"{EVIL}{i % 2}", f"model.{EVIL}": i, "model.x": f"=cmd(){i}"}
        for i in range(6)
    ]
    sweep = forge(jobs, [0.1, 0.2, 0.9, 0.4, 0.5, 0.6])
    text = make_page(collect_runs([str(sweep.directory)]))
    assert "<b>" not in text
    assert "\x1b" not in text
    assert html.escape("<b>$\\frac") in text
    assert len(re.findall("<svg", text)) >= 3
    write_sweep(sweep)
    content = (sweep.directory / "sweep.csv").read_text()
    assert "\x1b" not in content
    assert not re.search(r'(^|,)"?[=@]', content, re.M)

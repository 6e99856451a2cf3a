# SPDX-License-Identifier: Apache-2.0
"""`runner report`: one page that stands alone, and the same tables in the terminal."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.errors import RecordError
from runner.records.digests import digest_config, digest_file, digest_manifest
from runner.records.record import read_record
from runner.report.charts import Chart, Line, draw_chart
from runner.report.collect import collect_runs
from runner.report.comparison import runs_table
from runner.report.curves import read_curves, thin
from runner.report.drawing import STYLES
from runner.report.page import make_page
from runner.report.table import Table
from runner.sinks.text import clean
from runner.sweep.objective import objective_of

pytestmark = pytest.mark.xdist_group("report")

SHORT = ("+experiment=dropout", "train.steps=30", "eval.every=10", "sinks=none")
EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "$\\frac{1}{0}$ & 'q' </style></td>",
)

Process = subprocess.CompletedProcess[str]


def runner(env: dict[str, str], cwd: Path, *args: Any) -> Process:
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
def sweep(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`multirun/dropout` over two seeds."""
    where = tmp_path_factory.mktemp("sweep")
    done = runner(user_env, where, "-m", *SHORT, "seed=0,1")
    assert done.returncode == 0, done.stderr
    return where / "multirun" / "dropout"


@pytest.fixture(scope="module")
def run(sweep: Path) -> Path:
    """Its first run."""
    return min(sweep.glob("*/*/0"))


@pytest.fixture
def report(user_env: dict[str, str], tmp_path: Path) -> Callable[..., Process]:
    return lambda *args: runner(user_env, tmp_path, "report", *args)


def forge(run: Path, to: Path, **changes: Any) -> Path:
    """A copy whose manifest has other fields, and whose digests are right."""
    shutil.copytree(run, to)
    manifest = json.loads((to / "run.json").read_text())
    config = yaml.safe_load((to / "config.yaml").read_text())
    config |= changes.pop("config", {})
    (to / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    manifest |= changes
    manifest["digests"]["config"] = digest_config(config)
    manifest["digests"]["metrics"] = digest_file(to / "metrics.jsonl")
    manifest["digest"] = digest_manifest(manifest)
    (to / "run.json").write_text(json.dumps(manifest))
    return to


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def cells(self) -> str:
        return "\n".join(self.words)


def tables_of(*paths: Path) -> dict[str, Table]:
    (run,) = collect_runs(list(map(str, paths))).read
    return {table.caption: table for table in run.tables}


# --- the command


def test_a_sweep_becomes_a_page(report: Any, sweep: Path, tmp_path: Path) -> None:
    done = report(sweep)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "report.html"
    page = Page((tmp_path / "report.html").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]
    captions = re.findall(
        r"^(runs|sweep|run|metrics|streams|draws|config)$", done.stdout, re.M
    )
    each = ["run", "metrics", "streams", "draws", "config"]
    assert captions == ["sweep", *each, *each]
    for line in done.stdout.splitlines()[:-1]:  # the same cells in both
        for cell in re.split(r"\s{2,}", line.strip()):
            assert cell in page.cells(), cell


def test_the_page_stands_alone(sweep: Path) -> None:
    text = make_page(collect_runs([str(sweep)]))
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "base"}
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"url\((?!#)", text)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("xlink:href") or "#").startswith("#")
        assert not {"src", "href", "action"} & set(attributes)
    policy = next(a for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    )
    assert "prefers-color-scheme: dark" in text


def test_equal_runs_give_equal_bytes(sweep: Path) -> None:
    pages = [make_page(collect_runs([str(sweep)])) for _ in range(2)]
    assert pages[0] == pages[1]


def test_archives_and_a_file_of_ones_own(
    report: Any, run: Path, tmp_path: Path
) -> None:
    packed = shutil.make_archive(str(tmp_path / "run"), "gztar", run)
    (tmp_path / "deep").mkdir()
    done = report(packed, "--out", "deep/page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "deep/page.html"
    assert (tmp_path / "deep/page.html").stat().st_size > 10_000
    assert "\nruns\n" not in done.stdout  # one alone is not compared


def test_a_damaged_run_does_not_hide_the_others(
    report: Any, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write("{}\n")
    done = report(copy, run, "nowhere")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: ") for line in lines)
    assert "nowhere: no such run" in done.stderr
    assert "metrics.jsonl" in done.stderr
    page = Page((tmp_path / "report.html").read_text()).cells()
    assert "can't be read" in page
    assert "metrics.jsonl" in page


def test_where_none_can_be_read_nothing_is_written(
    report: Any, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for args, says in (
        (("nowhere",), "no such run"),
        (("empty",), "empty: no run in it"),
        (("nowhere", "empty"), "1 more can't be read"),
        ((), "required"),
        ((run, "--out", "no/such.html"), "--out: can't be written"),
        ((run, "--out", "empty"), "--out: can't be written: is a directory"),
    ):
        done = report(*args)
        assert (done.returncode, done.stdout) == (2, ""), args
        assert says in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# --- what is found


def test_runs_are_found_three_directories_below(sweep: Path, tmp_path: Path) -> None:
    labels = [run.label for run in collect_runs([str(sweep)]).read]
    assert labels == ["0", "1"]
    assert len(collect_runs([str(sweep), str(sweep / "..")]).read) == 2
    far = tmp_path / "a" / "b" / "c" / "d"
    far.mkdir(parents=True)
    (far / "run.json").write_text("{}")
    with pytest.raises(RecordError, match="no run in it, down to 3"):
        collect_runs([str(tmp_path)])
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(RecordError, match="no run in it"):
        collect_runs([str(tmp_path)])


def test_runs_are_numbered_as_people_count(run: Path, tmp_path: Path) -> None:
    for name in ("10", "9", "1"):
        shutil.copytree(run, tmp_path / name)
    labels = [found.label for found in collect_runs([str(tmp_path)]).read]
    assert labels == ["1", "9", "10"]


def test_a_run_is_shown_once(run: Path, tmp_path: Path) -> None:
    assert len(collect_runs([str(run), f"{run}/", str(run.parent)]).read) == 2
    (tmp_path / "latest").symlink_to(run)
    (tmp_path / "sweep").symlink_to(run.parent)
    found = collect_runs([str(run), str(tmp_path)])
    assert len(found.read) == 1  # links to directories of runs are not followed
    assert len(collect_runs([str(tmp_path / "sweep")]).read) == 2


# --- what is shown


def test_what_is_shown_of_a_run(run: Path) -> None:
    tables = tables_of(run)
    record = read_record(str(run))
    about = dict(tables["run"].rows)
    assert about["status"] == "completed"
    assert about["run id"] == record.manifest["run_id"]
    assert about["guarantee"].startswith("bit-exact: ")
    last = {row[0]: row[1] for row in tables["metrics"].rows}
    values = record.manifest["metrics"]
    assert last == {name: f"{value:.6g}" for name, value in values.items()}
    names = [row[0] for row in tables["streams"].rows]
    assert names == ["params", "dropout", "shuffle", "split"]
    draws = {(r[0], r[2]): r for r in tables["draws"].rows}
    assert draws["train", "Dropout_0"][4:6] == (
        *("1 a step", "step 0: 83ec31e0 e54a2019"),
    )
    assert ("seed", "0") in tables["config"].rows


def test_a_verdict_is_shown(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    verdict = {"level": "key-exact", "reason": "floats differ", "steps": {"n": 1}}
    checks = [{"what": "keys", "equal": True, "compared": "5 keys", "found": ""}]
    checks += [{"what": "train", "equal": False, "found": "at step 3"}, {"what": "x"}]
    (copy / "verdict.json").write_text(json.dumps({**verdict, "checks": checks}))
    assert tables_of(copy)["verdict"].rows == (
        ("level", "key-exact"),
        ("reason", "floats differ"),
        ("keys", "equal, compared 5 keys"),
        ("train", "differs, found at step 3"),
        ("x", "nothing to compare"),
    )


@pytest.mark.parametrize("text", ["3", "[]", '{"checks": 3}', "{", '{"checks": [3]}'])
def test_a_verdict_of_any_shape_is_borne(run: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "verdict.json").write_text(text)
    assert tables_of(copy)["verdict"].rows


def test_runs_are_compared_best_first(run: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for i, best in enumerate((0.2, 0.9, None, 0.5)):
        value = best and {"value": best, "step": i}
        config = {"seed": i, "sinks": i, "trusted": [str(i)]}
        forge(run, sweep / str(i), best=value, config=config)
    table = runs_table(collect_runs([str(sweep)]).read)
    assert table.columns[:4] == ("run", "status", "steps", "seed")
    assert [row[0] for row in table.rows] == ["1", "3", "0", "2"]
    assert [row[3] for row in table.rows] == ["1", "3", "0", "2"]
    assert [row[-2] for row in table.rows] == ["0.9", "0.5", "0.2", ""]


def test_less_is_better_where_it_is() -> None:
    manifest = {"metrics": {"eval/loss": 0.5, "eval/mae": 1.0}}
    found = objective_of({"task": {"name": "regression"}}, manifest)
    assert (found.metric, found.sign, found.last) == ("loss", -1, 0.5)
    config = {"task": {"name": "classification"}, "eval": {"metric": "accuracy"}}
    found = objective_of(config, manifest)
    assert (found.metric, found.sign, found.last, found.best) == (
        *("accuracy", 1, None, None),
    )


def test_a_failed_run_says_why(run: Path, tmp_path: Path) -> None:
    reason = "loss is not finite at step 3"
    forged = forge(run, tmp_path / "failed", status="failed", reason=reason, best=None)
    assert dict(tables_of(forged)["run"].rows)["status"] == f"failed: {reason}"


def test_values_that_are_not_finite_are_gaps(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    odd = {"phase": "train", "step": 30, "loss": None, "accuracy": 1e308}
    (copy / "metrics.jsonl").write_text("\n".join([*rows, json.dumps(odd)]) + "\n")
    forged = forge(copy, tmp_path / "forged")
    metrics = {row[0]: row for row in tables_of(forged)["metrics"].rows}
    assert metrics["train/loss"][1] == "not finite"
    assert "nan" not in make_page(collect_runs([str(forged)])).lower()


def test_everything_of_a_record_is_escaped(
    report: Any, run: Path, tmp_path: Path
) -> None:
    evil = "".join(EVIL)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    step = sum('"train"' in row for row in rows)
    odd = {"phase": "train", "step": step, "loss": 1.0, evil: 2.0}
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "metrics.jsonl").write_text("\n".join([*rows, json.dumps(odd)]) + "\n")
    (copy / "verdict.json").write_text(json.dumps({"reason": evil, "level": [evil]}))
    hazard = dict.fromkeys(("code", "severity", "what", "path", "fix"), evil)
    versions = {evil: evil}
    fields: dict[str, Any] = {
        "experiment": evil,
        "reason": evil,
        "parent": {"run_id": evil, "verb": evil, evil: evil},
    }
    fields |= {"hazards": [{**hazard, "draws": [evil]}], "versions": versions}
    forged = forge(
        copy, tmp_path / f"x{EVIL[4][:8]}", **fields, config={evil: {evil: 1}}
    )
    done = report(forged, run)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for out in (done.stdout, text):
        assert not {"\x1b", "\u202e"} & set(out)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert clean(evil) in page.cells()
    assert html.escape(EVIL[0]) in text
    assert EVIL[0] not in text
    assert all("onerror" not in attributes for _, attributes in page.tags)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 4
    for drawing in drawings:  # no name gets into one, but for its label
        assert "frac" not in drawing.partition(">")[2]


# --- curves and drawings


def test_long_curves_are_thinned() -> None:
    for n in (1, 2, 499, 500, 501, 999, 1000, 12_345):
        steps, values = thin((list(range(n)), [float(i) for i in range(n)]))
        assert len(steps) <= 500
        assert (steps[0], steps[-1]) == (0, n - 1)
        assert [float(step) for step in steps] == values
        gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
        assert len(gaps) <= 1  # every k-th


def test_curves_are_read_by_phase_and_metric() -> None:
    rows = [
        {"phase": "train", "step": 0, "loss": 1.0},
        {"phase": "train", "step": 1, "loss": None},
        {"phase": "eval", "step": 1, "loss": 2.0},
    ]
    assert read_curves(rows) == {
        ("train", "loss"): ([0, 1], [1.0, None]),
        ("eval", "loss"): ([1], [2.0]),
    }


def test_a_drawing_takes_the_pages_color() -> None:
    curve = ([0, 1, 2], [100.0, None, 0.01])
    svg = draw_chart(Chart("t", (Line("l", curve, *STYLES[1]),)))
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert STYLES[1][0] in svg
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "#010203" not in svg
    assert "<metadata" not in svg
    assert draw_chart(Chart("t", ())).endswith("</svg>")

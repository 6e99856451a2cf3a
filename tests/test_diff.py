# SPDX-License-Identifier: Apache-2.0
"""`runner diff`: what differs between two recorded runs, and what it comes from."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from runner.differences.arrays import _compare, _ulps
from runner.differences.config import is_idle
from runner.differences.difference import Differences
from runner.differences.find import find_differences
from runner.differences.leaves import Presence, compare_leaves, list_leaves
from runner.differences.metrics import compare_metrics, compare_states
from runner.differences.text import differences_lines
from runner.errors import RecordError
from runner.ledger import expand
from runner.records.digests import digest_config, digest_manifest, digest_plain
from runner.records.record import read_record

pytestmark = pytest.mark.xdist_group("diff")

SHORT = (
    *("+experiment=dropout", "train.steps=60", "eval.every=20", "sinks=none"),
    "checkpoint.digest_every=50",
)

Run = Callable[..., Path]
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
def ran(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of each set of overrides, made once; a second `twin` is another run."""
    made: dict[Any, Path] = {}
    where = tmp_path_factory.mktemp("runs")

    def run(*overrides: str, twin: str = "", recipe: tuple[str, ...] = SHORT) -> Path:
        key = (recipe, overrides, twin)
        if key not in made:
            path = where / str(len(made))
            out = runner(user_env, where, *recipe, *overrides, f"hydra.run.dir={path}")
            assert out.returncode == 0, out.stderr
            made[key] = path
        return made[key]

    return run


@pytest.fixture
def diff(user_env: dict[str, str], tmp_path: Path) -> Callable[..., Process]:
    return lambda *args: runner(user_env, tmp_path, "diff", *args)


def compare(a: Path, b: Path) -> Differences:
    return find_differences(read_record(str(a)), read_record(str(b)))


def text_of(found: Differences) -> str:
    return "\n".join(differences_lines(found))


def forge(
    run: Path,
    to: Path,
    *,
    manifest: Callable[[Any], None] = lambda m: None,
    config: Callable[[Any], None] = lambda c: None,
    ledger: Callable[[Any], None] = lambda x: None,
) -> Path:
    """A copy of a run in which all digests are right again after a change."""
    shutil.copytree(run, to)
    changed = json.loads((to / "run.json").read_text())
    settings = yaml.safe_load((to / "config.yaml").read_text())
    keys = json.loads((to / "keys/ledger.json").read_text())
    manifest(changed)
    config(settings)
    ledger(keys)
    (to / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (to / "keys/ledger.json").write_text(json.dumps(keys))
    changed["digests"] |= {"config": digest_config(settings)}
    changed["digests"] |= {"keys": digest_plain(keys)}
    changed["digest"] = digest_manifest(changed)
    (to / "run.json").write_text(json.dumps(changed))
    return to


# --- the command


def test_twins_are_equal(ran: Run, diff: Any) -> None:
    done = diff(ran(), ran(twin="again"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Equal: every key, metric and parameter, bit for bit." in done.stdout
    assert "keys: equal, 5 draws" in done.stdout
    assert "metrics: equal in the 63 rows that both have" in done.stdout
    assert "parameters: equal" in done.stdout


def test_a_directory_equals_its_archives(ran: Run, diff: Any, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / "run"), "zip", ran())
    tar = shutil.make_archive(str(tmp_path / "run"), "gztar", ran())
    for archive in (packed, tar):
        done = diff(ran(), archive)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_json_is_one_document(ran: Run, diff: Any) -> None:
    done = diff(ran(), ran("optimizer.learning_rate=0.002"), "--json")
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        *("equal", "summary", "parts", "runs", "outcome", "config", "environment"),
        *("data", "keys", "metrics", "states", "params", "outputs"),
    ]
    assert found["equal"] is False
    assert found["parts"] == {
        **dict.fromkeys(("outcome", "environment", "data", "keys", "outputs"), True),
        **dict.fromkeys(("config", "metrics", "states", "params"), False),
    }
    rate = {"path": "optimizer.learning_rate", "presence": "both"}
    assert found["config"] == {
        "matters": [{**rate, "a": 0.001, "b": 0.002}],
        "idle": [],
    }
    assert found["summary"].startswith(
        "Likely cause: optimizer.learning_rate (0.001 and 0.002). "
        "The numbers part at train step 1 (loss)."
    )
    assert found["runs"]["a"]["run_id"] != found["runs"]["b"]["run_id"]


ALTERED = {
    "metrics.jsonl": "metrics.jsonl",
    "states.jsonl": "states.jsonl",
    "config.yaml": "config.yaml",
    "keys/ledger.json": "keys/ledger.json",
    "run.json": "run.json",
    "checkpoints/60.json": "checkpoints/60.json",
    "checkpoints/60/default/manifest.ocdbt": "checkpoints/60/default/manifest.ocdbt",
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_file_is_named(ran: Run, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(ran(), tmp_path / "copy")
    content = (copy / name).read_bytes()
    spoilt = content.replace(b"0", b"1", 1) if b"0" in content else content + b"x"
    assert spoilt != content
    (copy / name).write_bytes(spoilt)
    with pytest.raises(RecordError, match=name.replace(".", r"\.")):
        compare(ran(), copy)


def test_wrong_usage_and_damage_exit_2(ran: Run, diff: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(ran(), tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"phase": "train", "step": 60, "loss": 0.0}\n')
    for args, says in (
        ((copy, ran()), "metrics.jsonl"),
        ((ran(), tmp_path / "nowhere"), "no such run"),
        ((ran(),), "required"),
        ((ran(), ran(), ran()), "unrecognized"),
    ):
        done = diff(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_misshapen_record_is_refused_in_one_line(
    ran: Run, diff: Any, tmp_path: Path
) -> None:
    def spoil(ledger: Any) -> None:
        ledger["draws"] = [{"phase": 3}]

    forged = forge(ran(), tmp_path / "forged", ledger=spoil)
    done = diff(ran(), forged)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "damaged" in done.stderr


# --- pairs of real runs


def test_another_seed(ran: Run) -> None:
    found = compare(ran(), ran("seed=1"))
    assert [leaf.path for leaf in found.config.matters] == ["seed", "rng.seed"]
    assert found.summary.startswith("Likely cause: seed (0 and 1). ")
    names = [stream.name for stream in found.keys.streams]
    assert names == ["params", "dropout", "shuffle"]  # `split` has its own seed
    assert len(found.keys.others) == 5
    assert found.equal["data"]
    assert found.states.batches == 50  # `shuffle` orders other rows
    assert found.metrics.first.step == 0


def test_the_example_of_a_key_is_the_ledgers(ran: Run) -> None:
    runs = [read_record(str(path)) for path in (ran(), ran("seed=1"))]
    draw = find_differences(*runs).keys.others[3]
    place = ("train", "dropout", ("Dropout_0",), 1, 0)
    assert (draw.phase, draw.stream, draw.path, draw.call, draw.step) == place
    for record, words in zip(runs, draw.keys or (), strict=True):
        entry = next(expand(record.ledger, record.ledger["draws"][3], step=0))
        assert entry["key"] == words
    assert "83ec31e0 e54a2019" in text_of(compare(ran(), ran("seed=1")))


def test_another_learning_rate(ran: Run) -> None:
    found = compare(ran(), ran("optimizer.learning_rate=0.002"))
    assert found.equal["keys"]
    assert found.equal["data"]
    assert found.states.batches is None
    assert (found.states.state, found.states.after) == (50, None)
    assert {m.step for m in found.metrics.metrics if m.phase == "train"} == {1}
    assert {m.step for m in found.metrics.metrics if m.phase == "eval"} == {20}
    assert (found.params.step, found.params.leaves, found.params.differing) == (
        60,
        6,
        6,
    )
    assert found.params.first == "params/Dense_0/bias"


def test_params_are_compared_as_arrays(ran: Run) -> None:
    from runner.records.restore import restore_leaves

    pair = (ran(), ran("optimizer.learning_rate=0.002"))
    found = compare(*pair).params
    a, b = (restore_leaves(read_record(str(path)).files, 60) for path in pair)
    sizes = {
        name: float(np.abs(a[name].astype(float) - b[name].astype(float)).max())
        for name in a
        if name.startswith("params/")
    }
    assert found.largest == max(sizes.values())
    assert sizes[str(found.largest_leaf)] == found.largest


def test_another_dropout_rate(ran: Run) -> None:
    found = compare(ran(), ran("model.dropout_rate=0.3"))
    assert found.summary == (
        "Likely cause: model.dropout_rate (0.5 and 0.3). "
        "The numbers part at train step 0 (loss)."
    )
    assert found.equal["keys"]


def test_a_layer_less_draws_less(ran: Run) -> None:
    found = compare(ran(), ran("model.features=[512]"))
    lost = [draw for draw in found.keys.draws if draw.presence is Presence.A]
    assert [draw.path for draw in lost] == [("Dense_2",), ("Dropout_1",)]
    assert found.keys.others == ()
    assert found.params.missing == {
        "params/Dense_2/bias": Presence.A,
        "params/Dense_2/kernel": Presence.A,
    }
    assert found.params.shapes is not None
    shapes = found.params.shapes["params/Dense_1/kernel"]
    assert shapes == ("float32[512, 256]", "float32[512, 10]")


def test_another_implementation(ran: Run) -> None:
    found = compare(ran(), ran("rng.impl=rbg"))
    assert found.summary.startswith(
        'Likely cause: another random generator: rng.impl ("threefry2x32" and "rbg").'
    )
    changed = {leaf.path for leaf in found.environment}
    assert {"rng.impl", "rng.canary.bits", "rng.canary.normal"} <= changed
    assert len(found.keys.others) == 5
    assert all(len(draw.keys[1]) == 4 for draw in found.keys.others if draw.keys)


def test_another_split_is_other_data(ran: Run) -> None:
    found = compare(ran(), ran("rng.streams.split.seed=1"))
    assert not found.equal["data"]
    assert "data: other rows or values" in text_of(found)
    assert found.summary.startswith("Likely cause: rng.streams.split.seed (0 and 1)")
    assert [stream.name for stream in found.keys.streams] == ["split"]
    assert found.keys.draws == ()  # the split is drawn on the host


def test_another_batch_size_draws_other_shapes(ran: Run) -> None:
    found = compare(ran(), ran("data.batch_size=64"))
    assert found.keys.others == ()
    assert [draw.path for draw in found.keys.draws] == [("Dropout_0",), ("Dropout_1",)]
    assert "same key, other draws" in text_of(found)
    assert "random_bits [64, 512]" in text_of(found)


def test_a_longer_run_is_equal_as_far_as_both_go(ran: Run, diff: Any) -> None:
    found = compare(ran(), ran("train.steps=90"))
    assert found.summary == (
        "The runs differ in train.steps (60 and 90). "
        "All is equal as far as both runs go."
    )
    assert found.metrics.metrics == ()
    assert found.metrics.only_a == {}
    assert found.metrics.only_b == {"eval": (80, 90, 2), "train": (60, 89, 30)}
    assert [leaf.path for leaf in found.outcome] == ["steps"]
    assert found.params.equal is False
    assert found.params.step is None
    assert diff(ran(), ran("train.steps=90")).returncode == 1


def test_what_can_not_matter_does_not_count(ran: Run, diff: Any) -> None:
    other = ran("train.steps_per_call=7", "checkpoint.every=30")
    found = compare(ran(), other)
    assert {leaf.path for leaf in found.config.idle} == {
        *("train.steps_per_call", "checkpoint.every")
    }
    assert found.config.matters == ()
    done = diff(ran(), other)
    assert done.returncode == 0
    assert "config that can't change a bit: 2 leaves differ" in done.stdout


def test_microbatches_add_keys(ran: Run) -> None:
    found = compare(ran(), ran("train.accumulation_steps=2"))
    draw = found.keys.others[0]
    assert draw.path == ("Dropout_0",)
    assert draw.index == {}
    assert draw.keys is not None
    assert draw.keys[1] is None  # each of them has an index there
    assert "step), microbatch)" in str(draw.rules[1])


def test_probes_differ_in_outputs(ran: Run) -> None:
    recipe = ("+experiment=rng/submodules", "sinks=none")
    found = compare(ran(recipe=recipe), ran("seed=1", recipe=recipe))
    assert found.outputs.equal is False
    assert found.outputs.differing == found.outputs.leaves > 0
    assert "outputs are not" in found.summary
    twin = compare(ran(recipe=recipe), ran(recipe=recipe, twin="again"))
    assert twin.are_equal
    assert twin.outputs.equal is True


# --- forged records


def test_another_generator_under_the_same_settings(ran: Run, tmp_path: Path) -> None:
    def spoil(manifest: Any) -> None:
        manifest["rng"]["canary"]["bits"] = "00"
        manifest["versions"]["jax"] = "9.9"

    found = compare(ran(), forge(ran(), tmp_path / "forged", manifest=spoil))
    assert found.summary.startswith("The results are equal bit for bit, though")
    assert 'another random generator: versions.jax ("0.10' in found.summary
    assert not found.are_equal


def test_other_versions_are_named_last(ran: Run, tmp_path: Path) -> None:
    def spoil(manifest: Any) -> None:
        manifest["platform"]["jax_config"]["jax_enable_x64"] = True
        manifest["git"]["commit"] = "f00"

    found = compare(ran("seed=1"), forge(ran("seed=1"), tmp_path / "1", manifest=spoil))
    assert "platform.jax_config.jax_enable_x64 (false and true)" in found.summary
    assert "git" not in found.summary
    both = compare(ran(), tmp_path / "1")
    assert both.summary.startswith("Likely cause: seed (0 and 1).")


def test_floats_that_part_without_a_cause(ran: Run, tmp_path: Path) -> None:
    forged = shutil.copytree(ran(), tmp_path / "0")
    lines = (forged / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[7])
    row["loss"] = np.nextafter(np.float32(row["loss"]), np.float32(9)).item()
    lines[7] = json.dumps(row)
    (forged / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def settle(manifest: Any) -> None:
        from runner.records.digests import digest_file

        manifest["digests"]["metrics"] = digest_file(forged / "metrics.jsonl")

    found = compare(ran(), forge(forged, tmp_path / "1", manifest=settle))
    assert found.summary == (
        "Nothing differs that a result should depend on. "
        "The numbers part at train step 7 (loss)."
    )
    (metric,) = found.metrics.metrics
    assert (metric.steps, metric.largest_step) == (1, 7)
    assert 0 < metric.difference < 1e-6


def test_keys_alone(ran: Run, tmp_path: Path) -> None:
    def spoil(ledger: Any) -> None:
        ledger["draws"][4]["derivation"][-1]["value"] += 1
        ledger["draws"][3]["derivation"][-1]["why"] = "other words"

    found = compare(ran(), forge(ran(), tmp_path / "forged", ledger=spoil))
    assert [draw.path for draw in found.keys.others] == [("Dropout_1",)]
    assert "other keys at 1 draw, first train dropout Dropout_1" in found.summary


def test_what_a_record_says_is_escaped(ran: Run, diff: Any, tmp_path: Path) -> None:
    evil = "\x1b[2J\u202egnp\r\n"

    def spoil(settings: Any) -> None:
        settings["model"][evil] = evil

    def retitle(manifest: Any) -> None:
        manifest["experiment"] = manifest["status"] = "completed"
        manifest["experiment"] = evil

    forged = forge(ran(), tmp_path / "evil", config=spoil, manifest=retitle)
    done = diff(ran(), forged)
    assert done.returncode == 1
    assert not {"\x1b", "\u202e", "\r"} & set(done.stdout)
    assert r"\x1b[2J\u202egnp\r\n" in done.stdout
    assert json.loads(diff(ran(), forged, "--json").stdout)["equal"] is False


# --- parts


def test_leaves_tell_absent_from_null() -> None:
    a, b = {"x": None, "y": {"z": [1, 2]}}, {"y": {"z": [1, 3, 4]}}
    found = [
        (leaf.path, leaf.presence, leaf.a, leaf.b) for leaf in compare_leaves(a, b)
    ]
    assert found == [
        ("x", Presence.A, None, None),
        ("y.z[1]", Presence.BOTH, 2, 3),
        ("y.z[2]", Presence.B, None, 4),
    ]


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (1, True), ("1", 1), (0.0, -0.0)])
def test_values_of_other_kinds_differ(a: Any, b: Any) -> None:
    assert len(compare_leaves({"x": a}, {"x": b})) == 1
    assert compare_leaves({"x": a}, {"x": a}) == ()


def test_an_empty_mapping_that_is_filled_says_it_once() -> None:
    (leaf,) = compare_leaves({"x": {}}, {"x": {"y": 1}})
    assert (leaf.path, leaf.presence) == ("x.y", Presence.B)
    (leaf,) = compare_leaves({"x": {}}, {})
    assert (leaf.path, leaf.presence, leaf.a) == ("x", Presence.A, {})


def test_the_order_of_keys_counts() -> None:
    a = {"streams": {"x": {"p": 1}, "y": {"p": 1}}}
    b = {"streams": {"y": {"p": 1}, "x": {"p": 1}}}
    (leaf,) = compare_leaves(a, b)
    assert (leaf.path, leaf.a, leaf.b) == ("streams (order)", ["x", "y"], ["y", "x"])


def test_paths_of_odd_names_do_not_meet() -> None:
    assert set(list_leaves({"a.b": 1, "a": {"b": 2}})) == {"['a.b']", "a.b"}


@pytest.mark.parametrize(
    "path", ["sinks.wandb.mode", "checkpoint.every", "rng.allow[0]"]
)
def test_idle_leaves(path: str) -> None:
    assert is_idle(path)
    assert not is_idle(f"model.{path}")
    assert not is_idle(f"x{path}")


def rows(*values: Any, phase: str = "train") -> list[dict[str, Any]]:
    return [{"phase": phase, "step": i, "loss": v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [(0.0, -0.0, 0.0), (1.0, None, None), (1.0, 1.5, 0.5), (1e308, -1e308, None)],
)
def test_metrics_are_compared_by_bits(a: Any, b: Any, difference: Any) -> None:
    found = compare_metrics(rows(1.0, a), rows(1.0, b))
    assert found.first is not None
    assert (found.first.step, found.first.difference) == (1, difference)
    assert compare_metrics(rows(1.0, a), rows(1.0, a)).metrics == ()


def test_metrics_part_first_in_time() -> None:
    a = [*rows(1.0, 1.0), *rows(5.0, 5.0, phase="eval")]
    b = [*rows(1.0, 3.0), *rows(5.0, 6.0, phase="eval")]
    found = compare_metrics(a, b)
    assert [m.phase for m in found.metrics] == ["eval", "train"]  # before the step
    largest = compare_metrics(rows(1.0, 2.0, 9.0), rows(1.5, 5.0, 9.25)).first
    assert largest is not None
    assert (largest.step, largest.steps) == (0, 3)
    assert (largest.largest, largest.largest_step) == (3.0, 1)


def test_metrics_of_one_run_alone() -> None:
    found = compare_metrics(rows(1.0, 2.0, 3.0), rows(1.0))
    assert (found.common, found.only_a, found.only_b) == (1, {"train": (1, 2, 2)}, {})
    b = [{**row, "extra": 1.0} for row in rows(1.0)]
    (metric,) = compare_metrics(rows(1.0), b).metrics
    assert (metric.metric, metric.presence) == ("extra", Presence.B)


def test_states_count_batches_as_far_as_their_chain_is_one() -> None:
    def states(*rows: tuple[int, str, str]) -> list[dict[str, Any]]:
        return [dict(zip(("step", "batches", "state"), r, strict=True)) for r in rows]

    a = states((5, "x", "s"), (10, "y", "t"), (15, "z", "u"))
    assert compare_states(a, a) == compare_states(a, a[:3])
    found = compare_states(a, states((5, "x", "s"), (10, "y", "v"), (15, "q", "w")))
    assert (found.batches, found.state, found.after) == (15, 10, 5)
    chained = states((5, "x", "s"), (12, "other chain", "w"), (15, "q", "u"))
    found = compare_states(a, chained)
    assert (found.common, found.batches, found.state) == (2, None, None)


def test_arrays_are_compared_by_bits() -> None:
    one = np.float32(1.0)
    a = {"p": np.array([one, one]), "q": np.zeros(3, np.float32), "r": np.zeros(2)}
    b = {"p": np.array([one, np.nextafter(one, np.float32(2))]), "q": -a["q"]}
    b["s"] = np.zeros(2)
    found = _compare(a, b, step=4)
    assert (found.leaves, found.differing, found.first) == (2, 2, "p")
    assert (found.largest, found.largest_leaf, found.ulps) == (2.0**-23, "p", 1)
    assert found.missing == {"r": Presence.A, "s": Presence.B}
    found = _compare({"p": np.zeros(3)}, {"p": np.zeros((3, 1))}, step=4)
    assert found.shapes == {"p": ("float64[3]", "float64[3, 1]")}
    assert (found.equal, found.differing) == (False, 1)
    assert _compare(a, a, step=None).equal


def test_ulps_cross_zero() -> None:
    least = np.float32(1e-45)
    assert _ulps(np.array([least]), np.array([-least])) == 2
    assert _ulps(np.array([np.float32(np.nan)]), np.array([least])) is None
    assert _ulps(np.zeros(1), np.ones(1)) is None


def test_no_jax_before_it_is_needed(user_env: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys, runner.cli.diff, runner.cli.report;"
        "assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=user_env, check=True)


def test_archives_are_not_unpacked_for_good(ran: Run, tmp_path: Path) -> None:
    """The checkpoint of an archive is restored from a copy that is gone after."""
    packed = Path(shutil.make_archive(str(tmp_path / "x"), "zip", ran("seed=1")))
    assert zipfile.is_zipfile(packed)
    found = compare(ran(), packed)
    assert found.params.differing == 6
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]

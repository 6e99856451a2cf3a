# SPDX-License-Identifier: Apache-2.0
"""`hydra/sweeper=optuna`: what is searched, asked, told, resumed and refused.

Most searches here have a launcher that computes the objective itself.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

import hydra_plugins.runner.optuna as plugin
from runner.errors import ConfigError, RunFailedError
from runner.sweep.jobs import Status

optuna = pytest.importorskip("optuna", reason="needs the extra: pip install .[optuna]")
from hydra_plugins.runner import _optuna_core as core  # noqa: E402
from hydra_plugins.runner._space import parse_space  # noqa: E402

pytestmark = pytest.mark.xdist_group("optuna")

RATE = "optimizer.learning_rate"
LOG = f"{RATE}=tag(log,interval(1e-5,1e-1))"
COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL

Objective = Callable[[dict[str, str], int], Any]


class Launcher:
    """Computes what jobs return; remembers what it was given."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.jobs: dict[int, dict[str, str]] = {}
        self.batches: list[int] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        self.batches.append(len(jobs))
        returned = []
        for number, words in enumerate(jobs, initial_job_idx):
            values = dict(word.split("=", 1) for word in words)
            self.jobs[number] = values
            ended = JobReturn(status=JobStatus.COMPLETED)
            try:
                ended.return_value = self.objective(values, number)
            except ValueError as error:
                ended.return_value, ended.status = error, JobStatus.FAILED
            returned.append(ended)
        return returned


def by_rate(values: dict[str, str], number: int) -> float:
    return -((math.log10(float(values[RATE])) + 3) ** 2)


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Any]:
    """`search(*overrides, objective=..., option=...)`: the launcher and the study."""

    def run(*words: str, objective: Objective = by_rate, **options: Any) -> Any:
        given = {
            "n_trials": 6,
            "n_jobs": 2,
            "repeats": 1,
            "max_failures": 10,
            "storage": None,
            "study_name": None,
            "params": None,
            "pruner": None,
            "direction": None,
            "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 0},
            **options,
        }
        sweep = {"dir": str(tmp_path / "s")}
        config = OmegaConf.create(
            {
                "seed": 5,
                "task": {"name": "classification"},
                "eval": {"metric": None},
                "hydra": {"sweep": sweep, "sweeper": given},
            }
        )
        launcher = Launcher(objective)
        core.check_options(config.hydra.sweeper)
        sweeper = SimpleNamespace(
            options=config.hydra.sweeper,
            config=config,
            hydra_context=SimpleNamespace(config_loader=None),
            validate_batch_is_legal=lambda batch: None,
            launcher=launcher,
        )
        core.search(sweeper, list(words))
        return launcher, study_at(tmp_path)

    return run


def study_at(tmp_path: Path) -> Any:
    return optuna.load_study(
        study_name="search", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}"
    )


# --- what is searched over


@pytest.mark.parametrize(
    ("word", "kind", "fields"),
    [
        ("a=interval(0,0.5)", "Float", {"low": 0.0, "high": 0.5, "log": False}),
        ("a=tag(log,interval(1e-4,1e-1))", "Float", {"low": 1e-4, "log": True}),
        ("a=int(interval(1,8))", "Int", {"low": 1, "high": 8, "log": False}),
        ("a=tag(log,int(interval(1,512)))", "Int", {"high": 512, "log": True}),
        ("a=range(1,10,2)", "Int", {"low": 1, "high": 9, "step": 2}),
        ("a=range(9,0,-4)", "Int", {"low": 1, "high": 9, "step": 4}),
        ("a=range(0,1,0.25)", "Float", {"low": 0.0, "high": 0.75, "step": 0.25}),
        ("a=adam,sgd", "Categorical", {"choices": ("adam", "sgd")}),
        ("a=[1,2],[3]", "Categorical", {"choices": ("[1,2]", "[3]")}),
        ("a=shuffle(range(2))", "Categorical", {}),
    ],
)
def test_the_override_grammar_is_the_search_space(
    word: str, kind: str, fields: dict[str, Any]
) -> None:
    options = {"params": {"a": "1", "b": "choice(1,2)"}, "repeats": 1}
    context = SimpleNamespace(config_loader=None)
    space = parse_space(
        SimpleNamespace(options=options, hydra_context=context), [word, "+c=3"]
    )
    assert list(space.distributions) == ["a", "b"]
    assert type(space.distributions["a"]).__name__ == f"{kind}Distribution"
    for name, value in fields.items():
        assert getattr(space.distributions["a"], name) == value
    assert space.fixed == ("+c=3",)
    (job,) = space.jobs_of({"a": 7, "b": "2"}, repeats=1)
    assert job == ("a=7", "b=2", "+c=3")


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        (["seed=1"], {}, r"^hydra\.sweeper\.params: nothing to search over"),
        (["a=range(0)"], {}, r"^a: an empty sweep \(got 'range\(0\)'\)"),
        (["a=interval(2,1)"], {}, r"^a: can't be searched over .*got 'interval"),
        (["a=tag(log,interval(0,1))"], {}, r"^a: can't be searched over"),
        (["seed=1,2"], {}, r"^seed: a seed is nothing to search over\. For jobs"),
        ([LOG], {"n_trials": 0}, r"^hydra\.sweeper\.n_trials: must be 1 or more"),
        ([LOG], {"n_jobs": -1}, r"^hydra\.sweeper\.n_jobs: must be 1 or more"),
        ([LOG], {"direction": "up"}, r"^hydra\.sweeper\.direction: no such"),
        ([LOG], {"storage": "x://y"}, r"^hydra\.sweeper\.storage: can't be opened"),
        (
            [LOG],
            {"sampler": {"_target_": "os.system"}},
            r"^hydra\.sweeper\.sampler: must be one of Optuna's",
        ),
        (
            [LOG],
            {"sampler": {"_target_": "optuna.samplers.TPESampler", "sed": 1}},
            r"^hydra\.sweeper\.sampler\.sed: unknown key",
        ),
        (
            [LOG],
            {"sampler": {"_target_": "optuna.samplers.GridSampler"}},
            rf"^{RATE}: a grid has no place for an interval",
        ),
        (
            [LOG],
            {"repeats": 2, "pruner": {"_target_": "optuna.pruners.MedianPruner"}},
            r"^hydra\.sweeper\.pruner: prunes single jobs",
        ),
    ],
)
def test_what_is_refused(search: Any, words: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        search(*words, **options)


# --- what is asked and told


def test_batches_go_to_the_launcher(search: Any) -> None:
    launcher, study = search(LOG, "train.steps=3", n_trials=7, n_jobs=3)
    assert launcher.batches == [3, 3, 1]
    assert list(launcher.jobs) == list(range(7))
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE  # accuracy
    for trial in study.trials:
        job = launcher.jobs[trial.number]
        assert job == {RATE: str(trial.params[RATE]), "train.steps": "3"}
        assert trial.value == by_rate(job, 0)


def test_a_launcher_may_fork(search: Any, tmp_path: Path) -> None:
    """SQLite's connections must not be carried into another process."""
    seen: list[bool] = []

    def look(values: dict[str, str], number: int) -> float:
        files = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        seen.append(str(tmp_path / "s" / "study.db") in files)
        return by_rate(values, number)

    _, study = search(LOG, objective=look)
    assert seen == [False] * 6
    assert [trial.state for trial in study.trials] == [COMPLETE] * 6


def test_what_is_no_number_is_a_failed_trial(search: Any) -> None:
    def odd(values: dict[str, str], number: int) -> Any:
        if number == 3:
            raise ValueError("no such thing")
        return [math.nan, None, math.inf, 0, "x", 0.25][number]

    _, study = search(LOG, objective=odd)
    assert [trial.state for trial in study.trials] == [FAIL] * 5 + [COMPLETE]
    assert study.best_value == 0.25


def test_a_search_that_only_fails_ends(search: Any, tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="4 trials failed one after another"):
        search(LOG, objective=lambda *_: math.nan, n_trials=99, max_failures=3)
    assert len(study_at(tmp_path).trials) == 4
    with pytest.raises(RunFailedError, match=r"no trial of .* \(nan came of it\)"):
        search(LOG, objective=lambda *_: math.nan, n_trials=5)


def test_a_launcher_that_raises_fails_its_batch(search: Any) -> None:
    def raises(values: dict[str, str], number: int) -> float:
        if number == 1:
            raise OSError("node lost")
        return 1.0

    _, study = search(LOG, objective=raises, n_trials=4)
    assert [trial.state for trial in study.trials] == [FAIL, FAIL, COMPLETE, COMPLETE]


def test_repeats_are_seeds_and_a_mean(search: Any) -> None:
    launcher, study = search(
        LOG, objective=lambda values, _: float(values["seed"]), repeats=3, n_trials=2
    )
    assert launcher.batches == [6]
    assert [job["seed"] for job in launcher.jobs.values()] == ["5", "6", "7"] * 2
    assert study.trials[1].user_attrs["jobs"] == [3, 4, 5]
    assert study.best_value == 6.0


def test_a_grid_is_searched_whole_and_once(search: Any) -> None:
    grid = {"_target_": "optuna.samplers.GridSampler", "seed": 0}
    launcher, study = search(
        "a=1,x", "b=range(0,3)", objective=lambda *_: 1.0, sampler=grid, n_trials=99
    )
    jobs = {(job["a"], job["b"]) for job in launcher.jobs.values()}
    assert jobs == {(a, b) for a in "1x" for b in "012"}
    assert len(study.trials) == 6


# --- again


def test_a_search_that_goes_on_asks_what_one_at_once_asks(
    search: Any, tmp_path: Path
) -> None:
    whole, _ = search(LOG, n_trials=16)
    (tmp_path / "s").rename(tmp_path / "whole")
    first, _ = search(LOG, n_trials=4)
    rest, study = search(LOG, n_trials=16)
    assert list(rest.jobs) == list(range(4, 16))
    assert {**first.jobs, **rest.jobs} == whole.jobs
    assert len({trial.params[RATE] for trial in study.trials}) == 16
    again, _ = search(LOG, n_trials=16)
    assert again.jobs == {}


def test_what_was_killed_is_asked_again(search: Any, tmp_path: Path) -> None:
    def killed(values: dict[str, str], number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        search(LOG, objective=killed)
    open_ = [trial.params for trial in study_at(tmp_path).trials[2:]]
    launcher, study = search(LOG)
    assert [trial.state for trial in study.trials] == [
        *(COMPLETE, COMPLETE, FAIL, FAIL),
        *[COMPLETE] * 4,
    ]
    assert [trial.params for trial in study.trials[4:6]] == open_
    assert list(launcher.jobs) == [4, 5, 6, 7]  # their directories are new ones


def test_what_had_completed_before_the_kill_is_told(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(values: dict[str, str], number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        search(LOG, objective=killed)
    ended = {"0": (Status.COMPLETED, 0.5), "1": (Status.FAILED, None)}

    def read(directory: Path, *, label: str) -> Any:
        status, value = ended[label]
        last = SimpleNamespace(last=value)
        return SimpleNamespace(status=status, reason="diverged", objective=last)

    monkeypatch.setattr(core, "read_job", read)
    launcher, study = search(LOG, n_trials=2)
    assert launcher.jobs == {}
    assert [trial.state for trial in study.trials] == [COMPLETE, FAIL]
    assert study.best_value == 0.5


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        ([LOG, "train.steps=3"], {}, r"holds a search with other overrides \(train\.s"),
        ([LOG], {"direction": "minimize"}, "is there already, and says maximize"),
        (["a=1,2,3"], {}, "is not what was searched here before"),
    ],
)
def test_another_search_is_kept_apart(
    search: Any, words: Any, options: Any, says: str
) -> None:
    search("a=1,2", LOG, n_trials=2)
    words = [*words, "a=1,2"] if not words[0].startswith("a=") else words
    with pytest.raises(ConfigError, match=says):
        search(*words, n_trials=4, **options)


def test_two_searches_share_no_directory(search: Any) -> None:
    def second(values: dict[str, str], number: int) -> float:
        with pytest.raises(ConfigError, match="another search is running in it"):
            search(LOG)
        return 1.0

    search(LOG, objective=second, n_trials=1)


# --- as a plugin, and with the runner


def test_hydra_finds_it_and_it_is_light(user_env: dict[str, str]) -> None:
    found = [cls.__name__ for cls in Plugins.instance().discover(Sweeper)]
    assert plugin.OptunaSweeper.__name__ in found
    code = (
        "import sys, hydra_plugins.runner.optuna;"
        "print(*{'optuna', 'jax', 'numpy', 'runner'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=user_env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


def test_without_the_extra_one_line_says_so(runner: Any, tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ImportError")
    (tmp_path / "here").mkdir()
    done = runner(
        *("-m", "+experiment=dropout", "hydra/sweeper=optuna", LOG),
        cwd=tmp_path / "here",
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: hydra/sweeper: Optuna is not installed (got 'optuna'). "
        "Install the extra: pip install 'jax-runner[optuna]'.\n"
    )
    assert list((tmp_path / "here").iterdir()) == []


def test_a_search_of_runs_prunes_and_resumes(runner: Any, tmp_path: Path) -> None:
    """Two rates that learn, then one that diverges and two that are hopeless."""
    args = (
        *("-m", "+experiment=dropout", "hydra/sweeper=optuna", "sinks=none"),
        *("train.steps=40", "eval.every=10", "train.steps_per_call=10"),
        *("hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=median"),
        *("hydra.sweep.dir=s", f"{RATE}=choice(1e20,1e-7,2e-3,3e-3,1e-6)"),
        "hydra.sweeper.pruner.n_startup_trials=1",
    )
    first = runner(*args, "hydra.sweeper.n_trials=2")
    assert first.returncode == 0, first.stderr
    done = runner(*args)
    assert done.returncode == 0, done.stderr
    study = study_at(tmp_path)
    assert len(study.trials) == 5
    for trial in study.trials:
        run = json.loads((tmp_path / "s" / str(trial.number) / "run.json").read_text())
        if trial.params[RATE] == "1e+20":
            assert (trial.state, run["status"]) == (FAIL, "failed")
        elif trial.state == COMPLETE:
            assert run["status"] == "completed"
            assert trial.value == run["metrics"]["eval/accuracy"]
        else:
            assert trial.state == optuna.trial.TrialState.PRUNED
            assert run["status"] == "interrupted"
            assert run["reason"].startswith("pruned at step ")
            assert run["steps"] < 40
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    assert done.stdout.splitlines()[-1] == "s"
    best = (tmp_path / "s" / "optimization_results.yaml").read_text()
    assert OmegaConf.create(best).best_trial == study.best_trial.number
    said = runner(*args, "train.steps=50")
    assert said.returncode == 2
    assert said.stderr.startswith("error: hydra.sweep.dir: holds a search with other")
    assert said.stdout == ""

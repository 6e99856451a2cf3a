# SPDX-License-Identifier: Apache-2.0
"""`experiment/paper`: its sweeps stand in their files, and go where the paper's go."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from runner.compile import compile_run
from runner.loop import train
from runner.program import Program
from runner.records.events import EvalRecord

REPOSITORY = Path(__file__).parents[1]
REAL = Path(os.environ.get("RUNNER_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
MNIST = REAL / "mnist"
OFF = ("0.0", "null")


@pytest.mark.promotes
@pytest.mark.parametrize("name", ["dropout_rate", "regularisers"])
def test_each_is_a_run_alone(name: str, make_spec: Any, small_mnist: list[str]) -> None:
    program = compile_run(make_spec(f"+experiment=paper/{name}", *small_mnist))
    assert isinstance(program, Program)
    assert program.eval_sets == {"": range(20), "train_": range(20, 70)}
    assert program.baked == ()


def test_rates_share_a_program(runner: Any, small_mnist: list[str]) -> None:
    done = runner("plan", "-m", "+experiment=paper/dropout_rate", *small_mnist)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30 jobs, 1 compiled program\n")


def test_regularisers_are_the_rows_of_a_table(
    runner: Any, small_mnist: list[str]
) -> None:
    once = "hydra.sweeper.repeats=1"
    done = runner("-m", "+experiment=paper/regularisers", *small_mnist, once)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    at = lines.index("accuracy, the best first")
    columns = re.split(" {2,}", lines[at + 1].strip())
    assert set(columns) == {
        *("model.dropout_rate", "model.input_rate", "model.sparsity"),
        *("optimizer.learning_rate", "train.max_norm", "train.l1", "train.l2"),
        *("accuracy", "train_accuracy", "job"),
    }
    cells = [re.split(" {2,}", line.strip()) for line in lines[at + 2 : at + 8]]
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    names = ("model.dropout_rate", "model.sparsity", "train.max_norm")
    used = [
        {name for name in (*names, "train.l1", "train.l2") if row[name] not in OFF}
        for row in rows
    ]
    dropout, sparsity, max_norm = ({name} for name in names)
    l1, l2 = {"train.l1"}, {"train.l2"}
    table = (l2, l2 | l1, l2 | sparsity, max_norm, dropout | l2, dropout | max_norm)
    assert sorted(map(sorted, used)) == sorted(map(sorted, table))


@pytest.mark.promotes
@pytest.mark.skipif(
    not MNIST.is_dir(), reason=f"no {MNIST}: set RUNNER_DATA_DIR to where mnist/ is"
)
def test_too_much_dropout_underfits(make_spec: Any) -> None:
    """The left end of the paper's figure, on the rows that are learned from."""
    accuracy = {}
    for rate in (0.5, 0.95):
        spec = make_spec(
            *("+experiment=paper/dropout_rate", f"data.path={MNIST}"),
            *("data.train_rows=500", "train.steps=200", "eval.every=null"),
            *("model.features=[64,64]", f"model.dropout_rate={rate}"),
        )
        (last,) = (e for e in train(compile_run(spec)) if isinstance(e, EvalRecord))
        accuracy[rate] = last.metrics["train_accuracy"]
    assert accuracy[0.5] > accuracy[0.95] + 0.2

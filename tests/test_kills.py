# SPDX-License-Identifier: Apache-2.0
"""A few of the kills of `make faults`, which has hundreds and every config."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kills import Bench, Moment, Reference, make_reference, try_it

PAIRS = {
    "dropout": (Moment.TRAINING, Moment.RESUMING, Moment.RECORD),
    "carry": (Moment.SAVING, Moment.ENDING),
    "patience": (Moment.VOUCHING,),
}


@pytest.fixture(scope="module")
def reference_of(
    user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What an uninterrupted run of a case leaves; made once."""

    @cache
    def make(case: str) -> Reference:
        return make_reference(case, Bench(tmp_path_factory.mktemp(case), user_env))

    return make


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        pytest.param(case, moment, marks=pytest.mark.xdist_group(f"kills {case}"))
        for case, moments in PAIRS.items()
        for moment in moments
    ],
)
def test_a_killed_run_ends_as_if_it_never_was(
    reference_of: Any,
    user_env: dict[str, str],
    tmp_path: Path,
    case: str,
    moment: Moment,
) -> None:
    bench = Bench(tmp_path, user_env)
    seed = random.randrange(2**32)
    trial = try_it(case, moment, reference_of(case), bench, seed=seed)
    assert not trial.fault, f"{trial} in {trial.directory}"
    assert trial.kills

# SPDX-License-Identifier: Apache-2.0
"""Random records and overrides; the long form is `make damage`."""

import random
from pathlib import Path

import pytest
from fuzz import CASES, Bench, make_bench, try_case

pytestmark = [
    *(pytest.mark.promotes, pytest.mark.timeout(300)),
    pytest.mark.xdist_group("fuzz"),
]


@pytest.fixture(scope="module")
def bench(user_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), env=user_env)


@pytest.mark.parametrize("kind", CASES)
def test_a_case_runs_or_is_refused_in_a_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(30):
        outcome = try_case(bench, kind, random.Random(f"{kind}/{seed}"))
        assert outcome in ("runs", "refused"), seed

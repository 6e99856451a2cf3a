# SPDX-License-Identifier: Apache-2.0
"""A short `make trouble`, which has 200 jobs."""

from pathlib import Path

from trouble import alone_faults, faults_of, launch, manifests, plan


def test_a_sweep_in_trouble_is_killed_and_goes_on(
    user_env: dict[str, str], tmp_path: Path
) -> None:
    """Nothing is lost or run twice, and all that failed is named."""
    trouble = plan(tmp_path / "t", jobs=14, raising=2, nan=1)
    one = "hydra.launcher.processes=1"
    words = trouble.launched("hydra/launcher=vectorized", one)
    killed = launch(trouble, words, user_env)
    before = manifests(trouble)
    last = launch(trouble, words, user_env)
    assert not faults_of(trouble, killed, before, last)
    assert not list(alone_faults(trouble, user_env, count=0))

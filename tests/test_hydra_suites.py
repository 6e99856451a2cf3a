# SPDX-License-Identifier: Apache-2.0
"""The suites that Hydra ships for launchers: any application can use ours."""

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

# Hydra's plugins are singletons: the first look-up is to find ours among them.
from hydra_plugins.runner.vectorized import VectorizedLauncher

# Their applications name no `version_base`, and so are told of changes to come.
pytestmark = [
    pytest.mark.usefixtures("no_version_base"),
    pytest.mark.filterwarnings(
        "ignore:.*Future Hydra versions will no longer change working directory"
    ),
]


def test_hydra_finds_the_launcher() -> None:
    assert VectorizedLauncher.__name__ in [
        found.__name__ for found in Plugins.instance().discover(Launcher)
    ]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("vectorized", [])])
class TestVectorizedLauncher(LauncherTestSuite):
    """One job, several jobs, groups, mandatory defaults, resolvers, bad keys."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("vectorized", ["hydra.sweeper.max_batch_size=2"])],
)
class TestVectorizedLauncherInBatches(BatchedSweeperTestSuite):
    """Batches by `max_batch_size`."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=vectorized"])],
)
class TestVectorizedLauncherIntegration(IntegrationTestSuite):
    """Directories, names and environment of jobs, in processes of their own."""

# SPDX-License-Identifier: Apache-2.0
"""A sweep, read back: its jobs, what was swept over, and what came of it.

`jobs` reads one job, `fields` says which leaves of the configs differ, `sweep` puts
the jobs into groups, `files` writes `sweep.json` and `sweep.csv`. None needs jax.
"""

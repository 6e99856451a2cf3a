# SPDX-License-Identifier: Apache-2.0
"""Hydra plugins of the runner.

Every Hydra application on this machine imports each module here whose name does not
start with `_`, so those stay light: what needs jax lies in a `_core.py`.
"""

# SPDX-License-Identifier: Apache-2.0
"""Observed keys against planned ones, for every step of a run."""

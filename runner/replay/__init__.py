# SPDX-License-Identifier: Apache-2.0
"""Runs made from a record: resumed in its directory, or reproduced in another."""

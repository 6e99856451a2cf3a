# SPDX-License-Identifier: Apache-2.0
"""Lifted transforms: `lift:` nodes to Flax modules."""

# SPDX-License-Identifier: Apache-2.0
"""Eight forced CPU devices, strict promotion, warnings as errors (pyproject.toml)."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("WANDB_MODE", "offline")

# SPDX-License-Identifier: Apache-2.0
"""A declarative experiment runner for JAX that accounts for every PRNG key.

The recipes (`conf/`) and the models (`models/`) lie beside this package in a
checkout and inside it in a wheel. Both are reached through `runner` alone
(`runner.models`), so that a `models` or `conf` of the user's is never taken for
ours, nor ours for theirs.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_home = _here if (_here / "conf").is_dir() else _here.parent
if _home != _here:
    __path__.append(str(_home))

CONF_DIR = _home / "conf"

__version__ = "0.1.0"
__all__ = ["CONF_DIR", "__version__"]

# SPDX-License-Identifier: Apache-2.0
"""Which of Flax's words for the mode a callable takes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool

__all__ = ["flags_for"]


def flags_for(
    layer: Callable[..., Any], *, deterministic: bool | Bool[Array, ""] | None
) -> dict[str, Any]:
    """The keyword arguments that tell a layer its mode.

    `deterministic` and `use_running_average` get the flag as given, `train` and
    `training` its negation; of these, the ones that the layer's signature names. A
    flag that was fixed when the layer was made (an attribute of that name which is
    not None, a keyword bound by `functools.partial`) is left alone.

    Args:
        layer: A module, or a plain callable.
        deterministic: None hands out no flag.
    """
    if deterministic is None:
        return {}
    traced = isinstance(deterministic, jax.Array)
    train = ~deterministic if traced else not deterministic
    flags = {
        "deterministic": deterministic,
        "use_running_average": deterministic,
        "train": train,
        "training": train,
    }
    return {name: value for name, value in flags.items() if _takes(layer, name)}


def _takes(layer: Callable[..., Any], flag: str) -> bool:
    if getattr(layer, flag, None) is not None:
        return False
    if isinstance(layer, functools.partial) and flag in layer.keywords:
        return False
    called = type(layer).__call__ if isinstance(layer, nn.Module) else layer
    try:
        parameter = inspect.signature(called).parameters.get(flag)
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    return parameter is not None and parameter.kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )

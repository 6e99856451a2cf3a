# SPDX-License-Identifier: Apache-2.0
"""Modules beside each other, and none."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Bool

from .flags import flags_for

__all__ = ["Branches", "Identity"]


class Branches(nn.Module):
    """Calls each branch with the same arguments.

    y = (branches[0](x), branches[1](x), ...)

    Attributes:
        branches: Modules or plain functions. A module that has no name is called
            `branches_<i>`. Each gets the training flag if its signature names it.
    """

    branches: Sequence[Callable[..., Any]]

    preserve_adopted_names: ClassVar[bool] = True  # read by Flax

    @nn.compact
    def __call__(
        self, *args: Any, deterministic: bool | Bool[Array, ""] | None = None
    ) -> tuple[Any, ...]:
        """Calls the branches, and returns what each returns."""
        return tuple(
            branch(*args, **flags_for(branch, deterministic=deterministic))
            for branch in self.branches
        )


class Identity(nn.Module):
    """Returns what it is called with: a value, or several as a tuple."""

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        """Returns the arguments."""
        return args[0] if len(args) == 1 else args

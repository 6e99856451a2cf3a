# SPDX-License-Identifier: Apache-2.0
"""A scan in chunks, each computed again as a whole in the backward pass.

n turns in n / k chunks keep n / k + k carries instead of n; the carry is the same at
every turn, and so is every key (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost", section 4.1). Flax's `remat_scan` does it with a split of the keys for
each level, and variables stacked twice; here the loop alone is cut, below Flax.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax.core import axes_scan

__all__ = ["plain_scans", "scans_in_chunks"]


class _Lax:
    """`jax.lax` as Flax's scan sees it, with another `scan`."""

    def __init__(self, scan: Callable[..., Any]) -> None:
        self.scan = scan

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.lax, name)


def scans_in_chunks(size: int | None) -> contextlib.AbstractContextManager[None]:
    """Lets Flax's scans run in chunks of `size` turns; None is all at once."""
    if size is None:
        return plain_scans()
    return _flax_sees(_Lax(functools.partial(_scan_chunks, size)))


def plain_scans() -> contextlib.AbstractContextManager[None]:
    """Lets Flax's scans run as ever: for what a chunked one calls."""
    return _flax_sees(jax.lax)


@contextlib.contextmanager
def _flax_sees(lax: Any) -> Iterator[None]:
    flax_scan: Any = axes_scan
    before, flax_scan.lax = flax_scan.lax, lax
    try:
        yield
    finally:
        flax_scan.lax = before


def _scan_chunks(
    size: int,
    body: Callable[..., Any],
    init: Any,
    xs: Any,
    length: int | None = None,
    reverse: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """As `jax.lax.scan`; `size` divides the length."""
    leaves = jax.tree.leaves(xs)
    turns = leaves[0].shape[0] if length is None else length
    count = turns // size

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(carry: Any, xs: Any) -> Any:
        options_ = {**options, "length": size, "reverse": reverse}
        return jax.lax.scan(body, carry, xs, **options_)

    cut = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(chunk, init, cut, length=count, reverse=reverse)
    return carry, jax.tree.map(lambda y: y.reshape(turns, *y.shape[2:]), ys)

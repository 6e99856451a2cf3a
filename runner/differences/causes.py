# SPDX-License-Identifier: Apache-2.0
"""What a difference most likely comes from, in a sentence or two.

What comes first explains what comes after: another generator, config, data, keys,
versions and platform. Where none of these differs, rounding is left.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from runner.differences.difference import Differences
from runner.differences.leaves import Leaf, Presence

__all__ = ["spell", "spell_side", "summarize"]

_AS_FAR = "All is equal as far as both runs go"
_APART = "They have no recorded step in common"
_NAMED = 3  # leaves named in a sentence
_GENERATOR = ("rng.impl", "rng.partitionable")


def summarize(found: Differences) -> str:
    """The likely cause, and where it shows first."""
    cause = next(_causes(found), None)
    if found.have_equal_results:
        if cause is None:
            if found.outcome:
                return f"The results are equal bit for bit; {_ends(found)}."
            return "Equal: every key, metric and parameter, bit for bit."
        return f"The results are equal bit for bit, though the runs differ in {cause}."
    effect = _effect(found)
    if effect in (_AS_FAR, _APART) and cause is not None:
        return f"The runs differ in {cause}. {effect}."
    if cause is None:
        if found.outcome and not (found.metrics.first or found.states.state):
            return f"{effect}: {_ends(found)}."
        return f"Nothing differs that a result should depend on. {effect}."
    return f"Likely cause: {cause}. {effect}."


def _causes(found: Differences) -> Iterator[str]:
    """What differs, the likeliest cause first; an order of causes, not of parts."""
    config, environment = found.config.matters, found.environment
    if any(leaf.path.startswith("rng.canary") for leaf in environment):
        chosen = [leaf for leaf in config if leaf.path in _GENERATOR]
        versions = [leaf for leaf in environment if leaf.path.startswith("versions")]
        yield f"another random generator{_in_brackets(chosen or versions)}"
    if config:
        yield _list(_without_copies(config))
    if found.data[0] != found.data[1]:
        yield "other data under the same config (their digests)"
    if found.keys.draws or found.keys.streams:
        yield _keys(found)
    if environment:
        yield _list([leaf for leaf in environment if _is_first(leaf)] or environment)


def _effect(found: Differences) -> str:
    first, states = found.metrics.first, found.states
    if first is not None:
        at = f"{first.phase} step {first.step}"
        return f"The numbers part at {at} ({first.metric})"
    if states.batches is not None or states.state is not None:
        step = min(s for s in (states.batches, states.state) if s is not None)
        return f"The metrics are equal, the states part before step {step}"
    if found.metrics.only_a or found.metrics.only_b:
        return _AS_FAR if found.metrics.common else _APART
    if found.metrics.metrics:
        return "The runs measure other metrics; those that both have are equal"
    what = "parameters" if not found.equal["params"] else "outputs"
    return f"The metrics are equal, the {what} are not"


def _ends(found: Differences) -> str:
    a, b = found.a, found.b
    return f"one is {a.status} at step {a.steps}, the other {b.status} at {b.steps}"


def _keys(found: Differences) -> str:
    keys = found.keys
    if keys.others:
        draw = keys.others[0]
        place = f"{draw.phase} {draw.stream} {'/'.join(draw.path) or '(root)'}"
        count = f"{len(keys.others)} draw{'s' * (len(keys.others) > 1)}"
        return f"other keys at {count}, first {place}"
    if keys.draws:
        return f"other draws under the same config: {len(keys.draws)}"
    names = ", ".join(stream.name for stream in keys.streams[:_NAMED])
    return f"other streams under the same config: {names}"


def _is_first(leaf: Leaf) -> bool:
    """Versions and platform explain more than the commit of the working directory."""
    return leaf.path.startswith(("versions.", "platform."))


def _without_copies(leaves: Sequence[Leaf]) -> Sequence[Leaf]:
    """`rng.seed` follows `seed`, unless it was set."""
    seed = next((leaf for leaf in leaves if leaf.path == "seed"), None)
    if seed is None:
        return leaves
    values = (seed.a, seed.b)
    return [
        leaf for leaf in leaves if leaf.path != "rng.seed" or (leaf.a, leaf.b) != values
    ]


def _list(leaves: Sequence[Leaf]) -> str:
    named = [f"{x.path} ({_both(x)})" for x in leaves[:_NAMED]]
    more = len(leaves) - len(named)
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _in_brackets(leaves: Sequence[Leaf]) -> str:
    return f": {_list(leaves)}" if leaves else " under the same config and versions"


def _both(leaf: Leaf) -> str:
    return f"{spell_side(leaf, Presence.A)} and {spell_side(leaf, Presence.B)}"


def spell_side(leaf: Leaf, side: Presence) -> str:
    """A leaf's value in one of the runs; `absent` where it has none."""
    if leaf.presence not in (side, Presence.BOTH):
        return "absent"
    return spell(leaf.a if side is Presence.A else leaf.b)


def spell(value: Any) -> str:
    """A value as JSON; letters stay letters."""
    return json.dumps(value, ensure_ascii=False, default=str)

# SPDX-License-Identifier: Apache-2.0
"""A walk over a jaxpr that follows each key from its stream to what consumes it.

Every key variable has `Refs`: its stream and the ops that lead to each of its
elements. They are followed through folds, splits, all that moves elements, calls,
branches, loops and meshes; whatever else happens to a key leaves rules that say why
it was lost. Every other variable has a `Taint`: what it was computed from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from runner.audit.arithmetic import ARITHMETIC, known_array
from runner.audit.control import CONTROL, sub_jaxprs
from runner.audit.derive_rules import DERIVE, find_keys_below
from runner.audit.draws import Draw, Log, Use
from runner.audit.gathers import GATHERS
from runner.audit.indexing import INDEXING, align
from runner.audit.marks import Here
from runner.audit.refs import LostError, Ref, Refs, Space, Taint, check_count
from runner.audit.walker import BELOW, CONSUMERS, Value, is_key

__all__ = ["Draw", "Use", "walk_jaxpr"]

_SAME = {
    "copy",
    "copy_p",
    "device_put",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "random_clone",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
}
_MOVES = {**INDEXING, **GATHERS}
_MOVERS = {
    "all_gather",
    "all_to_all",
    "dynamic_update_slice",
    "pad",
    "ppermute",
    "random_fold_in",
    "random_split",
    "random_unwrap",
    "scatter",
    "select_n",
    *_MOVES,
}
_COMPARE = {"eq", "ne"}  # say whether two keys are equal, draw nothing


def walk_jaxpr(
    jaxpr: Jaxpr, *, streams: Sequence[str], consts: Mapping[Any, Any] | None = None
) -> tuple[tuple[Draw, ...], frozenset[str]]:
    """What a jaxpr draws, and the primitives in it.

    Args:
        jaxpr: Without dead code. Its first inputs are keys, one for each stream.
        streams: Their names.
        consts: Value of each of its constants that is known.
    """
    keys: list[Any] = jaxpr.invars[: len(streams)]
    rest = jaxpr.invars[len(streams) :]
    walk = Walk({s: v.aval.dtype for s, v in zip(streams, keys, strict=True)})
    known = [walk.constant((consts or {}).get(v), v) for v in jaxpr.constvars]
    start: list[Value] = [Refs((), (Ref(stream),)) for stream in streams]
    walk.run(jaxpr, [*start, *map(walk.given, rest)], known)
    return tuple(walk.log.draws), frozenset(walk.primitives)


class Walk:
    """One pass over a jaxpr, carrying what is known of each variable."""

    def __init__(self, dtypes: Mapping[str | None, Any]) -> None:
        self.dtypes = dtypes
        self.space = Space()
        self.log = Log(self.space)
        self.primitives: set[str] = set()
        self.here = Here()
        self.conds = 0

    # Values that nothing computes --------------------------------------------------

    def constant(self, value: Any, var: Any) -> Value:
        """A constant of the program; None is one whose value is not at hand."""
        if is_key(var):
            return self.lost(var, None, "a key array closed over")
        known = None if value is None else known_array(value, self.space)
        return Taint() if known is None else known

    def given(self, var: Any) -> Value:
        """An input of the program that is no stream."""
        if is_key(var):
            return self.lost(var, None, "an argument")
        return Taint(is_given=True)

    def lost(self, var: Any, stream: str | None, why: str) -> Refs:
        """Keys of a stream of which no more is known."""
        dims = self.space.dims(getattr(var.aval, "shape", ()), self.here.path)
        return Refs(dims, (Ref(stream).lost(why),))

    # Equations ---------------------------------------------------------------------

    def run(
        self, jaxpr: Any, ins: Sequence[Value], consts: Sequence[Value] = ()
    ) -> list[Value]:
        """What comes out of a jaxpr, open or closed."""
        if isinstance(jaxpr, ClosedJaxpr):
            pairs = zip(jaxpr.consts, jaxpr.jaxpr.constvars, strict=True)
            consts, jaxpr = [self.constant(c, v) for c, v in pairs], jaxpr.jaxpr
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Value:
            if not isinstance(atom, Literal):
                return env[atom]
            floats = isinstance(atom.val, float)
            return Taint() if floats else self.constant(atom.val, atom)

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """What comes out of an equation."""
        name, why = eqn.primitive.name, ""
        self.primitives.add(name)
        if name in CONSUMERS or name in BELOW:
            keys = ins[0] if name in CONSUMERS else find_keys_below(eqn, ins, self)
            return self.consume(eqn, keys)
        if sub_jaxprs(eqn):
            return CONTROL.get(name, CONTROL["call"])(self, eqn, ins)
        try:
            found = self.follow(eqn, ins)
        except LostError as lost:
            found, why = None, f": {lost}"
        if found is not None:
            return found
        if name not in _MOVERS | _COMPARE and any(map(is_key, eqn.invars)):
            self.consume(eqn, self.mix(eqn.invars[0], ins, f"consumed by {name}"))
        return self.lose(eqn, ins, f"passed through {name}{why}")

    def follow(self, eqn: Any, ins: list[Value]) -> list[Value] | None:
        """What comes out of a primitive that hands keys or numbers on."""
        name = eqn.primitive.name
        if name in _SAME:
            return ins[: len(eqn.outvars)]
        if name in DERIVE:
            return [DERIVE[name](self, eqn, ins)]
        refs = [value for value in ins if isinstance(value, Refs)]
        numbers = sum(ref.is_number for ref in refs)
        if name in ARITHMETIC and numbers == len(ins):
            return list(ARITHMETIC[name](eqn, refs, self.space))
        if name not in _MOVES or not refs or refs[0] is not ins[0]:
            return None
        if len(refs) < len(ins):
            raise LostError("with what the program computes")
        if name in ("concatenate", "stack") and 0 < numbers < len(refs):
            raise LostError("keys and numbers")
        return list(_MOVES[name](eqn, refs, self.space))

    def lose(self, eqn: Any, ins: Iterable[Value], why: str) -> list[Value]:
        """What is left to say of what an equation makes of its inputs."""
        taint = self.taint(ins, eqn.primitive.name)
        return [self.mix(v, ins, why) if is_key(v) else taint for v in eqn.outvars]

    def mix(self, var: Any, ins: Iterable[Value], why: str) -> Refs:
        """Keys that are made of others: of their stream, if it is one."""
        rules = [r for v in ins if isinstance(v, Refs) for r in v.rules]
        keys = [rule for rule in rules if rule.number is None]
        streams = {rule.stream for rule in keys} or {self.taint(ins).stream}
        reason = next((rule.untraced for rule in keys if rule.untraced), why)
        return self.lost(var, streams.pop() if len(streams) == 1 else None, reason)

    def choose(self, cases: Sequence[Refs], *, cond: int | None = None) -> Refs:
        """Keys that are one of several arrays; which, the program decides."""
        self.conds += cond is None
        dims, arrays = align(cases, self.space)
        tags = [((cond or self.conds, number),) for number in range(len(arrays))]
        rules = [
            replace(rule, branches=(*rule.branches, *tag))
            for array, tag in zip(arrays, tags, strict=True)
            for rule in array.rules
        ]
        return Refs(dims, check_count(rules))

    def taint(self, ins: Iterable[Value], name: str = "") -> Taint:
        """What something was computed from; `name` is what did it to keys."""
        total = Taint()
        for value in ins:
            if isinstance(value, Taint):
                total = total.join(value)
            elif not value.is_number:
                streams = frozenset(rule.stream for rule in value.rules)
                total = total.join(Taint(streams, why=name))
        return total

    def consume(self, eqn: Any, keys: Value) -> list[Value]:
        """Lists a draw."""
        name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[-1].aval
        if isinstance(keys, Taint):
            keys = self.lost(eqn.invars[0], keys.stream, f"drawn by {name} itself")
        batch = len(keys.dims) if name in CONSUMERS else 0
        shape = tuple(params.get("shape", getattr(out, "shape", ())[batch:]))
        dtype = getattr(out, "dtype", None)
        bits = getattr(dtype, "itemsize", 0) * 8
        use = Use(name, shape, params.get("bit_width", bits))
        self.log.add(keys, use, self.here.at(eqn))
        return [Taint(is_drawn=True) for _ in eqn.outvars]

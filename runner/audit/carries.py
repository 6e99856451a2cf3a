# SPDX-License-Identifier: Apache-2.0
"""What a loop carries from turn to turn, as rules of the turn.

    key = body(key)            at turn t: body, t times: Op("repeat", index=t, body)
    i = i + c                  at turn t: init + c * t
    key = f(t)                 at turn t: init where t is 0, else f(t - 1)

The body is walked with a placeholder for each value that is carried; what comes out
in terms of the placeholders says which of the three it is. `index` in a rule is the
place in the scanned arrays, which a reversed scan goes through from the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from runner.audit.indexing import align, at
from runner.audit.refs import LostError, Ref, Refs, Space, Taint, intersect
from runner.ops import Affine, Op, rename_axes, simplest

__all__ = ["Carried", "Loop", "follow_carries"]

Value = Refs | Taint
_HOLE = "%carried"


@dataclass(frozen=True)
class Loop:
    """A scan or while loop, about to be walked.

    Args:
        body: Closed jaxpr of (constants, carries, rows) to (carries, rows).
        constants: Values that are the same at each turn.
        init: Values that are carried into the first turn.
        rows: Values of one turn of a scan, in terms of the axis.
        axis: Its counter; of a scan, the place in the scanned arrays.
        size: Number of turns; None when not known.
        is_reversed: Whether the turns go from the last place to the first.
        kind: As a reason names it: `a scan`, `a while loop`.
    """

    body: Any
    constants: Sequence[Value]
    init: Sequence[Value]
    rows: Sequence[Value]
    axis: str
    size: int | None
    is_reversed: bool = False
    kind: str = "a scan"

    @property
    def turn(self) -> Affine:
        """How many turns came before, in terms of the axis."""
        if self.size == 1:
            return Affine()
        return self.flip(Affine(0, ((self.axis, 1),)))

    def flip(self, number: Affine) -> Affine:
        """A turn as a place on the axis, or the other way round."""
        return number * -1 + ((self.size or 0) - 1) if self.is_reversed else number


@dataclass(frozen=True)
class Carried:
    """What is known of one carried value.

    Args:
        value: At each turn, in terms of the axis.
        final: After the last turn; None where it is what comes out of that turn.
    """

    value: Value
    final: Value | None = None


def follow_carries(
    loop: Loop,
    run: Callable[[Any, list[Value]], list[Value]],
    space: Space,
    taint: Taint,
) -> list[Carried]:
    """What is carried, at each turn and in the end.

    Args:
        loop: The loop.
        run: Walks a jaxpr without listing what it draws.
        space: Variables of the walk.
        taint: Of what the body draws.
    """
    if loop.size == 1:
        return [Carried(value) for value in loop.init]
    for value in (*loop.constants, *loop.init, *loop.rows):
        taint = taint.join(value) if isinstance(value, Taint) else taint
    found: dict[int, Carried] = dict(_constant_carries(loop))
    found |= _Numbers(loop, run, space, found).follow()
    found |= _Keys(loop, run, space, found).follow()
    left = {j: v for j, v in enumerate(loop.init) if j not in found}
    return [
        found.get(j) or Carried(_lose(left[j], loop, taint))
        for j in range(len(loop.init))
    ]


def _lose(value: Value, loop: Loop, taint: Taint) -> Value:
    if isinstance(value, Taint) or value.is_number:
        return taint
    length = " of unknown length" if loop.size is None else ""
    return value.lost(f"carried through {loop.kind}{length}")


def _constant_carries(loop: Loop) -> list[tuple[int, Carried]]:
    jaxpr, first = loop.body.jaxpr, len(loop.constants)
    return [
        (j, Carried(value, value))
        for j, value in enumerate(loop.init)
        if jaxpr.outvars[j] is jaxpr.invars[first + j]
    ]


@dataclass
class _Carries:
    """Carries of one sort, followed by one walk over what computes them."""

    loop: Loop
    run: Callable[[Any, list[Value]], list[Value]]
    space: Space
    found: dict[int, Carried]

    def walk_turn(self, holes: dict[int, Value]) -> dict[int, Value]:
        """What carries come out of a turn, with placeholders where they went in."""
        loop = self.loop
        if not holes:
            return {}
        known = {j: carried.value for j, carried in self.found.items()} | holes
        carries = [known.get(j, Taint()) for j in range(len(loop.init))]
        outs = [j in holes for j in range(len(loop.body.jaxpr.outvars))]
        jaxpr, _ = dce_jaxpr(loop.body.jaxpr, outs, instantiate=True)
        ins = [*loop.constants, *carries, *loop.rows]
        values = self.run(ClosedJaxpr(jaxpr, loop.body.consts), ins)
        return dict(zip(sorted(holes), values, strict=True))


class _Numbers(_Carries):
    def follow(self) -> dict[int, Carried]:
        """Counters: scalars to which each turn adds the same."""
        space, loop = self.space, self.loop
        init = {
            j: value.rules[0].number
            for j, value in enumerate(loop.init)
            if j not in self.found and isinstance(value, Refs)
            if not value.dims and value.is_uniform
        }
        starts = {j: number for j, number in init.items() if number is not None}
        holes = {j: space.new(None) for j in starts}
        space.unknown |= set(holes.values())
        refs = {j: _scalar(Affine(0, ((hole, 1),))) for j, hole in holes.items()}
        carried = {}
        for j, value in self.walk_turn(dict(refs)).items():
            step = _step(value, holes[j])
            if step is not None:
                start = starts[j] + loop.turn * step
                last = None if loop.size is None else starts[j] + step * loop.size
                final = Taint() if last is None else _scalar(last)
                carried[j] = Carried(_scalar(start), final)
        return carried


def _scalar(number: Affine) -> Refs:
    return Refs((), (Ref(number=number),))


def _step(value: Value, hole: str) -> int | None:
    """What a turn adds to a counter; None when it is none."""
    if isinstance(value, Taint) or not value.is_uniform:
        return None
    number = value.rules[0].number
    if number is None or number.terms != ((hole, 1),):
        return None
    return int(number.offset)


class _Keys(_Carries):
    def follow(self) -> dict[int, Carried]:
        init = {
            j: value
            for j, value in enumerate(self.loop.init)
            if j not in self.found and isinstance(value, Refs) and not value.is_number
        }
        marks = {j: self.mark(j, refs) for j, refs in init.items()}
        holes: dict[int, Value] = {
            j: Refs(refs.dims, (_hole(refs, marks[j]),)) for j, refs in init.items()
        }
        outs = {
            j: _over_words(value, init[j], self.space)
            for j, value in self.walk_turn(holes).items()
            if isinstance(value, Refs)
        }
        done: dict[int, Carried] = {}
        for j, refs in outs.items():
            if _is_own(refs, init[j], marks[j]):
                done[j] = self.repeat(init[j], refs.rules[0])
        for _ in outs:  # a carry may be made of others that are known by then
            for j, refs in outs.items():
                if j not in done:
                    self.shift(j, init[j], refs, marks, done)
        return done

    def mark(self, j: int, init: Refs) -> Op:
        """Stands for the keys of carry `j`; it changes when they are moved about."""
        index, is_words = Affine(), init.rules[0].word is not None
        for dim in init.dims[:-1] if is_words else init.dims:
            index = index * (self.space.sizes[dim] or 1) + at(dim, self.space)
        self.space.count += 1  # in a loop within, too, no other has this mark
        return Op("split", value=self.space.count, index=simplest(index), why=_HOLE)

    def repeat(self, init: Refs, out: Ref) -> Carried:
        """Each turn does the same to what is carried."""
        loop, body = self.loop, out.ops[1:]
        counter = _counter(body)
        place = loop.flip(Affine(0, ((counter, 1),)))
        body = rename_axes(body, {loop.axis: place})
        if loop.size is None:
            lost = _lose(init, loop, Taint())
            return Carried(lost, lost)

        def after(turns: Affine) -> Refs:
            if turns == Affine() or not body:
                return init
            op = Op("repeat", index=simplest(turns), body=body, counter=counter)
            rules = (_made_by(out, rule.add(op)) for rule in init.rules)
            return replace(init, rules=tuple(rules))

        return Carried(after(loop.turn), after(Affine(loop.size)))

    def shift(
        self,
        j: int,
        init: Refs,
        out: Refs,
        marks: dict[int, Op],
        done: dict[int, Carried],
    ) -> None:
        """Each turn replaces what is carried by something that is known."""
        loop, space = self.loop, self.space
        by = {mark: m for m, mark in marks.items()}
        try:
            filled = _fill(out, by, done)
            if filled is None:
                return
            before = Affine(1 if loop.is_reversed else -1, ((loop.axis, 1),))
            later = filled.put(loop.axis, before, space)
            dims, (first, rest) = align([init, later], space)
        except LostError:
            return
        edge = loop.size - 1 if loop.is_reversed and loop.size else 1
        low, high = ((loop.axis, 0, edge),), ((loop.axis, edge, None),)
        bounds = (high, low) if loop.is_reversed else (low, high)
        rules = [
            replace(rule, box=box)
            for refs, bound in zip((first, rest), bounds, strict=True)
            for rule in refs.rules
            if (box := intersect(rule.box, bound, space)) is not None
        ]
        done[j] = Carried(Refs(dims, tuple(rules)))


def _hole(refs: Refs, mark: Op) -> Ref:
    """A placeholder for what is carried: a key, or the words of one."""
    word = refs.rules[0].word
    same = all(rule.word == word for rule in refs.rules)
    return Ref(refs.stream, (mark,), word=word if same else None)


def _over_words(out: Refs, init: Refs, space: Space) -> Refs:
    """Words of keys over the dimension that the words had before."""
    if out.rules[0].word is None or out.dims[:-1] != init.dims[:-1]:
        return out
    try:
        moved = out.put(out.dims[-1], at(init.dims[-1], space), space)
    except LostError:
        return out
    return replace(moved, dims=init.dims)


def _is_own(out: Refs, init: Refs, mark: Op) -> bool:
    """Whether a turn does one thing to all that is carried."""
    (rule, *_), words = out.rules, {r.word for r in init.rules}
    own = out.is_uniform and rule.ops[:1] == (mark,) and not rule.untraced
    return own and out.dims == init.dims and words == {rule.word}


def _made_by(last: Ref, rule: Ref) -> Ref:
    """A rule at the place of its last `make_rng`, where `last` has one."""
    return rule if last.call is None else replace(rule, path=last.path, call=last.call)


def _fill(out: Refs, marks: dict[Op, int], done: dict[int, Carried]) -> Refs | None:
    """With carries that are known by now in the place of their placeholders.

    None when one is not known, or only some of its elements are meant.
    """
    rules: list[Ref] = []
    for rule in out.rules:
        if not rule.ops or rule.ops[0].why != _HOLE:
            rules.append(rule)
            continue
        known = done.get(marks.get(rule.ops[0], -1))
        if rule.box or rule.branches:
            return None
        if known is None or isinstance(known.value, Taint):
            return None
        if known.value.dims not in ((), out.dims):
            return None
        for one in known.value.rules:
            ops = () if one.untraced else (*one.ops, *rule.ops[1:])
            whole = replace(one, ops=ops, word=None if one.untraced else rule.word)
            rules.append(_made_by(rule, whole))
    return replace(out, rules=tuple(rules))


def _counter(body: tuple[Op, ...]) -> str:
    """A name for the turn within a body, other than those of bodies within it."""
    depth = _depth(body)
    return f"turn{depth + 1}" if depth else "turn"


def _depth(ops: tuple[Op, ...]) -> int:
    return max((1 + _depth(op.body) for op in ops if op.body), default=0)

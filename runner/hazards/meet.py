# SPDX-License-Identifier: Apache-2.0
"""Whether two derivations can give one key, from their ops alone.

A key is compared with others by its derivation, not by sampling. `fold_in(key, .)` is
a bijection of a counter, so children of one key are distinct when their numbers are.
What `split` gives depends on the generator (`SplitRule`). So a derivation is a chain
of numbers, and two of them meet when some way through both takes the same ones. What
follows from different parents may only collide by chance (2^-64).
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import combinations, product
from math import prod
from typing import NamedTuple

from runner.hazards.numbers import Number, is_injective, make_number, overlap, share_two
from runner.ops import Op
from runner.spec import Impl, RngSpec

__all__ = ["Link", "SplitRule", "is_distinct", "link_ops", "meet", "split_rule"]

_MOST_TURNS = 2**14  # of a repeat that is gone through turn by turn
_MOST_CASES = 2**12  # of variables that stand in several numbers


class SplitRule(StrEnum):
    """What the children of a key are.

    The rules were read from what JAX computes; a test holds them to it.
    """

    FOLD = "fold"  # split(key, n)[i] is fold_in(key, i)
    COUNT = "count"  # others for each n; but split(key, 1)[0] is fold_in(key, 1)
    INDEX = "index"  # the same for each n; and fold_in(key, i) is key ^ f(i)


def split_rule(rng: RngSpec) -> SplitRule:
    """The rule of a generator."""
    if rng.impl is Impl.UNSAFE_RBG:
        return SplitRule.INDEX
    return SplitRule.FOLD if rng.partitionable else SplitRule.COUNT


class Link(NamedTuple):
    """One step of a chain: a kind, and the numbers that it may take.

    A `repeat` stands for its `body`, `number` times; `turn` counts those gone through,
    and is what `counter` stands for in the body.
    """

    kind: str
    number: Number
    body: tuple["Link", ...] = ()
    counter: str = ""
    turn: int = 0


Chain = tuple[Link, ...]


def link_ops(
    ops: tuple[Op, ...], *, sizes: Mapping[str, int | None], rule: SplitRule
) -> Chain:
    """The chain of a derivation.

    Args:
        ops: From the seed on.
        sizes: How many values each coordinate and axis takes; None is unknown.
        rule: What a split gives.
    """
    links: list[Link] = []
    for op in ops:
        if op.op == "repeat":
            turns = make_number(op.index, sizes)
            inner = {**sizes, op.counter: turns.most}
            body = link_ops(op.body, sizes=inner, rule=rule)
            links += [Link("repeat", turns, body, op.counter)] if body else []
        elif op.op == "carry":  # split(key)[1], some times; then split(key)[0]
            here, on = (_link_split(Number(i), 2, rule) for i in range(2))
            links += [Link("repeat", make_number(op.value, sizes), (on,)), here]
        elif op.op == "split":
            links.append(_link_split(make_number(op.index, sizes), op.of, rule))
        else:
            kind = "fold" if op.op == "fold_in" else "seed"
            links.append(Link(kind, make_number(op.value, sizes)))
    return tuple(links) if rule is not SplitRule.INDEX else _commute(links)


def _link_split(index: Number, of: int, rule: SplitRule) -> Link:
    if rule is SplitRule.COUNT and of == 1:
        return Link("fold", Number(1))
    kinds = {SplitRule.FOLD: "fold", SplitRule.INDEX: "split"}
    return Link(kinds.get(rule, f"split {of}"), index)


def _commute(links: list[Link]) -> Chain:
    """With the known numbers of neighbouring folds in order; two that are equal go.

    key ^ f(i) ^ f(j) = key ^ f(j) ^ f(i);  key ^ f(i) ^ f(i) = key
    """
    out: list[Link] = []
    for run in _runs(links):
        known = sorted(link.number.offset for link in run if not link.number.terms)
        odd = [n for n in dict.fromkeys(known) if known.count(n) % 2]
        out += [Link("fold", Number(n)) for n in odd] if len(run) > 1 else []
        out += [link for link in run if link.number.terms or len(run) == 1]
    return tuple(out)


def _runs(links: list[Link]) -> Iterator[list[Link]]:
    """Neighbouring folds together, every other link by itself."""
    run: list[Link] = []
    for link in links:
        if run and not link.kind == run[-1].kind == "fold":
            yield run
            run = []
        run.append(link)
    if run:
        yield run


def meet(a: Chain, b: Chain) -> bool:
    """Whether two derivations give one key for some numbers of each.

    Numbers are taken to be independent where a variable stands in several that have
    too many values to be tried, and repeats of more than 2^14 turns to have any number
    of them: there it may be true of two that don't meet, but is never false of two
    that do.
    """
    if not _may_meet(a, b):
        return False
    cases = _cases(a), _cases(b)
    if not 1 < prod(map(len, cases)) <= _MOST_CASES:
        return True
    return any(_may_meet(first, second) for first, second in product(*cases))


def _may_meet(a: Chain, b: Chain) -> bool:
    seen: set[tuple[Chain, Chain]] = set()
    todo = [(a, b)]
    while todo:
        pair = todo.pop()
        if pair in seen:
            continue
        seen.add(pair)
        first, second = pair
        if not first and not second:
            return True
        if first and first[0].kind == "repeat":
            todo += [(after, second) for after in _turns(first)]
        elif second and second[0].kind == "repeat":
            todo += [(first, after) for after in _turns(second)]
        elif first and second and _overlap(first[0], second[0]):
            todo.append((first[1:], second[1:]))
    return False


def _overlap(a: Link, b: Link) -> bool:
    return a.kind == b.kind and overlap(a.number, b.number)


def _turns(chain: Chain) -> Iterator[Chain]:
    """Past a repeat, or once more through its body."""
    repeat, *rest = chain
    most = repeat.number.most
    if most is None or most > _MOST_TURNS:
        yield tuple(rest)
        yield (*repeat.body, *chain)
        return
    if overlap(repeat.number, Number(repeat.turn)):
        yield tuple(rest)
    if repeat.turn < most:
        body = _put(repeat.body, repeat.counter, repeat.turn)
        yield (*body, repeat._replace(turn=repeat.turn + 1), *rest)


def _put(chain: Chain, variable: str, value: int) -> Chain:
    """A chain with a value where a variable stood."""
    out = []
    for link in chain:
        body = link.body
        if body and link.counter != variable:
            body = _put(body, variable, value)
        out.append(link._replace(number=link.number.put(variable, value), body=body))
    return tuple(out)


def _cases(chain: Chain) -> tuple[Chain, ...]:
    """One chain for each value of the variables that stand in several numbers."""
    found = list(_variables(chain))
    often = {name: size for name, size in found if found.count((name, size)) > 1}
    return _try(chain, often) or (chain,)


def _try(chain: Chain, variables: Mapping[str, int | None]) -> tuple[Chain, ...]:
    """One chain for each value of some variables; none where there are too many."""
    sizes = [_MOST_CASES + 1 if size is None else size for size in variables.values()]
    if prod(sizes) > _MOST_CASES:
        return ()
    cases: tuple[Chain, ...] = (chain,)
    for name, size in zip(variables, sizes, strict=True):
        cases = tuple(_put(case, name, i) for case in cases for i in range(size))
    return cases


def _variables(
    chain: Chain, inside: tuple[str, ...] = ()
) -> Iterator[tuple[str, int | None]]:
    """Name and size of each variable, once for each number that it stands in."""
    for link in chain:
        yield from (
            (name, size) for name, _, size in link.number.terms if name not in inside
        )
        # A body is gone through more than once.
        yield from [*_variables(link.body, (*inside, link.counter))] * 2


def is_distinct(chain: Chain, *, rule: SplitRule) -> bool:
    """Whether a derivation gives another key for each value of its variables.

    It does when its length tells how often each repeat was taken, and its numbers tell
    every other variable. False where that can't be shown, and there are more than 2^12
    values to be tried.
    """
    if rule is SplitRule.INDEX and any(map(_swaps, _runs(list(chain)))):
        return False
    variables = dict(_variables(chain))
    if set(variables) <= _told(chain):
        return True
    cases = _try(chain, variables)
    return bool(cases) and len({*map(_expand, cases)}) == len(cases)


def _swaps(run: list[Link]) -> bool:
    """Whether two of some folds, whose order doesn't count, can change places."""
    return any(share_two(a.number, b.number) for a, b in combinations(run, 2))


def _told(chain: Chain) -> set[str]:
    """Variables whose values can be read off the numbers of a chain."""
    known: set[str] = set()
    if any(link.body for link in chain):
        length = _length(chain)
        if length is None or not is_injective(length):
            return set()
        known |= {name for name, _, _ in length.terms}
    numbers = [link.number for link in chain if not link.body]
    while True:
        more: set[str] = set()
        for number in numbers:
            rest = Number(0, tuple(t for t in number.terms if t[0] not in known))
            if is_injective(rest):
                more |= {name for name, _, _ in rest.terms}
        if not more:
            return known
        known |= more


def _length(chain: Chain) -> Number | None:
    """The number of links after all turns; None where the turns differ in theirs."""
    length = Number()
    for link in chain:
        if not link.body:
            length = length.plus(Number(1))
            continue
        turn = _length(link.body)
        if turn is None or turn.terms:
            return None
        length = length.plus(link.number, times=turn.offset)
    return length


def _expand(chain: Chain) -> tuple[tuple[str, int], ...]:
    """Kind and number of each link, after all turns, where every number is known."""
    out: list[tuple[str, int]] = []
    for link in chain:
        if not link.body:
            out.append((link.kind, link.number.offset % 2**32))
        for turn in range(link.number.offset) if link.body else ():
            out += _expand(_put(link.body, link.counter, turn))
    return tuple(out)

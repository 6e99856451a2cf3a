# SPDX-License-Identifier: Apache-2.0
"""Primitives that make keys of keys, choose among them, or take them apart."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from runner.audit.indexing import align, combine, flat_index
from runner.audit.marks import read_marks
from runner.audit.refs import LostError, Ref, Refs, Taint, check_count, find_cases
from runner.audit.walker import Value, Walker
from runner.ops import Affine, Op, simplest

__all__ = ["DERIVE", "find_keys_below"]


def _seed(walk: Walker, eqn: Any, ins: list[Value]) -> Refs:
    (seed,) = ins
    why = "a seed that the program computes"
    if isinstance(seed, Taint) and seed.is_drawn:
        why = "another draw's output"
    elif isinstance(seed, Refs) and seed.constant is not None:
        why = f"a constant in the model: key({seed.constant})"
    return walk.lost(eqn.outvars[0], None, why)


def _unwrap(walk: Walker, eqn: Any, ins: list[Value]) -> Value:
    (keys,) = ins
    if isinstance(keys, Taint):
        return keys
    word = walk.space.new(eqn.outvars[0].aval.shape[-1])
    number = Affine(0, ((word, 1),))
    rules = (r if r.untraced else replace(r, word=number) for r in keys.rules)
    return Refs((*keys.dims, word), tuple(rules))


def _wrap(walk: Walker, eqn: Any, ins: list[Value]) -> Refs:
    (words,), var, stream = ins, eqn.outvars[0], None
    if isinstance(words, Taint):
        why = "a constant in the model" if words == Taint() else "an argument"
        if words.is_drawn:
            why = "another draw's output"
        elif words.streams:
            stream, why = words.stream, f"passed through {words.why} as words"
    elif words.is_number:
        why = "a constant in the model"
    else:
        keys, stream = _whole_keys(words), words.stream
        dtypes = {walk.dtypes.get(rule.stream) for rule in words.rules}
        if keys is not None and dtypes <= {var.aval.dtype, None}:
            return keys
        moved, other = "in another order", "as a key of another implementation"
        why = f"its words are wrapped {moved if keys is None else other}"
    return walk.lost(var, stream, why)


def _whole_keys(words: Refs) -> Refs | None:
    """The keys of which these are the words, all and in their order."""
    *dims, last = words.dims
    number = Affine(0, ((last, 1),))
    for rule in words.rules:
        elsewhere = {name for op in rule.ops for name in op.axes}
        elsewhere |= {name for name, *_ in rule.box}
        if not rule.untraced and (rule.word != number or last in elsewhere):
            return None
    return Refs(tuple(dims), tuple(replace(rule, word=None) for rule in words.rules))


def _fold(walk: Walker, eqn: Any, ins: list[Value]) -> Refs:
    keys, data = ins
    narrow = np.dtype(eqn.invars[1].aval.dtype).itemsize < 4
    if isinstance(data, Taint) or narrow:
        why = "folded with a number that the program computes"
        return walk.mix(eqn.outvars[0], [keys], why)
    marks = read_marks(eqn.source_info.name_stack)
    mark = marks[-1] if marks and marks[-1].kind == "make_rng" else None
    if isinstance(keys, Taint):
        raise LostError("of what is no key")
    dims, arrays = align([keys, data], walk.space)
    if dims and _is_unsafe(eqn.outvars[0]):
        return walk.mix(eqn.outvars[0], ins, f"folded {_UNSAFE}")
    rules = []
    for key, by in combine(arrays, walk.space):
        number = by.number or Affine()
        value = int(number.offset) % 2**32 if number.is_constant else number
        if mark is None:
            rules.append(key.add(Op("fold_in", value, why="fold_in")))
            continue
        # A fork (nn.jit, nn.fold_rngs) folds its path, then the names within it.
        inner = key.call is not None
        path = (*key.path, *mark.names) if inner else walk.here.place(mark.path)
        why = f"path {'/'.join(path) or '(root)'} call {mark.count}"
        key = key.add(Op("fold_in", value, why=why))  # noqa: PLW2901
        rules.append(replace(key, path=path, call=mark.count))
    return Refs(dims, check_count(rules))


_UNSAFE = "under vmap, which makes other keys of unsafe_rbg"


def _is_unsafe(var: Any) -> bool:
    """Whether a batch of keys is derived otherwise than one key by one."""
    return "urbg" in str(var.aval.dtype)


def _split(walk: Walker, eqn: Any, ins: list[Value]) -> Refs:
    (keys,), shape = ins, eqn.params["shape"]
    if isinstance(keys, Taint):
        raise LostError("of what is no key")
    if keys.dims and _is_unsafe(eqn.outvars[0]):
        return walk.mix(eqn.outvars[0], ins, f"split {_UNSAFE}")
    dims = walk.space.dims(shape, walk.here.at(eqn).path)
    index = simplest(flat_index(dims, walk.space))
    op = Op("split", index=index, of=math.prod(shape), why="split")
    return Refs((*keys.dims, *dims), tuple(rule.add(op) for rule in keys.rules))


def _select(walk: Walker, eqn: Any, ins: list[Value]) -> Refs | Taint:
    which, *cases = ins
    refs = [case for case in cases if isinstance(case, Refs)]
    numbers = sum(case.is_number for case in refs)
    if len(refs) < len(cases) or 0 < numbers < len(refs):
        raise LostError("with what the program computes")
    if all(case == refs[0] for case in refs):
        return refs[0]
    if isinstance(which, Refs) and which.is_number:
        dims, (by, *arrays) = align([which, *refs], walk.space)
        rules = []
        for rule in by.rules:
            for case, box in find_cases(
                rule, eqn.invars[0].aval.dtype, len(refs), walk.space
            ):
                pair = [Refs(dims, (replace(rule, box=box),)), arrays[case]]
                rules += [chosen for _, chosen in combine(pair, walk.space)]
        return Refs(dims, check_count(rules))
    if numbers:
        return Taint()
    if eqn.invars[0].aval.shape:
        raise LostError("element by element")
    return walk.choose(refs)


def _axis_index(walk: Walker, eqn: Any, ins: list[Value]) -> Refs | Taint:
    names = eqn.params["axis_name"]
    names = names if isinstance(names, tuple) else (names,)
    mesh = dict(walk.here.mesh)
    if not all(name in mesh for name in names):
        return Taint()
    number = flat_index([mesh[name] for name in names], walk.space)
    return Refs((), (Ref(number=number),))


DERIVE: dict[str, Callable[[Walker, Any, list[Value]], Value]] = {
    "axis_index": _axis_index,
    "random_fold_in": _fold,
    "random_seed": _seed,
    "random_split": _split,
    "random_unwrap": _unwrap,
    "random_wrap": _wrap,
    "select_n": _select,
}


def find_keys_below(eqn: Any, ins: list[Value], walk: Walker) -> Value:
    """The keys whose words a primitive below `jax.random` is given."""
    name, words = eqn.primitive.name, [v for v in ins[:2] if isinstance(v, Refs)]
    taint = walk.taint(ins)
    if name == "rng_bit_generator" and words and words[0].dims:
        return _whole_keys(words[0]) or taint
    if name != "threefry2x32" or len(words) < 2:
        return taint
    rules = []
    for one, two in zip(*(array.rules for array in words), strict=False):
        first, second = replace(one, word=None), replace(two, word=None)
        if first != second or (one.word, two.word) != (Affine(0), Affine(1)):
            return taint
        rules.append(first)
    free = {name for array in words for name in array.dims}
    whole = len({len(rules), *(len(array.rules) for array in words)}) == 1
    if not whole or any(rule.variables & free for rule in rules):
        return taint
    return Refs((), tuple(rules))

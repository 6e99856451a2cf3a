# SPDX-License-Identifier: Apache-2.0
"""A walk over a jaxpr that follows each key from its stream to what consumes it.

A key variable is known by a `_Ref`: its stream and the ops that lead to it. Folds,
splits, slices, transposes, calls, branches, scans and vmaps are followed; whatever
else happens to a key leaves a `_Ref` that says why it was lost.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from runner.keys import Op

__all__ = ["Call", "Draw", "Use", "walk_jaxpr"]


@dataclass(frozen=True)
class Use:
    """One consumption of a key: `shape` per key, `bits` per element."""

    primitive: str
    shape: tuple[int, ...]
    bits: int


@dataclass(frozen=True)
class Draw:
    """A place in the program that draws.

    Args:
        stream: The stream that the key comes from; None when from no stream.
        ops: From the stream's key to the key that is consumed.
        path: Flax module path.
        call: Count of `make_rng` calls in that module; None outside `make_rng`.
        axes: Name and size of each axis that `ops` are indexed by.
        use: What the key is consumed by.
        untraced: Why `ops` is not the whole derivation; empty when it is.
        branches: Each `cond` that the draw is in, by number, and the branch.
    """

    stream: str | None
    ops: tuple[Op, ...]
    path: tuple[str, ...]
    call: int | None
    axes: tuple[tuple[str, int], ...]
    use: Use
    untraced: str = ""
    branches: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Call:
    """A `make_rng` call.

    Args:
        names: Part of the path that is hashed: all of it but under a fork.
        path: Module path.
        count: Number of calls of the module so far, this one included.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    count: int


def walk_jaxpr(
    jaxpr: Jaxpr, *, streams: list[str], calls: dict[int, list[Call]]
) -> tuple[tuple[Draw, ...], frozenset[str]]:
    """What a jaxpr draws, and the primitives in it.

    Args:
        jaxpr: Without dead code. Its first inputs are keys, one for each stream.
        streams: Their names.
        calls: `make_rng` calls by the number that Flax folds in.
    """
    keys = dict(zip(jaxpr.invars, map(_Ref, streams), strict=False))
    walk = _Walk(calls, {getattr(var.aval, "dtype", None) for var in keys})
    walk.run(jaxpr, keys)
    return tuple(walk.draws), frozenset(walk.primitives)


@dataclass(frozen=True)
class _Ref:
    """Where a key variable comes from; `dims` are its array dimensions.

    The last `len(dims)` splits in `ops` have no index yet: dimension `i` is the
    range that starts at `start` of the children of split `split`.
    """

    stream: str | None
    ops: tuple[Op, ...] = ()
    dims: tuple["_Dim", ...] = ()
    path: tuple[str, ...] = ()
    call: int | None = None
    untraced: str = ""

    def add(self, op: Op, **changes: Any) -> "_Ref":
        return replace(self, ops=(*self.ops, op), **changes)

    def pick(self, dim: int, index: int | str) -> "_Ref":
        """The keys at one index (a number or an axis) of a dimension."""
        at = self.dims[dim]
        child = index if isinstance(index, str) else at.start + index
        if isinstance(index, str) and at.start:
            return self.lost("an axis over a part of a split")
        ops = list(self.ops)
        ops[at.op] = replace(ops[at.op], index=child)
        dims = self.dims[:dim] + self.dims[dim + 1 :]
        return replace(self, ops=tuple(ops), dims=dims)

    def lost(self, why: str) -> "_Ref":
        return replace(self, untraced=self.untraced or why, dims=())


@dataclass(frozen=True)
class _Dim:
    """A dimension of a key array: children `start` .. of the split `ops[op]`."""

    op: int
    size: int
    start: int = 0


_SAME = {"random_wrap", "random_unwrap", "random_clone", "copy", "copy_p"}
_CONSUMERS = {"random_bits", "random_gamma"}
_BELOW = {"rng_bit_generator", "rng_uniform", "threefry2x32"}


class _Walk:
    """One pass over a jaxpr, carrying what is known of each key variable."""

    def __init__(self, calls: dict[int, list[Call]], dtypes: set[Any]) -> None:
        self.calls, self.dtypes = calls, dtypes
        self.outside: tuple[str, ...] = ()
        self.draws: list[Draw] = []
        self.primitives: set[str] = set()
        self.axes: dict[str, int] = {}
        self.conds = 0
        self.branches: tuple[tuple[int, int], ...] = ()

    def run(self, jaxpr: Jaxpr, refs: dict[Var, _Ref]) -> list[_Ref | None]:
        for eqn in jaxpr.eqns:
            self.primitives.add(eqn.primitive.name)
            ins = [None if isinstance(v, Literal) else refs.get(v) for v in eqn.invars]
            for var, ref in zip(eqn.outvars, self.step(eqn, ins), strict=True):
                if ref is not None:
                    refs[var] = ref
        return [None if isinstance(v, Literal) else refs.get(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        name, ref = eqn.primitive.name, ins[0] if ins else None
        if name in _CONSUMERS:
            self.consume(eqn, ref or _Ref(None, untraced="its key has no known source"))
            return [None] * len(eqn.outvars)
        if name in _BELOW:
            self.consume(eqn, _Ref(None, untraced=f"drawn by {name} itself"))
            return [None] * len(eqn.outvars)
        if name == "random_seed":
            return [_Ref(None, untraced="a seed inside the program")]
        if _sub_jaxprs(eqn):
            return self.enter(eqn, ins)
        if ref is None:
            return [_mix(ins, f"passed through {name}")] * len(eqn.outvars)
        after = self.follow(eqn, ref)
        if after.untraced:
            after = _mix(ins, after.untraced) or after
        return [after] * len(eqn.outvars)

    def follow(self, eqn: Any, ref: _Ref) -> _Ref:
        name, params = eqn.primitive.name, eqn.params
        if name == "random_wrap" and eqn.outvars[0].aval.dtype not in self.dtypes:
            return ref.lost("wrapped as a key of another implementation")
        if name in _SAME or ref.untraced:
            return ref
        if len(eqn.invars[0].aval.shape) != len(ref.dims):
            return ref.lost(f"passed through {name} as words")
        if name == "random_fold_in":
            return self.fold(eqn, ref)
        if name == "random_split":
            (of,) = params["shape"] if len(params["shape"]) == 1 else (0,)
            if not of:
                return ref.lost("split into an array of several dimensions")
            dims = (*ref.dims, _Dim(len(ref.ops), of))
            return ref.add(Op("split", of=of, why="split"), dims=dims)
        if name == "slice" and not any(s != 1 for s in params["strides"] or ()):
            dims = tuple(
                replace(dim, start=dim.start + low, size=high - low)
                for dim, low, high in zip(
                    ref.dims,
                    params["start_indices"],
                    params["limit_indices"],
                    strict=True,
                )
            )
            return replace(ref, dims=dims)
        if name == "transpose":
            return replace(ref, dims=tuple(ref.dims[i] for i in params["permutation"]))
        if name == "squeeze":
            for dim in sorted(params["dimensions"], reverse=True):
                ref = ref.pick(dim, 0)
            return ref
        return ref.lost(f"passed through {name}")

    def fold(self, eqn: Any, ref: _Ref) -> _Ref:
        data = eqn.invars[1]
        if not isinstance(data, Literal) or getattr(data.val, "shape", ()) != ():
            return ref.lost("folded with a number that the program computes")
        value = int(data.val) % 2**32
        found = self.calls.get(value)
        if not found:
            return ref.add(Op("fold_in", value, why="fold_in"))
        named = self.module_path(eqn)
        at = next((f for f in found if f.path == named), found[0])
        # A fork (nn.jit, nn.fold_rngs) hashes twice, and JAX may share its trace.
        path = at.path if ref.call is None else (*ref.path, *at.names)
        call = at.count
        why = f"path {'/'.join(path) or '(root)'} call {call}"
        return ref.add(Op("fold_in", value, why=why), path=path, call=call)

    def enter(self, eqn: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        outside, self.outside = self.outside, (*self.outside, *_stack(eqn))
        try:
            return self.enter_inner(eqn, ins)
        finally:
            self.outside = outside

    def module_path(self, eqn: Any) -> tuple[str, ...]:
        """Flax module path from the name stacks, without the root's own name."""
        return (*self.outside, *_stack(eqn))[1:]

    def enter_inner(self, eqn: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self.enter_scan(eqn, ins)
        if name == "cond":
            outs = self.enter_cond(params["branches"], ins[1:])
            return [_join(*refs) for refs in zip(*outs, strict=True)]
        if name == "while":
            return self.enter_while(eqn, ins)
        if name == "shard_map":
            ins = [_lose_dims(ref) for ref in ins]
        (inner,) = _sub_jaxprs(eqn)[:1]
        return self.call(inner, ins)

    def call(self, jaxpr: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
        given = zip(inner.invars, ins[len(ins) - len(inner.invars) :], strict=True)
        return self.run(inner, {v: r for v, r in given if r is not None})

    def enter_scan(self, eqn: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        axis = self.new_axis("scan", eqn, eqn.params["length"])
        body: list[_Ref | None] = list(ins[:consts])
        body += [r and r.lost("carried through a scan") for r in ins[consts:][:carry]]
        for ref in ins[consts + carry :]:
            body.append(ref.pick(0, axis) if ref and ref.dims else ref)
        outs = self.call(eqn.params["jaxpr"], body)
        return [r and r.lost("comes out of a scan") for r in outs]

    def enter_cond(
        self, branches: tuple[Any, ...], ins: list[_Ref | None]
    ) -> list[list[_Ref | None]]:
        self.conds += 1
        cond, outside, outs = self.conds, self.branches, []
        for number, branch in enumerate(branches):
            self.branches = (*outside, (cond, number))
            outs.append(self.call(branch, ins))
        self.branches = outside
        return outs

    def enter_while(self, eqn: Any, ins: list[_Ref | None]) -> list[_Ref | None]:
        first, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts = ins[first : first + body]
        carry = [
            r and r.lost("carried through a while loop") for r in ins[first + body :]
        ]
        self.call(eqn.params["cond_jaxpr"], [*ins[:first], *carry])
        outs = self.call(eqn.params["body_jaxpr"], [*consts, *carry])
        return [r and r.lost("comes out of a while loop") for r in outs]

    def new_axis(self, kind: str, eqn: Any, size: int) -> str:
        stacks = [
            _stack(e) for b in _sub_jaxprs(eqn) for e in getattr(b, "jaxpr", b).eqns
        ]
        within = os.path.commonprefix([s for s in stacks if s])  # noqa: RUF071
        path = "/".join((*self.outside, *within)[1:])
        base = f"{kind}:{path}" if path else kind
        name, n = base, 1
        while name in self.axes:
            n += 1
            name = f"{base}#{n}"
        self.axes[name] = size
        return name

    def consume(self, eqn: Any, ref: _Ref) -> None:
        batch = len(eqn.invars[0].aval.shape) if eqn.primitive.name in _CONSUMERS else 0
        for dim in list(ref.dims):
            ref = ref.pick(0, self.new_axis("vmap", eqn, dim.size))
        named = {op.index for op in ref.ops if isinstance(op.index, str)}
        axes = tuple((n, size) for n, size in self.axes.items() if n in named)
        shape = tuple(eqn.params.get("shape", eqn.outvars[-1].aval.shape[batch:]))
        bits = eqn.params.get("bit_width", eqn.outvars[-1].aval.dtype.itemsize * 8)
        use = Use(eqn.primitive.name, shape, bits)
        path = ref.path if ref.call is not None else self.module_path(eqn)
        ops = () if ref.untraced else ref.ops
        axes = () if ref.untraced else axes
        self.draws.append(
            Draw(
                ref.stream,
                ops,
                path,
                ref.call,
                axes,
                use,
                ref.untraced,
                self.branches,
            )
        )


def _join(*refs: _Ref | None) -> _Ref | None:
    """What is known of a value that comes from one of several branches."""
    some = [r for r in refs if r is not None]
    if not some or all(r == some[0] for r in refs):
        return some[0] if some else None
    return _mix(refs, "comes out of branches that differ")


def _lose_dims(ref: _Ref | None) -> _Ref | None:
    """A key array that a mesh cuts up: which part is here is not known."""
    return ref.lost("split over a mesh") if ref is not None and ref.dims else ref


def _mix(refs: Iterable[_Ref | None], why: str) -> _Ref | None:
    """A value made of others: of their stream, if it is one."""
    some = [r for r in refs if r is not None]
    if not some:
        return None
    streams = {r.stream for r in some}
    return replace(
        some[0].lost(why), stream=streams.pop() if len(streams) == 1 else None
    )


def _sub_jaxprs(eqn: Any) -> list[Any]:
    values = list(eqn.params.values())
    values += [v for p in values if isinstance(p, tuple) for v in p]
    return [v for v in values if isinstance(v, Jaxpr | ClosedJaxpr)]


def _stack(eqn: Any) -> tuple[str, ...]:
    """Names of modules on a name stack; `vmap(x)` is x, `Coder.encode` is Coder."""
    parts = str(eqn.source_info.name_stack).split("/")
    names = [part.rpartition("(")[2].rstrip(")").partition(".")[0] for part in parts]
    return tuple(name for name in names if name)

# SPDX-License-Identifier: Apache-2.0
"""The ledger: every key of a run, as rules that replay.

A run's ledger holds its streams and, for each place that draws, the derivation of
its key with the coordinates left open. `expand` closes them for one step. It can be
read long after, without the program: `runner.keys.derive_key` is all it needs.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.audit.trace import Draw
from runner.errors import ConfigError
from runner.keys import (
    base_key_words,
    derive_key,
    host_words,
    key_words,
    rng_flags,
)
from runner.ops import Affine, Op, bind_ops
from runner.program import Compiled
from runner.records.events import StreamRow
from runner.spec import Coordinate, Phase, RngSpec, StreamKind

__all__ = [
    "bind_places",
    "expand",
    "first_step",
    "make_ledger",
    "rng_of",
    "spell_derivation",
    "stream_rows",
]

SCHEMA = 1
_LONGEST_CARRY = 1_000_000
_MOST_PLACES = 2**22


def make_ledger(program: Compiled) -> dict[str, Any]:
    """The ledger of a program, as plain data."""
    spec, plan = program.spec, program.plan
    with rng_flags(spec.rng):
        keys = base_key_words(plan)
    return {
        "schema": SCHEMA,
        "experiment": spec.experiment,
        "rng": {
            "seed": spec.rng.seed,
            "impl": str(spec.rng.impl),
            "partitionable": spec.rng.partitionable,
            "fix_separator": spec.rng.fix_separator,
        },
        "sizes": dataclasses.asdict(program.sizes),
        "streams": [_stream_row(program, name, keys) for name in plan.streams],
        "draws": [
            _draw_row(program, phase, draws)
            for phase, trace in program.traces.items()
            for draws in _same_key(trace.draws)
        ],
    }


def _stream_row(
    program: Compiled, name: str, keys: Mapping[str, list[int]]
) -> dict[str, Any]:
    stream = program.plan.streams[name]
    row: dict[str, Any] = {
        "name": name,
        "kind": str(stream.spec.kind),
        "seed": stream.seed,
        "derive": str(stream.spec.derivation),
        "phases": [str(phase) for phase in stream.spec.phases],
        "per": {str(c): str(rule) for c, rule in stream.spec.per.items()},
    }
    if stream.spec.kind is StreamKind.HOST:
        row["used_by"] = list(program.host_uses.get(name, ()))
        return {**row, "bit_generator": "Philox", "spawn_key": host_words(stream)}
    ops = [_op_row(op) for op in stream.base]
    return {**row, "derivation": ops, "key": keys[name]}


def _same_key(draws: tuple[Draw, ...]) -> Iterator[list[Draw]]:
    """Draws that share a key, together; one that is not traced stands alone."""
    groups: dict[Any, list[Draw]] = {}
    for i, draw in enumerate(draws):
        key = i if draw.untraced else (draw.stream, _meaning(draw.ops), draw.axes)
        groups.setdefault(key, []).append(draw)
    yield from groups.values()


def _meaning(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    return tuple(dataclasses.replace(op, why="") for op in ops)


def _draw_row(program: Compiled, phase: Phase, draws: list[Draw]) -> dict[str, Any]:
    draw = draws[0]
    row: dict[str, Any] = {
        "phase": str(phase),
        "stream": draw.stream,
        "path": list(draw.path),
        "call": draw.call,
        "axes": dict(draw.axes),
        "uses": [
            {
                "primitive": d.use.primitive,
                "shape": list(d.use.shape),
                "bits": d.use.bits,
            }
            for d in draws
        ],
    }
    if all(map(_is_conditional, draws)):
        row["conditional"] = True
    if draw.untraced or draw.stream is None:
        return {**row, "untraced": draw.untraced or "from no declared stream"}
    stream = program.plan.streams[draw.stream]
    first = stream.ops(phase, program.coordinates[phase])
    row["axes"] = {axis: stream.axes[axis] for op in first for axis in op.axes}
    row["axes"] |= dict(draw.axes)
    return {**row, "derivation": [_op_row(op) for op in (*first, *draw.ops)]}


def _is_conditional(draw: Draw) -> bool:
    """Whether a step may go by without it: in a branch, or a loop of any length."""
    return bool(draw.branches) or None in dict(draw.within).values()


def _op_row(op: Op) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op.op}
    if op.op == "split":
        row |= {"index": _number_row(op.index), "of": op.of}
    elif op.op == "repeat":
        row |= {"times": _number_row(op.index), "counter": op.counter}
        row |= {"body": [_op_row(inner) for inner in op.body]}
    elif op.coordinate is not None:
        row |= {"coordinate": str(op.coordinate)}
    else:
        row |= {"value": _number_row(op.value)}
    return {**row, "why": op.why} if op.why else row


def _number_row(number: Any) -> Any:
    if not isinstance(number, Affine):
        return number
    return {"offset": number.offset, "axes": dict(number.terms)}


def _read_op(row: Mapping[str, Any]) -> Op:
    value = _read_number(row.get("value", 0))
    if "coordinate" in row:
        value = Coordinate(row["coordinate"])
    return Op(
        row["op"],
        value,
        index=_read_number(row.get("index", row.get("times", 0))),
        of=row.get("of", 0),
        why=row.get("why", ""),
        body=tuple(_read_op(inner) for inner in row.get("body", ())),
        counter=row.get("counter", ""),
    )


def _read_number(number: Any) -> Any:
    if not isinstance(number, Mapping):
        return number
    return Affine(number["offset"], tuple(sorted(number["axes"].items())))


def stream_rows(ledger: Mapping[str, Any]) -> tuple[StreamRow, ...]:
    """A ledger's streams, as a table shows them."""
    rows = []
    for stream in ledger["streams"]:
        name = stream["name"]
        if stream["kind"] == StreamKind.HOST:
            spawn_key = ", ".join(map(str, stream["spawn_key"]))
            derivation = "Philox(SeedSequence)"
            key = f"{stream['seed']}, ({spawn_key})"
            places = stream["used_by"]
        else:
            derivation = spell_derivation(stream["derivation"])
            key = " ".join(f"{word:08x}" for word in stream["key"])
            places = [
                f"{draw['phase']} {'/'.join(draw['path']) or '(root)'}"
                for draw in ledger["draws"]
                if draw["stream"] == name
            ]
        rows.append(
            StreamRow(
                name=name,
                kind=stream["kind"],
                derivation=derivation,
                key=key,
                phases=", ".join(stream["phases"]),
                per=", ".join(_spell_rule(*item) for item in stream["per"].items()),
                draws=tuple(places),
            )
        )
    return tuple(rows)


def spell_derivation(rows: Sequence[Mapping[str, Any]]) -> str:
    """A derivation as one expression, with the names of open coordinates and axes."""
    return _spell(rows, start="")


def _spell(rows: Sequence[Mapping[str, Any]], *, start: str) -> str:
    text = start
    for row in rows:
        value = row.get("value", row.get("coordinate"))
        if row["op"] == "seed":
            text = f"key({value})"
        elif row["op"] == "split":
            text = f"split({text}, {row['of']})[{_spell_number(row['index'])}]"
        elif row["op"] == "repeat":
            body = _spell(row["body"], start="key")
            text = f"repeat({text}, key -> {body}, {_spell_number(row['times'])})"
        else:
            text = f"{row['op']}({text}, {_spell_number(value)})"
    return text


def _spell_number(number: Any) -> str:
    """`2 * scan:layers - 1`, or a number or name as it is."""
    if not isinstance(number, Mapping):
        return str(number)
    text = ""
    for axis, by in [*sorted(number["axes"].items()), ("", number["offset"])]:
        if by:
            factor = f"{abs(by)} * " if axis and abs(by) != 1 else ""
            sign = ("-" if by < 0 else "") if not text else f" {'+-'[by < 0]} "
            text += f"{sign}{factor}{axis or abs(by)}"
    return text or "0"


def first_step(ledger: Mapping[str, Any], draw: Mapping[str, Any]) -> int:
    """The first step at which an entry of the ledger is drawn from."""
    sizes = ledger["sizes"]
    if draw["phase"] != Phase.EVAL:
        return 0
    return int(min(sizes["eval_every"] or sizes["steps"], sizes["steps"]))


def _spell_rule(coordinate: str, rule: str) -> str:
    return coordinate if rule == "fold_in" else f"{coordinate} ({rule})"


def rng_of(ledger: Mapping[str, Any]) -> RngSpec:
    """The generator flags under which a ledger's keys were derived."""
    return RngSpec(**ledger["rng"])


def expand(
    ledger: Mapping[str, Any], draw: Mapping[str, Any], *, step: int
) -> Iterator[dict[str, Any]]:
    """The keys of one entry at one step, each with a derivation that replays.

    Args:
        ledger: As `make_ledger` returns it.
        draw: One of its `draws`.
        step: Global step, 0-based; may lie far beyond what was trained.

    Yields:
        An entry for each microbatch and each index of a scan or vmap; `step` is
        null in the phase `init`, `key` and `derivation` where a draw is untraced.
    """
    phase = draw["phase"]
    shown = {name: draw[name] for name in ("phase", "stream", "path", "call")}
    shown |= {"step": None if phase == Phase.INIT else step}
    tail = {"impl": ledger["rng"]["impl"], "uses": draw["uses"]}
    if "derivation" not in draw:
        missing = {"key": None, "derivation": None, "untraced": draw["untraced"]}
        yield {**shown, "index": {}, **tail, **missing}
        return
    epoch = step // ledger["sizes"]["steps_per_epoch"]
    if step > _LONGEST_CARRY and "carry" in [row["op"] for row in draw["derivation"]]:
        raise ConfigError(
            "--step",
            "too many splits to list for a stream that is carried",
            got=step,
            allowed=f"At most {_LONGEST_CARRY:,} for stream {draw['stream']}",
        )
    fixed: dict[str, int] = {Coordinate.STEP: step, Coordinate.EPOCH: epoch}
    known: dict[tuple[Op, ...], Any] = {}
    for index, ops in bind_places(ledger, draw):
        turns = iter(range(_LONGEST_CARRY))
        bound = tuple(
            unrolled for op in bind_ops(ops, fixed) for unrolled in _unroll(op, turns)
        )
        key = _derive(bound, known, impl=ledger["rng"]["impl"])
        rows = [row for op in bound for row in _public_rows(op)]
        entry = {**shown, "index": index, **tail}
        yield {**entry, "key": key_words(key), "derivation": rows}


def bind_places(
    ledger: Mapping[str, Any], draw: Mapping[str, Any]
) -> Iterator[tuple[dict[str, int], tuple[Op, ...]]]:
    """Each microbatch and index of an entry, with ops that only the step is open in.

    Args:
        ledger: As `make_ledger` returns it.
        draw: One of its `draws` that has a derivation.
    """
    ops = tuple(_read_op(row) for row in draw["derivation"])
    axes = dict(draw["axes"])
    if Coordinate.MICROBATCH in [op.coordinate for op in ops]:
        is_train = draw["phase"] == Phase.TRAIN
        name = "microbatches" if is_train else "eval_batches"
        axes = {str(Coordinate.MICROBATCH): ledger["sizes"][name], **axes}
    if math.prod(axes.values()) > _MOST_PLACES:
        raise ValueError(f"more than {_MOST_PLACES:,} keys at one place")
    kept: dict[str, Any] = {c: c for c in (Coordinate.STEP, Coordinate.EPOCH)}
    for place in itertools.product(*map(range, axes.values())):
        index = dict(zip(axes, place, strict=True))
        yield index, bind_ops(ops, {**kept, **index})


def _derive(ops: tuple[Op, ...], known: dict[tuple[Op, ...], Any], *, impl: str) -> Any:
    """The key of a derivation; turns of a loop go on from the one before."""
    at = len(ops)
    while at and ops[:at] not in known:
        at -= 1
    key = known.get(ops[:at])
    for i in range(at, len(ops)):
        key = known[ops[: i + 1]] = derive_key(ops[i : i + 1], impl=impl, start=key)
    return key


def _unroll(op: Op, turns: Iterator[int]) -> Iterator[Op]:
    """A `repeat` with all its numbers, as the ops of its turns, while there are any."""
    if op.op != "repeat":
        yield op
        return
    for turn in range(int(op.index)):  # type: ignore[arg-type]
        if next(turns, None) is None:
            raise ValueError(f"more than {_LONGEST_CARRY:,} turns of a loop")
        for inner in bind_ops(op.body, {op.counter: turn}):
            yield from _unroll(inner, turns)


def _public_rows(op: Op) -> list[dict[str, Any]]:
    """An op in terms of `jax.random` alone: a carry is a chain of splits."""
    if op.op != "carry":
        return [_op_row(op)]
    on = {"op": "split", "index": 1, "of": 2, "why": "carried on"}
    steps = int(op.value)
    here = {"op": "split", "index": 0, "of": 2, "why": f"{op.why} {steps}"}
    return [*([on] * steps), here]

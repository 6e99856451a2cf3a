# SPDX-License-Identifier: Apache-2.0
"""What a report shows of one run, as tables."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from runner.differences.leaves import list_leaves
from runner.errors import RecordError
from runner.keys import rng_flags
from runner.ledger import expand, first_step, rng_of, spell_derivation
from runner.records.plain import read_plain_json
from runner.records.record import Record
from runner.report.curves import Curves
from runner.report.table import Table, Weight, make_table, spell
from runner.sinks.text import format_duration

__all__ = ["run_tables"]

_DRAWS = 200  # rows; `runner keys` prints all
_FOLDED = Weight.FOLDED


def run_tables(record: Record, *, curves: Curves) -> tuple[Table, ...]:
    """The tables of a run; one without rows is left out.

    Raises:
        RecordError: a file of the record is damaged.
    """
    tables = (
        _about(record.manifest),
        _verdict(record),
        _metrics(curves),
        _hazards(record.manifest),
        _streams(record.ledger),
        _draws(record.ledger),
        _leaves("config", record.config),
        _environment(record.manifest),
    )
    return tuple(table for table in tables if table.rows)


def _about(manifest: Mapping[str, Any]) -> Table:
    return make_table("run", ("", ""), [row for row in _facts(manifest) if row[1]])


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    reason, guarantee = manifest["reason"], manifest["guarantee"]
    yield "status", _joined(manifest["status"], reason)
    for name in ("experiment", "run_id", "seed", "steps"):
        yield name.replace("_", " "), str(manifest[name])
    if manifest.get("seconds") is not None:
        yield "time", format_duration(manifest["seconds"])
    yield "started", manifest["started"]
    yield "ended", manifest.get("ended")
    if best := manifest.get("best"):
        yield "best", f"{_number(best['value'])} at step {best['step']}"
    yield "guarantee", _joined(guarantee["level"], "; ".join(guarantee["reasons"]))
    yield "construct", manifest["construct"]
    if observed := manifest.get("observed"):
        counts = f"{observed['keys']} keys at {observed['draws']} draws"
        yield "observed", f"{observed['status']}: {counts}"
    for name in ("parent", "sweep"):
        if value := manifest.get(name):
            yield name, ", ".join(f"{k} {spell(v)}" for k, v in value.items())
    for session in manifest.get("resumed") or ():
        yield "resumed", ", ".join(f"{k} {spell(v)}" for k, v in session.items())
    git = manifest["git"]
    if git.get("commit"):
        yield "git", f"{git['commit']}{', changed since' if git.get('dirty') else ''}"


def _joined(head: str, tail: str) -> str:
    return f"{head}: {tail}" if tail else head


def _verdict(record: Record) -> Table:
    """What `reproduce` said, if this run was made by it; its file has no digest."""
    content = record.files.read("verdict.json")
    if content is None:
        return make_table("verdict", ("", ""), [])
    try:
        verdict = read_plain_json(content, name="verdict.json")
    except RecordError as error:
        return make_table("verdict", ("", ""), [("damaged", error)])
    rows: list[tuple[Any, Any]] = []
    if isinstance(verdict, Mapping):
        rows += [(name, spell(verdict[name])) for name in _SAID if name in verdict]
        checks = verdict.get("checks")
        for check in checks if isinstance(checks, list) else ():
            rows.append(_check(check))
    return make_table("verdict", ("", ""), rows or [("verdict", spell(verdict))])


_SAID = ("level", "promised", "kept", "reason")
_FINDINGS = {True: "equal", False: "differs", None: "nothing to compare"}


def _check(check: Any) -> tuple[str, str]:
    if not isinstance(check, Mapping):
        return "check", spell(check)
    equal = check.get("equal")
    is_known = equal is None or isinstance(equal, bool)
    said = _FINDINGS[equal] if is_known else spell(equal)
    others = {k: v for k, v in check.items() if k not in ("what", "equal")}
    rest = [f"{k} {spell(v)}" for k, v in others.items() if v not in (None, "")]
    return spell(check.get("what", "check")), ", ".join([said, *rest])


def _metrics(curves: Curves) -> Table:
    rows = []
    for (phase, metric), (steps, values) in curves.items():
        known = [(v, s) for s, v in zip(steps, values, strict=True) if v is not None]
        low = min(known, default=(None, None))
        high = max(known, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
        cells = (_number(values[-1]), _number(low[0]), low[1], _number(high[0]))
        rows.append((f"{phase}/{metric}", *cells, high[1]))
    columns = ("metric", "last", "lowest", "at step", "highest", "at step")
    return make_table("metrics", columns, rows)


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _hazards(manifest: Mapping[str, Any]) -> Table:
    columns = ("code", "severity", "path", "what", "fix", "draws")
    rows = [
        [*(hazard[name] for name in columns[:-1]), ", ".join(hazard.get("draws") or ())]
        for hazard in manifest["hazards"]
    ]
    return make_table("hazards", columns, rows)


def _streams(ledger: Mapping[str, Any]) -> Table:
    columns = ("stream", "kind", "seed", "derive", "per", "phases", "key")
    rows = [
        (
            stream["name"],
            stream["kind"],
            stream["seed"],
            stream["derive"],
            ", ".join(_rule(*item) for item in stream["per"].items()),
            ", ".join(stream["phases"]),
            _hex(stream["key"]) if "key" in stream else _host(stream),
        )
        for stream in ledger["streams"]
    ]
    return make_table("streams", columns, rows)


def _rule(coordinate: str, rule: str) -> str:
    return coordinate if rule == "fold_in" else f"{coordinate} ({rule})"


def _host(stream: Mapping[str, Any]) -> str:
    words = ", ".join(map(str, stream["spawn_key"]))
    return f"{stream['bit_generator']} {stream['seed']}, ({words})"


def _draws(ledger: Mapping[str, Any]) -> Table:
    """The entries of the ledger, each with the first of its keys."""
    draws = ledger["draws"]
    with rng_flags(rng_of(ledger)):
        rows = [_draw_row(ledger, draw) for draw in draws[:_DRAWS]]
    more = len(draws) - len(rows)
    caption = f"draws (and {more} more: runner keys)" if more else "draws"
    columns = ("phase", "stream", "path", "call", "keys", "first key", "rule", "draws")
    return make_table(caption, columns, rows, weight=_FOLDED)


def _draw_row(ledger: Mapping[str, Any], draw: Mapping[str, Any]) -> list[Any]:
    step = first_step(ledger, draw)
    entry = next(expand(ledger, draw, step=step))
    at = "" if entry["step"] is None else f"step {entry['step']}: "
    is_traced = "derivation" in draw
    key = f"{at}{_hex(entry['key'])}" if is_traced else f"untraced: {draw['untraced']}"
    return [
        draw["phase"],
        draw["stream"] or "(none)",
        "/".join(draw["path"]) or "(root)",
        draw["call"],
        _count_keys(ledger, draw) if is_traced else "",
        key,
        spell_derivation(draw["derivation"]) if is_traced else "",
        ", ".join(f"{use['primitive']} {use['shape']}" for use in draw["uses"]),
    ]


def _count_keys(ledger: Mapping[str, Any], draw: Mapping[str, Any]) -> str:
    """Keys of an entry at one step: one for each microbatch and index."""
    count = math.prod(draw["axes"].values())
    if "microbatch" in [op.get("coordinate") for op in draw["derivation"]]:
        is_train = draw["phase"] == "train"
        count *= ledger["sizes"]["microbatches" if is_train else "eval_batches"]
    return f"{count:,}" if draw["phase"] == "init" else f"{count:,} a step"


def _hex(words: list[int]) -> str:
    return " ".join(f"{word:08x}" for word in words)


def _leaves(caption: str, value: Any) -> Table:
    rows = [(path, spell(leaf)) for path, leaf in list_leaves(value).items()]
    return make_table(caption, ("leaf", "value"), rows, weight=_FOLDED)


def _environment(manifest: Mapping[str, Any]) -> Table:
    known = ("versions", "platform", "rng", "digests")
    return _leaves("environment", {name: manifest[name] for name in known})

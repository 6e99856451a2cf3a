# SPDX-License-Identifier: Apache-2.0
"""`runner keys RUN`: every key that a recorded run used."""

import argparse
import fnmatch
import json
import sys
from typing import Any

from runner.cli.tables import print_table
from runner.errors import ConfigError, RecordError, did_you_mean
from runner.records.record import read_record
from runner.sinks.text import clean
from runner.spec import Phase

__all__ = ["main"]

_UNREPLAYABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
_SHOWN = ("run_id", "experiment", "status", "seed", "steps", "rng")


def main(args: list[str]) -> int:
    """Prints the streams and keys of a run, as tables or as one JSON document."""
    options = _parser().parse_args(args)
    record = read_record(options.run)
    try:
        document = _document(record.manifest, record.ledger, options)
    except _UNREPLAYABLE as error:
        what = f"keys/ledger.json is damaged (it does not replay: {error!r})"
        raise RecordError(f"{options.run}: {what}.") from error
    if options.json:
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        _print_tables(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runner keys", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, .zip or .tar.gz")
    phases = [str(phase) for phase in Phase]
    parser.add_argument("--phase", choices=phases, help="of this phase alone")
    parser.add_argument("--step", type=_step, help="at this step (default: the first)")
    parser.add_argument("--stream", help="of this stream alone")
    parser.add_argument("--path", metavar="GLOB", help="module path, as '*/Dropout_*'")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _step(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2147483647 (got {text!r})")
    return int(text)


def _document(manifest: Any, ledger: Any, options: argparse.Namespace) -> Any:
    from runner.keys import rng_flags
    from runner.ledger import expand, first_step, rng_of

    names = [stream["name"] for stream in ledger["streams"]]
    if options.stream is not None and options.stream not in names:
        raise ConfigError(
            "--stream",
            "not a stream of this run",
            got=options.stream,
            allowed=f"Streams: {', '.join(names)}",
            fix=did_you_mean(options.stream, names),
        )
    draws = []
    with rng_flags(rng_of(ledger)):
        for draw in ledger["draws"]:
            if not _is_wanted(draw, options):
                continue
            step = options.step
            if step is None:
                step = first_step(ledger, draw)
            for entry in expand(ledger, draw, step=step):
                if options.step is None and "derivation" in draw:
                    entry["rule"] = draw["derivation"]
                draws.append(entry)
    run = {name: manifest[name] for name in _SHOWN}
    return {"run": run, "streams": ledger["streams"], "draws": draws}


def _is_wanted(draw: Any, options: argparse.Namespace) -> bool:
    path = "/".join(draw["path"])
    return (
        options.phase in (None, draw["phase"])
        and options.stream in (None, draw["stream"])
        and (options.path is None or fnmatch.fnmatchcase(path, options.path))
    )


def _print_tables(document: Any) -> None:
    run = document["run"]
    shown = (run["experiment"], run["run_id"], run["status"], f"seed {run['seed']}")
    print("  ".join(map(clean, shown)))
    print()
    print_table(
        ("stream", "kind", "phases", "per", "seed", "key"),
        [
            (
                stream["name"],
                stream["kind"],
                ", ".join(stream["phases"]),
                ", ".join(stream["per"]),
                stream["seed"],
                _hex(stream.get("key")) or "host",
            )
            for stream in document["streams"]
        ],
    )
    print()
    print_table(
        ("phase", "step", "stream", "path", "call", "index", "key", "draws"),
        [_draw_row(draw) for draw in document["draws"]],
    )


def _draw_row(draw: Any) -> tuple[Any, ...]:
    return (
        draw["phase"],
        "" if draw["step"] is None else draw["step"],
        draw["stream"] or "(none)",
        "/".join(draw["path"]) or "(root)",
        "" if draw["call"] is None else draw["call"],
        ", ".join(f"{name} {i}" for name, i in draw["index"].items()),
        _hex(draw["key"]) or f"untraced: {draw['untraced']}",
        ", ".join(f"{u['primitive']} {u['shape']}" for u in draw["uses"]),
    )


def _hex(words: list[int] | None) -> str:
    return " ".join(f"{word:08x}" for word in words or [])

# SPDX-License-Identifier: Apache-2.0
"""`runner plan +experiment=NAME`: what a run would draw; runs nothing."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from omegaconf import open_dict

from runner.cli.config import compose, read_composed
from runner.cli.refusal import refusal_of
from runner.cli.tables import print_table
from runner.determinism import settle_backend
from runner.errors import RunnerError
from runner.processes.place import in_one_process
from runner.sinks.text import clean

if TYPE_CHECKING:
    from runner.program import Compiled

__all__ = ["main"]


def main(args: list[str]) -> int:
    """Prints the plan of a run, as tables or as one JSON document."""
    parser = argparse.ArgumentParser(prog="runner plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for training")
    parser.add_argument("--config-dir", "-cd", help="your own groups")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out FLOPs and memory"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="the groups of a sweep's jobs"
    )
    options = parser.parse_intermixed_args(args)
    if options.multirun:
        from runner.cli.plan_sweep import plan_sweep

        return plan_sweep(
            options.overrides, config_dir=options.config_dir, as_json=options.json
        )
    try:
        config = compose(options.overrides, config_dir=options.config_dir)
    except RunnerError:
        raise
    except Exception as error:  # whatever Hydra says of a command line
        raise refusal_of(error, options.overrides) from error
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    composed = read_composed(config, choices=choices)
    spec = in_one_process(composed.spec)
    settle_backend(spec)
    from runner.compile import compile_run

    program = compile_run(spec)
    document = _document(program)
    document["costs"] = None if options.no_compile else _costs(program, document)
    document["collectives"] = _collectives(program, document)
    if options.json:
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        _print_tables(document, program)
    return 0


def _document(program: "Compiled") -> dict[str, Any]:
    import jax

    from runner.guarantee import guarantee_of
    from runner.hazards.find import find_hazards
    from runner.ledger import make_ledger
    from runner.lift_keys import count_lift_keys
    from runner.program import Program
    from runner.shardings import list_shardings

    ledger = make_ledger(program)
    guarantee = guarantee_of(program)
    leaves = jax.tree_util.tree_leaves_with_path(program.initial.params)
    return {
        "experiment": program.spec.experiment,
        "steps": program.steps,
        "construct": str(program.construct),
        "inputs": dict(program.hypers),
        "constants": list(program.baked),
        "streams": ledger["streams"],
        "draws": ledger["draws"],
        "lifts": count_lift_keys(program),
        "hazards": [hazard.to_plain() for hazard in find_hazards(program)],
        "parameters": [
            {
                "path": jax.tree_util.keystr(path, simple=True, separator="/"),
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "size": leaf.size,
            }
            for path, leaf in leaves
        ],
        "mesh": dict(program.spec.mesh.axes),
        "shardings": list_shardings(program) if isinstance(program, Program) else [],
        "determinism": str(program.spec.determinism),
        "guarantee": {
            "level": str(guarantee.level),
            "reasons": list(guarantee.reasons),
        },
    }


def _costs(program: "Compiled", document: dict[str, Any]) -> dict[str, Any] | None:
    """What the compiler estimates; None for a program that can't be compiled."""
    from runner.costs import estimate_costs
    from runner.hazards.find import find_hazards
    from runner.platforms import set_compile_cache

    if any(hazard.is_fatal for hazard in find_hazards(program)):
        return None
    set_compile_cache(program.spec.train.compile_cache)
    return estimate_costs(program.programs)


def _collectives(program: "Compiled", document: dict[str, Any]) -> list[dict[str, Any]]:
    """What the devices exchange in a call of the compiled step; [] if it is not."""
    if document["costs"] is None or not document["mesh"]:
        return []
    from runner.shardings import list_collectives

    programs = program.programs
    used = [programs[name] for name in ("train", "update", "call") if name in programs]
    return list_collectives(used[0])


def _print_tables(document: dict[str, Any], program: "Compiled") -> None:
    guarantee = document["guarantee"]
    total = sum(p["size"] for p in document["parameters"])
    print(
        f"{document['experiment']}: {document['steps']:,} steps, {total:,} parameters"
    )
    print(f"guarantee: {guarantee['level']}, {'; '.join(guarantee['reasons'])}")
    if document["determinism"] == "strict":
        kept = "kept" if guarantee["level"] == "bit-exact" else "refused when run"
        print(f"determinism: strict, {kept}")
    inputs = ", ".join(f"{k} = {v:g}" for k, v in document["inputs"].items())
    print(f"inputs of the program: {inputs or 'none'}")
    if document["constants"]:
        print(f"constants in it: {', '.join(document['constants'])}")
    print()
    print_table(
        ("stream", "kind", "phases", "per", "key"),
        [
            (
                stream["name"],
                stream["kind"],
                ", ".join(stream["phases"]),
                ", ".join(stream["per"]),
                _derivation(stream.get("derivation")) or "Philox(SeedSequence)",
            )
            for stream in document["streams"]
        ],
    )
    print()
    print_table(
        ("phase", "stream", "path", "call", "keys", "derivation"),
        [
            (
                draw["phase"],
                draw["stream"] or "(none)",
                "/".join(draw["path"]) or "(root)",
                "" if draw["call"] is None else draw["call"],
                " x ".join(f"{n} {name}" for name, n in draw["axes"].items()) or 1,
                _derivation(draw.get("derivation")) or f"untraced: {draw['untraced']}",
            )
            for draw in document["draws"]
        ],
    )
    print()
    if document["lifts"]:
        print_table(
            ("phase", "lift", "keys", "note"),
            [
                (row["phase"], row["axis"], _spell_keys(row), row["note"])
                for row in document["lifts"]
            ],
        )
        print()
    for hazard in document["hazards"]:
        at = f" ({', '.join(hazard['draws'])})" if hazard["draws"] else ""
        where = f"{hazard['code']} {hazard['severity']}: {hazard['path']}"
        stop = "" if hazard["fix"].endswith("?") else "."
        print(clean(f"{where}: {hazard['what']}{at}. {hazard['fix']}{stop}"))
    print("" if document["hazards"] else "hazards: none\n")
    print_table(
        ("parameter", "shape", "dtype", "size"),
        [
            (p["path"], p["shape"], p["dtype"], f"{p['size']:,}")
            for p in document["parameters"]
        ],
    )
    if document["shardings"]:
        _print_mesh(document)
        _draw(program)
    _print_costs(document["costs"])


def _spell_keys(row: dict[str, Any]) -> str:
    """`dropout: 4 keys over scan:layers; params: 1 key, shared`."""
    parts = []
    for stream in row["streams"]:
        count = "unknown" if stream["keys"] is None else f"{stream['keys']:,}"
        word = "key" if stream["keys"] == 1 else "keys"
        over = f" over {row['axis']}" if stream["rule"] == "split" else ""
        rule = "" if over or stream["rule"] == "passed" else f", {stream['rule']}"
        parts.append(f"{stream['stream']}: {count} {word}{over}{rule}")
    return "; ".join(parts)


def _print_mesh(document: dict[str, Any]) -> None:
    """What each device holds, and what they exchange."""
    print()
    axes = " x ".join(f"{n} {name}" for name, n in document["mesh"].items())
    print(f"mesh: {axes}")
    print_table(
        ("array", "names", "axes", "shape", "on a device", "bytes there"),
        [
            (
                *(row["path"], _names(row), _axes(row), row["shape"], row["shard"]),
                f"{row['bytes']:,}",
            )
            for row in document["shardings"]
        ],
    )
    if document["collectives"]:
        print()
        print_table(
            ("collective of a step", "number", "bytes"),
            [
                (row["kind"], row["count"], f"{row['bytes']:,}")
                for row in document["collectives"]
            ],
        )


def _draw(program: "Compiled") -> None:
    from runner.program import Program
    from runner.shardings import draw_shardings

    if isinstance(program, Program):
        draw_shardings(program)


def _names(row: dict[str, Any]) -> str:
    names = row["names"] or []
    return ", ".join(name or "-" for name in names) if any(names) else ""


def _axes(row: dict[str, Any]) -> str:
    cut = [axis for axis in row["spec"] if axis is not None]
    return "on all" if not cut else ", ".join(str(axis) for axis in row["spec"])


def _print_costs(costs: dict[str, Any] | None) -> None:
    if costs is None:
        return
    print()
    print_table(
        ("program", "FLOPs", "bytes accessed", "memory", "temporary"),
        [
            (name, *(_spell_count(v) for v in row.values()))
            for name, row in costs.items()
        ],
    )


def _spell_count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _derivation(rows: list[dict[str, Any]] | None) -> str:
    from runner.ledger import spell_derivation

    return spell_derivation(rows) if rows else ""

# SPDX-License-Identifier: Apache-2.0
"""Times the audit against what XLA takes to compile; asserts no time.

    python benchmarks/audit.py [--quick]

The audit is all that is done for the sake of keys before step 0: the walks over the
traced functions, the comparison of all derivations, and the ledger. Each figure is a
median over fresh programs, compiled without a cache.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from statistics import median
from typing import Any
from unittest import mock

from omegaconf import OmegaConf, open_dict

from benchmarks.loop import print_machine
from benchmarks.tables import print_table
from runner.audit import trace as audit
from runner.cli.config import compose
from runner.compile import compile_run
from runner.hazards.find import find_hazards
from runner.ledger import make_ledger
from runner.spec import RunSpec, parse_spec

__all__ = ["main"]

_LAYERS = (2, 8, 32, 128)
_STEPS = (1_000, 1_000_000)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few layers, one round")
    quick = parser.parse_args().quick
    print_machine()
    rounds = 1 if quick else 3
    rows = [
        _measure(layers, scanned=scanned, steps=steps, rounds=rounds)
        for layers in _LAYERS[: 2 if quick else None]
        for scanned in (False, True)
        for steps in _STEPS
    ]
    head = ("residual blocks", "steps", "draws", "trace", "audit", "compile", "ratio")
    print_table(head, rows)
    print("ratio: audit / compile; trace: all else of `compile_run`; in seconds")


def _measure(layers: int, *, scanned: bool, steps: int, rounds: int) -> tuple[str, ...]:
    spec, draws = _make_spec(layers, scanned=scanned, steps=steps), 0
    seconds: dict[str, list[float]] = {"trace": [], "audit": [], "compile": []}
    for _ in range(rounds):
        walked, traced, checked, compiled = (_Clock() for _ in range(4))
        walks = [_clock_of(audit, f, walked) for f in ("walk_jaxpr", "dce_jaxpr")]
        with walks[0], walks[1], traced:
            program = compile_run(spec)
        with checked:
            find_hazards(program)
            make_ledger(program)
        with compiled:
            _ = program.programs
        draws = sum(len(trace.draws) for trace in program.traces.values())
        seconds["trace"].append(traced.seconds - walked.seconds)
        seconds["audit"].append(walked.seconds + checked.seconds)
        seconds["compile"].append(compiled.seconds)
    means = {name: median(values) for name, values in seconds.items()}
    how = "scanned" if scanned else "written out"
    return (
        f"{layers} {how}",
        f"{steps:,}",
        str(draws),
        *(f"{means[name]:.3f}" for name in ("trace", "audit", "compile")),
        f"{100 * means['audit'] / means['compile']:.1f} %",
    )


class _Clock:
    """Seconds spent inside."""

    seconds = 0.0

    def __enter__(self) -> "_Clock":
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.begun


@contextlib.contextmanager
def _clock_of(module: Any, name: str, clock: _Clock) -> Iterator[None]:
    """Lets a clock run while a function of a module does."""
    function = getattr(module, name)

    def timed(*args: Any, **more: Any) -> Any:
        with clock:
            return function(*args, **more)

    with mock.patch.object(module, name, timed):
        yield


def _make_spec(layers: int, *, scanned: bool, steps: int) -> RunSpec:
    block = {"_target_": "models.ResidualMLPBlock", "dropout_rate": 0.1}
    lifted = {
        "lift": "scan",
        "name": "blocks",
        "length": layers,
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "module": block,
    }
    ends = [{"_target_": "flax.linen.Dense", "features": n} for n in (64, 10)]
    blocks = [lifted] if scanned else [block] * layers
    chain = [{"_target_": "models.Flatten"}, ends[0], *blocks, ends[1]]
    overrides = ["+experiment=dropout", f"train.steps={steps}", "sinks=none"]
    config = compose([*overrides, "train.compile_cache=null", "eval.every=null"])
    with open_dict(config):
        del config["hydra"]
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain["model"] = {"_target_": "models.Sequential", "layers": chain}
    return parse_spec(plain)


if __name__ == "__main__":
    main()

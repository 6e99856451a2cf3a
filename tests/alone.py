# SPDX-License-Identifier: Apache-2.0
"""Every lane of a sweep against the same job run alone: keys, ledger, bits.

    python tests/alone.py --steps 100

The 64 jobs of docs/lanes.md are trained three times: as mapped lanes, as lanes under
vmap, one after the other. Keys are those of `digests.keys`, and of the entries that
`runner keys --json` replays from each ledger; floats are `digests.params` and
`digests.metrics`. Then one lane of each is reproduced by itself.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.cli.keys import main as print_keys

__all__ = ["main"]

_RATES = ("0.0", "0.2", "0.5", "0.8")
_ALONE = "alone"
_WAYS = {
    "map": ("hydra/launcher=vectorized", "hydra.launcher.mode=map"),
    "vmap": ("hydra/launcher=vectorized", "hydra.launcher.mode=vmap"),
    _ALONE: ("hydra/launcher=basic",),
}
_SAME = ("config", "keys", "ledger", "data", "metrics", "params")


def main() -> int:
    """Prints how many lanes are equal in what; 1 where one has to be, and is not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=16, help="times four rates")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="runner-alone-"))
    words = (
        *("-m", "+experiment=dropout", "sinks=none", f"train.steps={options.steps}"),
        *("eval.every=50", "checkpoint.digest_every=50"),
        *(f"seed=range({options.seeds})", f"model.dropout_rate={','.join(_RATES)}"),
    )
    jobs = range(options.seeds * len(_RATES))
    found = {}
    for way, more in _WAYS.items():
        _run(folder, *words, *more, f"hydra.sweep.dir={way}")
        found[way] = [_read(folder / way / str(n)) for n in jobs]
    is_well = True
    for way in ("map", "vmap"):
        counts = _count_equal(found[way], found[_ALONE])
        modes = sorted({lane["mode"] for lane in found[way]})
        print(f"{len(jobs)} lanes by {'/'.join(modes)}, equal to the jobs alone in")
        print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
        said = _run(folder, "reproduce", f"{way}/{jobs[-2]}").splitlines()
        print(*(f"  {line}" for line in said if line.startswith("verdict")))
        exact = counts if way == "map" else ("config", "keys", "ledger", "data")
        is_well &= modes == [way] and all(counts[n] == len(jobs) for n in exact)
    distinct = len({lane["params"] for lane in found[_ALONE]})
    print(f"{distinct} different parameters; {'well' if is_well else f'see {folder}'}")
    if is_well:
        shutil.rmtree(folder)
    return 0 if is_well else 1


def _run(folder: Path, *args: str) -> str:
    hidden = ("JAX_", "WANDB_", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "runner", *args],
        cwd=folder,
        env={**env, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ran.stdout


def _read(directory: Path) -> dict[str, Any]:
    """What is compared of a job."""
    manifest = json.loads((directory / "run.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_keys([str(directory), "--json"])
    ledger = json.loads(said.getvalue())
    del ledger["run"]["run_id"]
    mode = manifest["sweep"]["mode"]
    return {**manifest["digests"], "ledger": ledger, "mode": mode}


def _count_equal(
    lanes: Sequence[Mapping[str, Any]], jobs: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    pairs = list(zip(lanes, jobs, strict=True))
    return {name: sum(lane[name] == job[name] for lane, job in pairs) for name in _SAME}


if __name__ == "__main__":
    sys.exit(main())

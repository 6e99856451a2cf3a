# SPDX-License-Identifier: Apache-2.0
"""The mirror in Weights & Biases, kept by a process of its own.

Nothing of wandb runs in the trainer, since there it could stop a run: a wandb-core
that hangs keeps the interpreter from ever exiting, one that dies prints tracebacks
at exit, `sys.exit` is replaced, the environment changes. So `runner.sinks.mirror`
starts a child (`_wandb_child.py`), shared by all runs of this process.
"""

import os
from typing import Any

from runner.errors import ConfigError
from runner.records.events import EvalRecord, RunEnd, RunStart, TrainRecord
from runner.sinks.mirror import Mirror
from runner.sinks.rows import scalar_rows
from runner.sinks.text import STREAM_COLUMNS
from runner.spec import WandbSpec

__all__ = ["WandbSink", "make_wandb_sink"]

_RECORD = (  # all that `reproduce` needs
    *("run.json", "config.yaml", "keys/ledger.json"),
    *("metrics.jsonl", "states.jsonl", "outputs.npz"),
)
_EXIT_CODES = {"completed": 0, "interrupted": 130}
_MODES = {
    "": "offline",
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "disabled": "disabled",
}


class WandbSink:
    """Sends what a run says to the child; waits for it at the end alone.

    Args:
        spec: Where the run belongs, and how many rows are mirrored.
        mode: `online` or `offline`.
        patience: Seconds that `finish` waits for the child, at most.
    """

    def __init__(self, spec: WandbSpec, *, mode: str, patience: float = 30.0) -> None:
        self._spec, self._mode, self._patience = spec, mode, patience

    def start(self, run: RunStart) -> None:
        """Starts the child if there is none, which is ready when the program is."""
        self._run, self._mirror = run, Mirror.shared()
        self._send("start", self._opening())

    def write(self, record: TrainRecord | EvalRecord) -> None:
        """Sends the rows to be mirrored; never waits."""
        rows = list(scalar_rows(record, every=self._spec.every))
        if rows:
            self._send("rows", rows)

    def finish(self, end: RunEnd) -> None:
        """Sends summary and record, and waits a bounded time until all is kept."""
        summary = {**end.metrics, "status": end.status, "steps": end.steps}
        if end.best is not None:
            name = f"best/{self._run.objective}"
            summary |= {name: end.best[0], f"{name}_step": end.best[1]}
        files = {name: self._run.directory / name for name in _RECORD}
        closing = {
            "summary": summary | {"seconds": end.seconds},
            "record": {n: str(p.resolve()) for n, p in files.items() if p.is_file()},
            "exit_code": _EXIT_CODES.get(end.status, 1),
        }
        self._send("finish", closing)
        self._mirror.wait(self._run.run_id, seconds=self._patience)

    def _send(self, verb: str, content: Any) -> None:
        self._mirror.send(self._run.run_id, verb, content)

    def _opening(self) -> dict[str, Any]:
        run = self._run
        streams = [
            [s.name, s.kind, s.derivation, s.key, s.phases, s.per, ", ".join(s.draws)]
            for s in run.streams
        ]
        return {
            "directory": str(run.directory.resolve()),
            "name": f"{run.experiment}-{run.run_id}",
            "project": self._spec.project,
            "entity": self._spec.entity,
            "group": self._spec.group,
            "mode": self._mode,
            "config": run.config,
            "streams": {"columns": STREAM_COLUMNS, "data": streams},
            "first_step": run.first_step,
            "pid": os.getpid(),
            "patience": self._patience,
        }


def make_wandb_sink(spec: WandbSpec) -> WandbSink | None:
    """The sink, or None where it is disabled.

    Raises:
        ConfigError: `mode: auto`, and WANDB_MODE says what is no mode.
    """
    mode: str | None = spec.mode
    if mode == "auto":
        given = os.environ.get("WANDB_MODE", "")
        mode = _MODES.get(given)
        if mode is None:
            raise ConfigError(
                "sinks.wandb.mode",
                "auto takes the environment's WANDB_MODE, which is not a mode",
                got=given,
                allowed="Modes: offline, online, disabled",
                fix="Unset WANDB_MODE, or set sinks.wandb.mode=offline",
            )
    return None if mode == "disabled" else WandbSink(spec, mode=str(mode))

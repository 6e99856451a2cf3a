# SPDX-License-Identifier: Apache-2.0
"""The child that `runner.sinks.mirror` starts: the only code here that uses wandb.

A script, not a module: it runs without the trainer's packages, so nothing of ours
is imported. It ends when its socket does; runs that are open then have failed.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_INIT_TIMEOUT = 20.0  # seconds; wandb's own is 90
_FINISH_SHARE = 0.8  # of the trainer's patience, for uploads


def main() -> None:
    """Takes `[run, verb, content]` a line; answers `[run, "done", error or null]`."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)  # else wandb-core holds it open when we are gone
    os.environ.pop("WANDB_SERVICE", None)
    runs: dict[str, _Run] = {}
    for line in link.makefile("rb"):
        if not line.endswith(b"\n"):
            break  # the trainer was killed while it wrote
        run_id, verb, content = json.loads(line)

        def tell(what: str, text: str | None, run_id: str = run_id) -> None:
            with suppress(OSError):  # the trainer may be gone
                link.sendall(json.dumps([run_id, what, text]).encode() + b"\n")

        try:
            if verb == "start":
                runs[run_id] = _Run(run_id, content, tell)
            elif run_id in runs and verb == "rows":
                runs[run_id].log(content)
            elif run_id in runs:
                runs.pop(run_id).finish(content)
                tell("done", None)
        except Exception as error:  # the trainer says so, and goes on
            runs.pop(run_id, None)
            tell("done", _one_line(error))
    for run in runs.values():
        with suppress(Exception):
            run.run.finish(exit_code=1)


class _Run:
    """One W&B run, whose every file lies in its own run directory."""

    def __init__(
        self, run_id: str, opening: dict[str, Any], tell: Callable[[str, str], None]
    ) -> None:
        self.run_id, self.opening = run_id, opening
        self.files = Path(opening["directory"], "wandb")
        self._stage_here()
        try:
            self.run = self._init(opening["mode"], run_id=run_id)
        except Exception as error:
            if opening["mode"] == "offline":
                raise
            self.run = self._init("offline", run_id=f"{run_id}-offline")
            where = Path(self.run.dir).parent
            why = f"offline, not online ({_one_line(error)})"
            tell("note", f"{why}. Send it later: wandb sync {where}")
        import wandb

        table = wandb.Table(**opening["streams"])
        self.run.log({"streams": table}, step=opening["first_step"])

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, row in rows:
            self.run.log(row, step=step)

    def finish(self, closing: dict[str, Any]) -> None:
        import wandb

        self._stage_here()
        self.run.log({}, commit=True)  # else the last row comes after the summary
        self.run.summary.update(closing["summary"])
        if closing["record"]:
            record = wandb.Artifact(f"ledger-{self.run_id}", type="ledger")
            for name, path in closing["record"].items():  # a resumed run changes them
                record.add_file(path, name=name, skip_cache=True, policy="mutable")
            self.run.log_artifact(record)
        self.run.finish(exit_code=closing["exit_code"])

    def _init(self, mode: Any, *, run_id: str) -> Any:
        import wandb

        offline = mode == "offline"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_TIMEOUT,
            finish_timeout=_FINISH_SHARE * self.opening["patience"],
            finish_timeout_raises=True,
            use_dot_wandb=False,
            # run.json has all of this, and offline nothing is to ask the network
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=offline,
            x_stats_pid=self.opening["pid"],
        )
        return wandb.init(
            dir=self.opening["directory"],
            id=run_id,
            mode=mode,
            resume="allow",  # else an online run that has the id is overwritten
            config=self.opening["config"],
            reinit="create_new",
            settings=settings,
            **{k: self.opening[k] for k in ("name", "project", "entity", "group")},
        )

    def _stage_here(self) -> None:
        os.environ |= {  # wandb reads them each time, wandb-core when it starts
            "WANDB_DATA_DIR": str(self.files / "data"),
            "WANDB_CACHE_DIR": str(self.files / "cache"),
            "WANDB_ERROR_REPORTING": "false",
        }


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()

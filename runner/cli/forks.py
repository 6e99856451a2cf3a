# SPDX-License-Identifier: Apache-2.0
"""Shares of a sweep in processes of this machine: forks of the one that launches.

Beside its arithmetic, a lane takes a twentieth of a second of Python for its record,
and one interpreter runs one thread at a time. So where lanes are many and the device
is the CPU, each core has a process of its own, forked before JAX makes a backend.
"""

import contextlib
import gc
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from runner.cli.running import INTERRUPTED
from runner.cli.share import STOPS, Share, ShareTask, ended, portable
from runner.determinism import has_backend
from runner.errors import RunFailedError
from runner.machine import count_cores, free_memory
from runner.sweep.jobs import SHARES

__all__ = ["Forks", "count_processes"]

_log = logging.getLogger("runner")

_WORTH = 16  # lanes that repay the two seconds that a process takes to start
_USERS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 1.0  # seconds after which a signal is another one
_BYTES = 2**30  # of a process, before its lanes


def count_processes(lanes: int, *, asked: int | None) -> int:
    """How many processes run lanes on this machine.

    Args:
        lanes: How many there are.
        asked: By the user; None finds out.
    """
    why = "JAX has a backend already" if has_backend() else ""
    if sys.platform != "linux":
        why = "forks are safe on Linux alone"
    if why and (asked or 1) > 1:
        _log.warning("hydra.launcher.processes: 1, not %s, since %s", asked, why)
    if why or asked == 1:
        return 1
    if asked is not None:
        return min(asked, lanes)
    if not _is_on_cpu():
        return 1
    return max(1, min(count_cores(), lanes // _WORTH, free_memory() // _BYTES))


def _is_on_cpu() -> bool:
    """Whether JAX can only take the CPU, as far as is known before it looks."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    others = any(find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not others and not entry_points(group="jax_plugins")


class Forks(Launcher):
    """Runs each share in a fork of this process, all at a time."""

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
    ) -> None:
        """Takes what is to be run."""
        assert isinstance(task_function, ShareTask)
        self._shares = task_function.shares
        self._root = Path(str(config.hydra.sweep.dir)).absolute() / SHARES

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """What came of each share.

        Raises:
            SystemExit: the user stopped them, and they have saved their lanes.
        """
        _import_all()
        gc.freeze()  # what is here now is no garbage of a child's, to be looked through
        life = os.pipe()  # its end tells the children that this process is gone
        children: list[_Child] = []
        try:
            for share in self._shares:
                directory = self._root / str(next(iter(share.job_overrides)))
                directory.mkdir(parents=True, exist_ok=True)
                children.append(_Child(share, directory, life))
            gc.unfreeze()
            with _passing_on_signals(children) as seen:
                results = [child.wait() for child in children]
        finally:
            for end in life:
                os.close(end)
        if seen:
            raise SystemExit(INTERRUPTED)
        return [_returned(result) for result in results]


def _import_all() -> None:
    """What every child needs. No backend is made: it would not live through a fork."""
    import orbax.checkpoint  # noqa: F401

    import runner.lanes.groups
    import runner.recording  # noqa: F401


class _Child:
    """A fork of this process that runs a share."""

    def __init__(self, share: Share, directory: Path, life: tuple[int, int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        ours, theirs = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(ours)
            os.close(life[1])
            _be_child(share, directory, returns=theirs, life=life[0])
        os.close(theirs)
        self._returns = os.fdopen(ours, "rb")
        self._has_ended = False

    def wait(self) -> Any:
        """What it sent, once it has ended; or an exception, which says why nothing."""
        sent: Any = None
        with contextlib.suppress(EOFError, pickle.UnpicklingError), self._returns:
            sent = pickle.load(self._returns)
        _, status = os.waitpid(self._pid, 0)
        self._has_ended = True
        return ended(os.waitstatus_to_exitcode(status)) if sent is None else sent

    def tell(self, number: int) -> None:
        """Sends it a signal."""
        if not self._has_ended:
            os.kill(self._pid, number)


@contextlib.contextmanager
def _passing_on_signals(children: Sequence[_Child]) -> Iterator[list[float]]:
    """SIGINT and SIGTERM have the children save their lanes; another one kills.

    Yields when they came. Two at a time, as `timeout` sends them, are one.
    """
    seen: list[float] = []

    def tell(*_: Any) -> None:
        now = time.monotonic()
        if not seen or now - seen[0] > _AGAIN:
            for child in children:
                child.tell(signal.SIGKILL if seen else signal.SIGTERM)
        seen.append(now)

    before = {number: signal.signal(number, tell) for number in _USERS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _returned(result: Any) -> JobReturn:
    if isinstance(result, SystemExit):  # told so by somebody else than us
        result = RunFailedError("its process was stopped")
    failed = isinstance(result, Exception)
    returned = JobReturn(status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
    returned.return_value = result
    return returned


def _be_child(share: Share, directory: Path, *, returns: int, life: int) -> NoReturn:
    """Runs the share, sends back what came of it, and ends."""
    code = 1
    try:
        for number in STOPS:  # until there is something to save
            signal.signal(number, lambda *_: os._exit(INTERRUPTED))
        threading.Thread(target=_end_with, args=(life,), daemon=True).start()
        result: Any
        try:
            result = [_bare(each) for each in share.run(directory)]
        except Exception as error:
            result = portable(error)
        with os.fdopen(returns, "wb") as stream:
            pickle.dump(result, stream)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        with contextlib.suppress(OSError, ValueError):  # closed, by whoever read it
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # what the parent does at its end is not ours to do


def _bare(returned: JobReturn) -> JobReturn:
    """Without the configs, which nobody asks for and which take long to send."""
    returned.cfg = returned.hydra_cfg = None
    return returned


def _end_with(life: int) -> None:
    os.read(life, 1)  # nothing comes: its end is that of the parent
    os.kill(os.getpid(), signal.SIGTERM)

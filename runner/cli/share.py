# SPDX-License-Identifier: Apache-2.0
"""A share of a sweep: jobs that are lanes of one process, in a job of another launcher.

What the other launcher runs only waits: the lanes have a process of their own, so that
one that is killed, for its memory most often, takes nothing with it that the launcher
rests on, its pool least of all. It ends when whoever waits for it is gone.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from runner.cli.running import INTERRUPTED
from runner.errors import RecordError, RunFailedError, in_one_line
from runner.lanes.mode import Options

__all__ = ["STOPS", "Share", "ShareTask", "ended", "portable", "work"]

_log = logging.getLogger("runner")
_START = (  # of another process, that imports what this one does
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from runner.cli.share import work; work({})"
)
_HANDOVER = 60.0  # seconds that a process may take to save what a new one goes on with
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last: submitit's
_STOPPED = (INTERRUPTED, *(-number for number in STOPS))


@dataclass(frozen=True)
class Share:
    """Jobs of a sweep that are run by one process.

    Args:
        context: Hydra's own, with the callbacks of the jobs.
        function: What a job is, for callbacks.
        master: The sweep's config.
        job_overrides: Of each job of the share, by its number.
        lanes: How many jobs the sweep has.
        options: `hydra.launcher`.
        where: Directory that the sweep was launched from.
    """

    context: HydraContext
    function: TaskFunction
    master: DictConfig
    job_overrides: Mapping[int, Sequence[str]]
    lanes: int
    options: Options
    where: str

    def run(self, directory: Path) -> list[JobReturn]:
        """Runs its lanes in this process.

        Args:
            directory: The share's own, by whose lock others know that it runs.

        Raises:
            RecordError: another process runs the share.
            SystemExit: a signal stopped it.
        """
        from runner.cli.lanes import launch_lanes

        _lock(directory)
        with contextlib.suppress(OSError):  # of another machine: it says so later
            os.chdir(self.where)
        returned = launch_lanes(
            self.context,
            self.function,
            self.master,
            self.job_overrides,
            lanes=self.lanes,
            options=self.options,
            stops=_stopping,
        )
        for each in returned:
            if isinstance(each._return_value, Exception):
                each.return_value = portable(each._return_value)
        return returned


@dataclass(frozen=True)
class ShareTask:
    """What another launcher calls: its n-th job is the n-th share."""

    shares: tuple[Share, ...]

    def __call__(self, _config: DictConfig) -> list[JobReturn]:
        """Runs a share in a process of its own, and waits for it.

        Returns:
            What Hydra is to be told of each of its jobs.

        Raises:
            RunFailedError: the process was killed.
            SystemExit: it was told to stop, and has saved its lanes.
        """
        job = HydraConfig.get()
        share, directory = self.shares[job.job.num], Path(job.runtime.output_dir)
        state = {  # of a singleton for each plugin there would be two
            kind: each
            for kind, each in Singleton.get_state().items()
            if kind is not Plugins
        }
        process = _Process((share, directory, state))
        numbers = ", ".join(map(str, share.job_overrides))
        _log.info("process %s runs jobs %s", process.pid, numbers)
        returned = process.wait()
        if isinstance(returned, Exception):
            raise returned
        return list(returned)


class _Process:
    """A Python process that is sent a share, and sends back what came of it."""

    def __init__(self, sent: tuple[Share, Path, dict[Any, Any]]) -> None:
        ours, theirs = os.pipe()
        command = [sys.executable, "-c", _START.format(theirs)]
        self._child = Popen(command, stdin=PIPE, pass_fds=[theirs])
        os.close(theirs)
        self._returns = os.fdopen(ours, "rb")
        self.pid = self._child.pid
        assert self._child.stdin is not None
        self._into = self._child.stdin  # open for as long as we live
        with contextlib.suppress(BrokenPipeError):  # it has ended: `wait` says how
            for each in (sys.path, _whole(sent)):
                pickle.dump(each, self._into)
            self._into.flush()

    def wait(self) -> Any:
        """What it sent, once it has ended.

        Raises:
            RunFailedError: the process was killed.
            SystemExit: it was told to stop, and has saved its lanes.
        """
        # Ctrl-C tells the child as well; a pool whose processes die kills all others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pickle.load(self._returns)
        except (EOFError, pickle.UnpicklingError):
            raise ended(self._child.wait()) from None
        except BaseException:  # raised by a signal: the launcher's, or Ctrl-C
            self._child.terminate()
            raise
        finally:
            self._child.wait()
            signal.signal(signal.SIGINT, before)
            with contextlib.suppress(BrokenPipeError):  # of what it has not read
                self._into.close()
            self._returns.close()


def ended(code: int) -> BaseException:
    """Why there is nothing from a process that left with a code."""
    if code in _STOPPED:  # a launcher that gets no result may run the job again
        return SystemExit(INTERRUPTED)
    if code >= 0:
        return RunFailedError(f"its process left with code {code}")
    name = signal.Signals(-code).name
    more = ", by the system if memory ran out" if name == "SIGKILL" else ""
    return RunFailedError(f"its process was killed with {name}{more}")


def _whole(value: Any) -> Any:
    """A value that takes along the classes of which Hydra's plugins have two."""
    from joblib import wrap_non_picklable_objects

    return wrap_non_picklable_objects(value, keep_wrapper=False)


def work(returns: int) -> None:
    """The process of a share, from its start to its end.

    Args:
        returns: File descriptor for what came of it.
    """
    os.set_inheritable(returns, False)
    for number in STOPS:  # until there is something to save
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    share, directory, state = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Singleton.set_state(state)
    setup_globals()
    result: Any
    try:
        result = share.run(directory)
    except Exception as error:
        result = portable(error)
    with os.fdopen(returns, "wb") as stream:
        pickle.dump(_whole(result), stream)


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], str]]:
    """As `stop_on_signals`; there may be more, of a queue that kills in the end."""
    seen: list[int] = []
    for number in STOPS:
        signal.signal(number, lambda got, _: seen.append(got))
    yield lambda: f"stopped by {signal.Signals(seen[0]).name}" if seen else ""


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing comes: its end is that of who waits
    os.kill(os.getpid(), signal.SIGTERM)


def _lock(directory: Path) -> None:
    from runner.records.files import lock_directory

    end = time.monotonic() + _HANDOVER
    while not lock_directory(directory):
        if time.monotonic() > end:
            what = "another process runs this share of the sweep"
            raise RecordError(f"{directory}: {what}. Wait for it, or stop it.")
        time.sleep(0.1)


def portable(error: Exception) -> Exception:
    """An error that another process can read; one of a model's code may be none."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunFailedError(in_one_line(error))
    return error

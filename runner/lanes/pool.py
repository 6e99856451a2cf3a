# SPDX-License-Identifier: Apache-2.0
"""Runs lanes beside each other: threads that call one compiled program.

A call of a compiled program waits for no other one, so as many lanes as there are
cores train at a time, each by the very calls that a run alone makes: on the same
device, with the same pool of threads. Their bits are those of the run alone.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from runner.machine import count_cores, free_memory

__all__ = ["count_workers", "free_bytes", "run_beside"]

T = TypeVar("T")
_SPELL = 0.5  # seconds
_STATES = 4  # in memory for a lane: its own, its gradients, a copy to be saved, room


def count_workers(
    lanes: int, *, most: int | None, each: int = 0, processes: int = 1
) -> int:
    """How many lanes are run at a time, by this process.

    Args:
        lanes: How many there are.
        most: The user's own bound, if any.
        each: Bytes of the state of one.
        processes: How many share the machine.
    """
    fit = free_bytes(processes) // (_STATES * each) if each else lanes
    cores = math.ceil(count_cores() / processes)
    if processes > 1:
        cores += 1  # while a lane waits for its checkpoint, another one computes
    return max(1, min(lanes, cores, most or lanes, fit))


def free_bytes(processes: int = 1) -> int:
    """Memory that is free where arrays lie, for each of some processes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // processes
    return free_memory() // processes


def run_beside(
    batches: Iterable[Sequence[tuple[T, Callable[[], Any]]]], *, workers: int
) -> Iterator[tuple[T, Any]]:
    """Runs tasks by threads; yields what they return, or raised, as they end.

    Args:
        batches: Tasks, each with its name; those of one batch wait for each other, so
            that they have to run at the same time.
        workers: How many batches run at a time.
    """
    ended: queue.SimpleQueue[tuple[T, Any]] = queue.SimpleQueue()
    batches = list(batches)
    with ThreadPoolExecutor(workers, thread_name_prefix="lanes") as pool:
        for batch in batches:
            pool.submit(_run_batch, batch, ended)
        for _ in range(sum(map(len, batches))):
            yield _get(ended)


def _get(ended: "queue.SimpleQueue[Any]") -> Any:
    """Waits in short spells: a signal that came to another thread is seen to then."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=_SPELL)


def _run_batch(
    batch: Sequence[tuple[Any, Any]], ended: "queue.SimpleQueue[Any]"
) -> None:
    threads = [
        threading.Thread(target=_run, args=(*named, ended), name="lane")
        for named in batch[1:]
    ]
    for thread in threads:
        thread.start()
    for name, task in batch[:1]:
        _run(name, task, ended)
    for thread in threads:
        thread.join()


def _run(name: Any, task: Callable[[], Any], ended: "queue.SimpleQueue[Any]") -> None:
    try:
        ended.put((name, task()))
    except Exception as error:  # the caller says so, and other lanes go on
        ended.put((name, error))
    except BaseException as error:  # `sys.exit` in a model's code ends its lane alone
        ended.put((name, RuntimeError(repr(error))))

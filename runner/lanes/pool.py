# SPDX-License-Identifier: Apache-2.0
"""Runs lanes beside each other: threads that call one compiled program.

A call of a compiled program waits for no other one, so as many lanes as there are
cores train at a time, each by the very calls that a run alone makes: on the same
device, with the same pool of threads. Their bits are those of the run alone.
"""

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from runner.machine import count_cores

__all__ = ["count_workers", "run_beside"]

T = TypeVar("T")


def count_workers(lanes: int, *, most: int | None) -> int:
    """How many lanes are run at a time.

    Args:
        lanes: How many there are.
        most: The user's own bound, if any.
    """
    return max(1, min(lanes, count_cores(), most or lanes))


def run_beside(
    tasks: Iterable[tuple[T, Callable[[], Any]]], *, workers: int
) -> Iterator[tuple[T, Any]]:
    """Runs tasks by threads; yields what they return, or raised, as they end.

    Args:
        tasks: Each with its name.
        workers: How many run at a time.
    """
    ended: queue.SimpleQueue[tuple[T, Future[Any]]] = queue.SimpleQueue()
    count = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="lane") as pool:
        for name, task in tasks:
            future = pool.submit(task)
            future.add_done_callback(partial(_put, ended, name))
            count += 1
        for _ in range(count):
            name, future = ended.get()
            error = future.exception()
            yield name, future.result() if error is None else error


def _put(ended: queue.SimpleQueue[Any], name: Any, future: Future[Any]) -> None:
    ended.put((name, future))

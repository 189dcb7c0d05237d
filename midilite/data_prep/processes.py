"""Work on many items in processes of their own, each of which may die without taking the others along."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

_UNGUARDED = (
    "no process could be started. Each of them runs the calling script anew: put what it does, this call too, under "
    'if __name__ == "__main__":, or ask for one process (num_workers 1)'
)


def in_processes(work: Callable, items: list, workers: int) -> Iterator[Any]:
    """Results of `work(item)`, as they come; for an item that ended its process, `work(item, dead=True)`.

    Fresh processes (spawn): forking after torch has started is unsafe. When one of them dies, most likely for lack of
    memory, all that were unfinished are tried again, each in a process that has the machine to itself.

    Raises:
        RuntimeError: no process could be started, as from a script that guards nothing by its name.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from _on_one_thread(work, items)
        return
    unfinished = list(items)
    for item, result in _in_pool(work, items, workers):
        unfinished.remove(item)
        yield result
    for item in unfinished:
        alone = list(_in_pool(work, [item], 1))
        yield alone[0][1] if alone else work(item, dead=True)


def _in_pool(work: Callable, items: list, workers: int) -> Iterator[tuple[Any, Any]]:
    """(item, result) of those that finish before a process dies.

    Raises:
        RuntimeError: no process even began.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        begun = pool.submit(int)  # is asked first, so whoever dies of an item has answered this
        futures = {}
        try:
            with contextlib.suppress(BrokenProcessPool):  # what can't be asked any more is as unfinished as the others
                for item in items:
                    futures[pool.submit(work, item)] = item
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield futures[future], future.result()
            if isinstance(begun.exception(), BrokenProcessPool):
                raise RuntimeError(_UNGUARDED)
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the processes are the parallelism, and sums don't depend on the machine's cores


def _on_one_thread(work: Callable, items: Iterable) -> Iterator[Any]:
    import torch

    threads = torch.get_num_threads()
    try:
        for item in items:
            torch.set_num_threads(1)
            yield work(item)
    finally:
        torch.set_num_threads(threads)

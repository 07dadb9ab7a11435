"""Work on many things beside each other, with the results in the order of the things."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

_function: Callable[[Any], Any] | None = None  # of this process, if it is a worker


def ahead[Item](items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the one before is worked on.

    Reading a file leaves Python's lock to others while it decompresses.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def in_threads[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """function(item) of each item, in order, made by threads at most one item ahead of them.

    Reading a file, NumPy and SciPy leave Python's lock to others where they work on large arrays.
    """
    pool = ThreadPoolExecutor(threads)
    yield from _results(pool, lambda item: pool.submit(function, item), items, threads + 1)


def in_order[Item, Result](
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """function(item) of each item, in order, at most 2 `workers` of them ahead of what is taken.

    With `workers` <= 1 nothing but this process is used. Else processes are spawned, once per call, and the function
    and what it holds are copied to each: it must be a function or a method of a module, not one made in place.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_become_worker, initargs=(function,)
    )
    yield from _results(pool, lambda item: pool.submit(_apply, item), items, 2 * workers)


def _results[Item, Result](
    pool: Executor, submit: Callable[[Item], Future[Result]], items: Iterable[Item], most: int
) -> Iterator[Result]:
    """What `submit` promises of each item, in order, with at most `most` of them under way; closes the pool."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(submit(item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)

"""Work beside other work: in order, bounded, and with the errors where they belong."""

import operator
import os
from threading import Barrier

import pytest

from hilbertcell.data.workers import ahead, in_order, in_threads


@pytest.mark.parametrize("beside", [in_order, in_threads])
@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers, beside):
    assert list(beside(operator.neg, range(20), workers)) == [-i for i in range(20)]


@pytest.mark.parametrize("beside", [in_order, in_threads])
def test_an_error_of_a_worker_is_raised_here(beside):
    results = beside(operator.inv, [1, 2.5, 3], 2)
    assert next(results) == -2
    with pytest.raises(TypeError, match="float"):
        list(results)


def test_threads_work_beside_each_other_and_little_ahead():
    together, begun = Barrier(3, timeout=10), []

    def meet(item):
        begun.append(item)
        together.wait()  # breaks unless three items are under way at once

    for done, _ in enumerate(in_threads(meet, range(9), 3), start=1):
        assert len(begun) <= done + 3


def test_one_process_is_this_one():
    assert list(in_order(lambda _: os.getpid(), [0, 1], 1)) == [os.getpid()] * 2


def test_one_item_is_made_ahead_and_no_more():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    for item in ahead(items()):
        assert len(made) <= item + 2
    assert made == list(range(10))


def test_an_error_of_an_item_comes_in_its_place():
    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(ahead(1 // (2 - i) for i in range(5)))
    assert list(ahead(iter(()))) == []
    good = ahead(1 // (2 - i) for i in range(5))
    assert [next(good), next(good)] == [0, 1]

"""The pool of threads: what an exception cancels, and what the end of the block waits for."""

import threading

import pytest

from hashengine._threads import thread_pool


def test_the_end_of_the_block_waits_for_all_tasks():
    done = []
    with thread_pool(2) as pool:
        for number in range(50):
            pool.submit(done.append, number)
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_an_exception_cancels_the_queue_and_waits_for_no_task(error):
    started, release, done = threading.Event(), threading.Event(), []

    def task(number):
        started.set()
        release.wait()
        done.append(number)

    with pytest.raises(error), thread_pool(1) as pool:
        tasks = [pool.submit(task, number) for number in range(50)]
        started.wait()
        raise error
    assert not tasks[0].done() and all(task.cancelled() for task in tasks[1:])
    release.set()
    assert tasks[0].result() is None and done == [0]

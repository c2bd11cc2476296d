"""The lock of an index: readers, writers, interrupts, calls from `progress`, and forks."""

import copy
import os
import pickle
import random
import signal
import threading

import numpy as np
import pytest

from hashengine import HammingIndex, InputError, _file_warnings, _files, _torch_defaults
from hashengine.index.code_memory import ShardedCodes
from hashengine.index.lock import ReadersWriterLock
from tests.helpers.indexes import codes_of, index_of


def in_thread(call) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def is_held(lock) -> bool:
    """Whether another thread holds the lock."""
    if not lock.acquire(blocking=False):
        return True
    lock.release()
    return False


def test_a_writer_waits_for_readers_and_later_readers_wait_for_the_writer():
    lock, order = ReadersWriterLock(), []
    entered, leave, blocked = threading.Event(), threading.Event(), threading.Event()

    def first_reader():
        with lock.reader():
            entered.set()
            leave.wait()
            order.append("first reader")

    def writer():
        lock.write(lambda: order.append("writer"))

    def second_reader():
        blocked.set()
        with lock.reader():
            order.append("second reader")

    threads = [in_thread(first_reader)]
    entered.wait()
    threads.append(in_thread(writer))
    while not is_held(lock._turnstile):  # until the writer waits
        pass
    threads.append(in_thread(second_reader))
    blocked.wait()
    assert order == []
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first reader", "writer", "second reader"]


def test_a_reader_may_read_again_while_a_writer_waits():
    lock = ReadersWriterLock()
    with lock.reader():
        writer = in_thread(lambda: lock.write(lambda: None))
        while not is_held(lock._turnstile):
            pass
        with lock.reader():
            assert lock.is_read_here()
    writer.join()
    assert not lock.is_read_here()


def test_the_locks_of_ended_threads_are_not_kept():
    lock = ReadersWriterLock()

    def read():
        with lock.reader():
            pass

    for _ in range(5):
        in_thread(read).join()
    assert len(lock._locks) == 0


def test_interrupted_calls_leave_no_lock():
    index, query = index_of(100), codes_of(1, seed=1)
    calls = [
        lambda: index.search(query, 5),
        lambda: index.range_search(query, 20),
        lambda: index.count(query),
        lambda: index.reconstruct(np.array([1])),
        lambda: index.update(np.array([0]), query),
    ]
    rng, handler = random.Random(0), signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    try:
        while interrupts < 500:
            call = calls[interrupts % len(calls)]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0001, 0.002))
                # Not without end: Python ignores an exception in a callback, such as that of a weak reference.
                for _ in range(5000):
                    call()
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    writer = in_thread(lambda: index.update(np.array([0]), query))
    writer.join(60)
    assert not writer.is_alive()


def changes_of(index, folder):
    """Each method that a writer's lock guards, with a call that changes nothing."""
    code = index.codes[:1].numpy()
    return {
        "add": lambda: index.add(code),
        "remove": lambda: index.remove(np.array([], np.int64)),
        "update": lambda: index.update(np.array([0]), code),
        "compact": index.compact,
        "save": lambda: index.save(folder),
        "to": lambda: index.to("cpu", streamed=True),
        "copy": lambda: copy.copy(index),
        "pickle": lambda: pickle.dumps(index),
    }


def test_progress_may_search_but_not_change_save_or_copy(tmp_path):
    index, queries, found = index_of(100), codes_of(3, seed=1), []

    def search_again(done: int, total: int) -> None:
        found.append(index.search(queries, 1)[1][:, 0].tolist())
        for name, call in changes_of(index, tmp_path).items():
            with pytest.raises(InputError, match=f"^{name}: the index must be one that no other call of this thread"):
                call()

    _, ids = index.search(queries, 1, progress=search_again)
    assert found and all(again == ids[:, 0].tolist() for again in found)
    index.update(np.array([0]), queries[:1])
    assert index.search(queries[:1], 1)[0][0, 0] == 0


def test_a_handler_of_a_signal_may_not_wait_for_its_own_thread(tmp_path):
    index, query, refused = index_of(200), codes_of(1, seed=1), set()
    calls = changes_of(index, tmp_path) | {"HammingIndex": lambda: index.search(query, 5)}
    names = list(calls)

    def handle(*_) -> None:
        name = names[len(refused) % len(names)] if rng.random() < 0.5 else rng.choice(names)
        try:
            calls[name]()
        except InputError as error:
            assert str(error).startswith(f"{name}: the index must be one that no other call of this thread uses, got ")
            refused.add(name)

    rng, handler = random.Random(0), signal.signal(signal.SIGALRM, handle)
    rows, codes = np.arange(200), codes_of(200, seed=2)
    try:
        while len(refused) < 4:  # whichever: which call a signal interrupts depends on the machine
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00005, 0.002))
            index.update(rows, codes)
            index.search(query, 5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_a_search_inside_the_update_of_its_own_thread_is_refused():
    index, query = index_of(10), codes_of(1, seed=1)
    with pytest.raises(InputError, match="^HammingIndex: the index must be one that no other call of this thread uses"):
        index._rows_lock.write(lambda: index.search(query, 1))


def status_in_fork(call) -> int:
    """The exit code of a forked process that calls `call`. It is -14, SIGALRM, if the call does not end in a minute."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("held", ["the first lookup of ids", "a save", "a seed", "the warnings of a decoder"])
def test_a_forked_process_waits_for_nothing_that_another_thread_does(held, tmp_path, monkeypatch):
    index = index_of(100, ids=True)
    holding, end = threading.Event(), threading.Event()

    def hold(*_, **__):
        holding.set()
        end.wait(60)

    def hold_lock(lock):
        with lock:
            hold()

    if held == "the first lookup of ids":
        first = index_of(50, ids=True)
        sort = np.argsort
        monkeypatch.setattr(np, "argsort", hold)
        thread = in_thread(lambda: first._snapshot.lookup._runs[0].sorted_ids)
    else:
        lock = {"a save": _files._moving, "a seed": _torch_defaults._random_lock}.get(held, _file_warnings._lock)
        thread = in_thread(lambda: hold_lock(lock))
    holding.wait(60)
    if held == "the first lookup of ids":
        monkeypatch.setattr(np, "argsort", sort)

    def work():
        index.remove(index.ids[:1])
        index.save(tmp_path / "index")
        assert len(HammingIndex.load(tmp_path / "index")) == 99
        with _torch_defaults.own_random_numbers(0), _file_warnings.named_warnings("a.png"):
            pass

    status = status_in_fork(work)
    end.set()
    thread.join()
    assert status == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_refuses_an_index_that_another_thread_was_updating(tmp_path, monkeypatch):
    index = index_of(100)
    updating, end = threading.Event(), threading.Event()
    overwrite = ShardedCodes.overwrite

    def interrupted(replacements):
        updating.set()
        end.wait(60)
        overwrite(replacements)

    monkeypatch.setattr(ShardedCodes, "overwrite", staticmethod(interrupted))
    thread = in_thread(lambda: index.update(np.array([0]), codes_of(1, seed=5)))
    updating.wait(60)

    def work():
        expected = "must be one that was complete when the process was forked, got one that a thread was updating; load"
        for call in (
            lambda: index.search(codes_of(1), 1),
            lambda: index.save(tmp_path),
            index.compact,
            lambda: index.codes,
        ):
            with pytest.raises(InputError, match=expected):
                call()

    status = status_in_fork(work)
    end.set()
    thread.join()
    assert status == 0
    assert status_in_fork(lambda: index.search(codes_of(1), 1)) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_use_an_index_that_other_threads_were_using():
    index, query = index_of(100, ids=True), codes_of(1, seed=1)
    holding, end = threading.Event(), threading.Event()

    def hold_every_lock():
        with index._writer, index._rows_lock.reader(), index._rows_lock._turnstile:
            holding.set()
            end.wait()

    thread = in_thread(hold_every_lock)
    holding.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that waits for a lock
        index.search(query, 3)
        index.update(np.array([0]), query)
        index.add(query, np.array([7]))
        os._exit(0 if index.search(query, 1)[0][0, 0] == 0 else 1)
    _, status = os.waitpid(child, 0)
    end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0

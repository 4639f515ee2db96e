import threading
import time

from local_tinker.engine.turns import Turns


def test_what_is_left_for_later_is_done_at_the_start_of_the_next_turn():
    turns, done = Turns(), []
    with turns():
        turns.later(lambda: done.append(1))
        assert done == []
    with turns():
        assert done == [1]


def test_later_takes_no_lock_so_it_can_be_called_while_another_thread_has_the_turn():
    turns, entered, leave = Turns(), threading.Event(), threading.Event()

    def hold():
        with turns():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(5)
    started = time.monotonic()
    turns.later(lambda: None)
    assert time.monotonic() - started < 1
    leave.set()
    thread.join()


def test_a_long_run_of_turns_lets_a_waiting_thread_in_between():
    turns, order, stop = Turns(), [], threading.Event()

    def many():
        while not stop.is_set():
            with turns():
                order.append("many")
                time.sleep(0.002)

    thread = threading.Thread(target=many)
    thread.start()
    for _ in range(5):
        with turns():
            order.append("one")
    stop.set()
    thread.join()
    at = [i for i, who in enumerate(order) if who == "one"]
    assert max(b - a for a, b in zip(at, at[1:], strict=False)) <= 3

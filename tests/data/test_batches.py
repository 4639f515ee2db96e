import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_tinker.data.batches import batches
from local_tinker.data.rows import Row, Rows
from local_tinker.errors import DatasetError, StateError, UsageError

ROWS = [{"text": str(i)} for i in range(10)]


def test_every_epoch_holds_every_row_once_in_a_new_order():
    out = [row["text"] for batch in batches(ROWS, batch_size=3, epochs=2) for row in batch]
    assert sorted(out[:10]) == sorted(out[10:]) == [str(i) for i in range(10)]
    assert out[:10] != out[10:]


def test_order_depends_on_the_seed_alone_and_leaves_the_global_state():
    random.seed(1)
    state = random.getstate()
    first = list(batches(ROWS, batch_size=4, seed=7))
    assert random.getstate() == state
    random.seed(2)
    assert list(batches(ROWS, batch_size=4, seed=7)) == first
    assert list(batches(ROWS, batch_size=4, seed=8)) != first


def test_without_shuffle_the_rows_come_in_order_and_drop_last_leaves_the_short_batch_out():
    assert [len(b) for b in batches(ROWS, batch_size=4, shuffle=False)] == [4, 4, 2]
    kept = list(batches(ROWS, batch_size=4, shuffle=False, drop_last=True))
    assert kept == [ROWS[0:4], ROWS[4:8]]
    assert len(batches(ROWS, batch_size=4, epochs=3)) == 9


@given(st.integers(0, 11), st.integers(1, 5), st.booleans())
def test_resuming_gives_exactly_the_batches_that_were_left(taken, batch_size, shuffle):
    def make():
        return batches(ROWS, batch_size=batch_size, epochs=2, shuffle=shuffle)

    whole = list(make())
    taken = min(taken, len(whole))
    first, run = make(), []
    for _, batch in zip(range(taken), first, strict=False):
        run.append(batch)
    state = json.loads(json.dumps(first.state()))
    second = make()
    second.load(state)
    assert run + list(second) == whole


def test_a_loop_run_again_after_its_end_starts_anew_but_a_finished_state_stays_finished():
    data = batches(ROWS, batch_size=5)
    assert len(list(data)) == len(list(data)) == 2
    resumed = batches(ROWS, batch_size=5)
    resumed.load(data.state())
    assert list(resumed) == []
    longer = batches(ROWS, batch_size=5, epochs=2)
    longer.load(data.state())
    assert len(list(longer)) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 4}, "batch_size: 5 then, 4 now"),
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"shuffle": False}, "shuffle"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_difference(change, says):
    state = batches(ROWS, batch_size=5).state()
    with pytest.raises(StateError, match=says):
        batches(ROWS, **{"batch_size": 5, **change}).load(state)


def test_a_state_of_other_rows_is_refused_also_when_their_number_is_the_same():
    state = batches(Rows(Row(row) for row in ROWS), batch_size=5).state()
    batches(ROWS, batch_size=5).load(state)
    with pytest.raises(StateError, match="digest"):
        batches([*ROWS[:-1], {"text": "other"}], batch_size=5).load(state)
    with pytest.raises(StateError, match="lacks epoch"):
        batches(ROWS, batch_size=5).load({})


def test_what_cannot_be_batched_is_refused():
    for wrong in (0, True, 2.0):
        with pytest.raises(UsageError):
            batches(ROWS, batch_size=wrong)
    with pytest.raises(DatasetError, match="no examples"):
        batches([], batch_size=1)
    with pytest.raises(UsageError, match="list"):
        batches(iter(ROWS), batch_size=1)
    with pytest.raises(UsageError, match="drop_last"):
        batches(ROWS, batch_size=11, drop_last=True)

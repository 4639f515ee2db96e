import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_tinker.data.pack import pack
from local_tinker.errors import UsageError


def test_units_go_longest_first_into_the_fullest_batch_that_holds_them():
    # 9 | 6+4 | 5+5: 4 fits beside 6 exactly, and the second 5 beside the first. Evenly, 4 would go on top of 6+5.
    assert pack([[5], [9], [4], [6], [5]], budget=10) == [[1], [3, 2], [0, 4]]


def test_no_batch_is_nearly_empty_where_all_can_be_even():
    # best fit: 4+4+2 | 2; evenly: 4+2 | 4+2
    assert pack([[4], [2], [4], [2]], budget=10) == [[0, 1], [2, 3]]


def test_a_pair_counts_whole_and_is_never_split():
    assert pack([[3, 3], [3, 3], [2, 2]], budget=10) == [[0, 2], [1]]
    assert pack([[3, 3], [3, 3], [3, 3]], budget=11) == [[0], [1], [2]]


def test_a_unit_over_the_budget_is_alone():
    assert pack([[50], [1], [0]], budget=10) == [[0], [1, 2]]


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_a_budget_that_is_no_count_is_refused(budget):
    with pytest.raises(UsageError):
        pack([[1]], budget=budget)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), max_size=40), st.integers(1, 40))
def test_every_unit_is_in_one_batch_and_only_a_lone_unit_exceeds_the_budget(lengths, budget):
    out = pack(lengths, budget=budget)
    assert sorted(unit for batch in out for unit in batch) == list(range(len(lengths)))
    sizes = [sum(sum(lengths[unit]) for unit in batch) for batch in out]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, out, strict=True))
    if sizes and max(sizes) <= budget:  # never more than half of them could be spared
        assert 2 * sum(sizes) >= (len(sizes) - 1) * budget
    assert not lengths or max(map(sum, lengths)) == sum(lengths[out[0][0]])

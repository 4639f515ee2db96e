import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.errors import UsageError
from local_tinker.sampler.scheduler import PAGE, PagePool, Scheduler
from local_tinker.sampler.sequence import Request, SamplingParams, build_groups


def scheduler(requests, *, pages=100, max_rows=8, chunk=64):
    groups = build_groups(
        requests, max_positions=10_000, vocab_size=10**6, tokenizer=None, stream=False, skip_special_tokens=False
    )
    pool = PagePool(pages)
    return Scheduler(groups, pool=pool, max_rows=max_rows, prefill_chunk=chunk), pool


def prompt(length, first=0):
    return tuple(range(first, first + length))


def ask(length, new, *, n=1, first=0):
    return Request(prompt(length, first), SamplingParams(max_tokens=new), seed=0, n=n)


def test_low_pages_go_out_first_and_again():
    pool = PagePool(8)
    first, second = pool.take(3), pool.take(2)
    assert (first, second, pool.free, pool.touched) == ([0, 1, 2], [3, 4], 3, 5)
    pool.give(first)
    assert pool.take(4) == [0, 1, 2, 5]
    assert pool.touched == 6


def test_a_group_takes_its_prompt_once_and_room_for_each_sample():
    plan, pool = scheduler([ask(PAGE + 1, PAGE + 2, n=3)])
    plan.plan()
    # 2 pages of prompt; each sample stores all its tokens but the last: 17, so 2 pages
    assert 100 - pool.free == 2 + 3 * 2
    assert len(plan.rows) == 3


def test_prompts_are_cut_and_packed_to_the_chunk():
    plan, _ = scheduler([ask(50, 1), ask(30, 1, first=100), ask(5, 1, first=200)], chunk=64)
    cuts = [[(p.group.prompt_tokens[0], p.start, p.stop) for p in plan.plan()] for _ in range(3)]
    assert cuts == [[(0, 0, 50), (100, 0, 14)], [(100, 14, 30), (200, 0, 5)], []]


def test_samples_wait_for_a_free_row_in_order():
    plan, _ = scheduler([ask(4, 5, n=2), ask(4, 5, n=2, first=50)], max_rows=3)
    plan.plan()
    assert [(r.request, r.sample) for r in plan.rows] == [(0, 0), (0, 1), (1, 0)]
    plan.release([plan.rows[1]])
    plan.plan()
    assert [(r.request, r.sample) for r in plan.rows] == [(0, 0), (1, 0), (1, 1)]


def test_samples_wait_for_free_pages_and_the_prompt_stays_until_the_last():
    plan, pool = scheduler([ask(PAGE, PAGE + 1, n=3)], pages=3)
    for left in (3, 2, 1):
        plan.plan()
        assert plan.unfinished and len(plan.rows) == min(2, left)
        plan.release([plan.rows[0]])
    assert not plan.unfinished and pool.free == 3


def test_a_request_larger_than_the_whole_budget_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"prompt 1 .* 40 prompt tokens and 30 new ones.* budget is 64 tokens"):
        scheduler([ask(4, 4), ask(40, 30, first=9)], pages=4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 3)), max_size=8),
    st.integers(6, 12),
    st.integers(1, 5),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
)
def test_everything_runs_once_within_the_budget_whatever_finishes_first(asked, pages, max_rows, chunk, random):
    plan, pool = scheduler(
        [ask(length, new, n=n, first=first) for length, new, n, first in asked],
        pages=pages,
        max_rows=max_rows,
        chunk=chunk,
    )
    done, steps = [], 0
    while plan.unfinished:
        pieces = plan.plan()
        assert sum(p.stop - p.start for p in pieces) <= chunk
        assert len(plan.rows) <= max_rows
        held = [page for row in plan.rows for page in row.pages]
        held += [page for group in {id(r.group): r.group for r in plan.rows}.values() for page in group.pages]
        assert len(held) == len(set(held)) <= pages
        ready = [r for r in plan.rows if r.group.computed == len(r.group.prompt_tokens)]
        over = [r for r in ready if random.random() < 0.5]
        done += [(r.request, r.sample) for r in over]
        plan.release(over)
        steps += 1
        assert steps < 2000
    assert sorted(done) == [(i, s) for i, (_, _, n, _) in enumerate(asked) for s in range(n)]
    assert pool.free == pages

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.errors import UsageError
from local_tinker.sampler.group import PAGE
from local_tinker.sampler.grouping import build_groups
from local_tinker.sampler.scheduler import PagePool, Scheduler
from local_tinker.sampler.sequence import Request, SamplingParams


def scheduler(requests, *, pages=100, max_rows=8, chunk=64, seen_most=10**6, **options):
    groups = build_groups(
        requests, max_positions=10_000, vocab_size=10**6, tokenizer=None, stream=False, skip_special_tokens=False
    )
    pool = PagePool(pages)
    return Scheduler(groups, pool=pool, max_rows=max_rows, prefill_chunk=chunk, seen_most=seen_most, **options), pool


def prompt(length, first=0):
    return tuple(range(first, first + length))


def ask(length, new, *, n=1, first=0):
    return Request(prompt(length, first), SamplingParams(max_tokens=new), seed=0, n=n)


def test_low_pages_go_out_first_and_again():
    pool = PagePool(8)
    first, second = pool.take(3), pool.take(2)
    assert (first, second, pool.free, pool.touched) == ([1, 2, 3], [4, 5], 3, 6)  # page 0 is nobody's
    pool.give(first)
    assert pool.take(4) == [1, 2, 3, 6]
    assert pool.touched == 7


def compute(plan):
    """Admit and compute everything that can be; rows that are ready take their slots."""
    while pieces := plan.plan():
        for piece in pieces:
            if piece.stop == len(piece.owner.context):
                piece.owner.last_hidden = "computed"
    plan.entering()


def test_a_group_takes_its_prompt_once_and_pages_as_its_samples_grow():
    plan, pool = scheduler([ask(PAGE + 1, 3 * PAGE, n=3)])
    compute(plan)
    assert 100 - pool.free == 2 + 3 * 1
    for _ in range(PAGE):
        assert plan.reserve(1)
    assert 100 - pool.free == 2 + 3 * 1
    assert plan.reserve(1)
    assert 100 - pool.free == 2 + 3 * 2
    assert len(plan.rows) == 3


def test_a_lone_sample_keeps_its_prompt_among_its_own_pages():
    plan, pool = scheduler([ask(PAGE - 1, 3)])
    compute(plan)
    assert 100 - pool.free == 1
    assert plan.reserve(2)  # the last of its 3 tokens is never stored
    assert 100 - pool.free == 2
    assert plan.rows[0].exhausted


def test_prompts_are_cut_and_packed_to_the_chunk():
    plan, _ = scheduler([ask(50, 1), ask(30, 1, first=100), ask(5, 1, first=200)], chunk=64)
    cuts = [[(p.owner.context[0], p.start, p.stop) for p in plan.plan()] for _ in range(3)]
    # 100 goes whole into the second forward; a piece that continues another is slower
    assert cuts == [[(0, 0, 50)], [(100, 0, 30), (200, 0, 5)], []]


def test_a_context_longer_than_the_chunk_is_cut():
    plan, _ = scheduler([ask(50, 1), ask(130, 1, first=100)], chunk=64)
    cuts = [[(p.owner.context[0], p.start, p.stop) for p in plan.plan()] for _ in range(4)]
    assert cuts == [[(0, 0, 50), (100, 0, 14)], [(100, 14, 78)], [(100, 78, 130)], []]


def test_what_the_pieces_of_a_forward_see_has_a_bound():
    """Nine prompts with 128 tokens in common: their own tokens are few, the keys gathered for them are not."""
    common = tuple(range(2 * PAGE))
    asked = [Request((*common, 900 + i), SamplingParams(max_tokens=3), seed=0) for i in range(9)]
    plan, _ = scheduler(asked, max_rows=9, chunk=200, seen_most=4 * 129)
    cuts = []
    while pieces := plan.plan():
        cuts.append([p.owner.offset + p.stop for p in pieces])
    assert cuts == [[128, 129, 129, 129], [129] * 4, [129, 129]]
    plan.start_over(pages=100, max_rows=9, prefill_chunk=100)
    assert [[p.owner.offset + p.stop for p in plan.plan()] for _ in range(3)] == [[100], [128, 129], [129, 129]]


def test_what_sees_more_than_the_bound_goes_alone():
    plan, _ = scheduler([ask(50, 1), ask(130, 1, first=100), ask(9, 1, first=300)], chunk=300, seen_most=100)
    assert [[p.stop for p in plan.plan()] for _ in range(4)] == [[50], [130], [9], []]


def test_contexts_are_computed_one_by_one_where_results_must_not_depend_on_others():
    plan, pool = scheduler([ask(50, 80), ask(3, 1, first=100)], chunk=64, alone=True)
    assert [len(plan.plan()) for _ in range(3)] == [1, 1, 0]
    assert 100 - pool.free == 3 + 1  # all a row may come to at once: it is never evicted


def test_samples_wait_for_a_free_row_in_order():
    plan, _ = scheduler([ask(4, 5, n=2), ask(4, 5, n=2, first=50)], max_rows=3)
    compute(plan)
    assert [(r.request, r.sample, r.slot) for r in plan.rows] == [(0, 0, 0), (0, 1, 1), (1, 0, 2)]
    plan.release([plan.rows[1]])
    compute(plan)
    assert [(r.request, r.sample, r.slot) for r in plan.rows] == [(0, 0, 0), (1, 0, 2), (1, 1, 1)]


def test_new_rows_wait_until_some_slots_are_free_but_not_when_nothing_runs():
    plan, _ = scheduler([ask(4, 5, first=10 * i) for i in range(7)], max_rows=4, admit_at=2)
    compute(plan)
    plan.release(plan.rows[:1])
    compute(plan)
    assert len(plan.rows) == 3
    plan.release(plan.rows[:1])
    compute(plan)
    assert len(plan.rows) == 4
    plan.release(plan.rows)
    compute(plan)
    assert len(plan.rows) == 1


def test_without_pages_the_youngest_waits_and_comes_back_with_its_tokens():
    plan, pool = scheduler([ask(4, 200, n=2), ask(PAGE, 200, first=50)], pages=8, max_rows=3)
    compute(plan)
    young = plan.rows[-1]
    for row in plan.rows:
        for token in range(3):
            row.push(7 + token, -1.0)
    while plan.reserve(PAGE):
        pass
    assert plan.evict() == 2
    assert young.pages == [] and young.slot is None and plan.waiting
    assert list(young.context) == [*prompt(PAGE, 50), 7, 8, 9]
    plan.release(plan.rows)
    compute(plan)
    assert plan.rows == [young] and young.slot == 0 and young.last_hidden == "computed"


def test_groups_that_begin_alike_take_pages_for_the_beginning_once_and_keep_it_to_the_last():
    beginning = prompt(2 * PAGE + 9)
    asked = [
        Request(beginning + prompt(20, first), SamplingParams(max_tokens=9), seed=first, n=2) for first in (300, 400)
    ]
    plan, pool = scheduler([*asked, ask(20, 9, first=90)], max_rows=2, chunk=1000)
    compute(plan)
    assert 100 - pool.free == 2 + 1 + 2 * 1
    (one,) = {row.group for row in plan.rows}
    assert one.offset == 2 * PAGE and one.context == (beginning + prompt(20, 300))[2 * PAGE :]
    assert one.before == one.base.pages and one.all_pages == one.base.pages + one.pages
    plan.release(plan.rows)
    assert 100 - pool.free == 2
    assert [(p.owner, p.stop) for p in plan.plan()] == [(plan.rows[0].group, 29)]  # the beginning stands already
    plan.release(plan.rows)
    assert pool.free == 100


def test_a_beginning_kept_for_later_makes_room_for_who_is_running_now():
    beginning = prompt(2 * PAGE)
    groups = [
        Request(beginning + prompt(9, first), SamplingParams(max_tokens=9), seed=first, n=2) for first in (300, 400)
    ]
    plan, pool = scheduler([groups[0], ask(PAGE, 4 * PAGE, first=90), groups[1]], pages=6, max_rows=2, chunk=1000)
    compute(plan)
    plan.release(plan.rows)
    assert pool.free == 6 - 2
    compute(plan)
    assert [row.request for row in plan.rows] == [1]
    while not plan.rows[0].exhausted:
        assert plan.reserve(PAGE)
    plan.release(plan.rows)
    compute(plan)
    assert [row.request for row in plan.rows] == [2, 2] and plan.rows[0].group.base.last_hidden == "computed"


def test_starting_over_forgets_what_was_only_kept():
    beginning = prompt(2 * PAGE)
    groups = [
        Request(beginning + prompt(9, first), SamplingParams(max_tokens=9), seed=first, n=2) for first in (300, 400)
    ]
    plan, _ = scheduler(groups, max_rows=2, chunk=1000)
    compute(plan)
    plan.release(plan.rows)
    plan.start_over(pages=50, max_rows=2, prefill_chunk=1000)
    assert [(p.start, p.stop) for p in plan.plan()] == [(0, 2 * PAGE), (0, 9)]
    assert 50 - plan.pool.free == 2 + 1 + 2 * 1


def test_a_request_larger_than_the_whole_budget_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"prompt 1 .* 100 prompt tokens and 130 new ones.* budget is 192 tokens"):
        scheduler([ask(4, 4), ask(100, 130, first=9)], pages=3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 4), st.integers(0, 3)), max_size=8),
    st.integers(6, 12),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_everything_runs_once_within_the_budget_whatever_finishes_first(asked, pages, max_rows, chunk, steps, random):
    plan, pool = scheduler(
        [ask(length, new, n=n, first=first) for length, new, n, first in asked],
        pages=pages,
        max_rows=max_rows,
        chunk=chunk,
    )
    done, rounds = [], 0
    while plan.unfinished:
        compute(plan)
        assert len(plan.rows) <= max_rows
        while not plan.reserve(steps):
            plan.evict()
        held = [page for row in plan.rows for page in row.pages]
        read = {id(part): part for row in plan.rows for part in row.group.chain}.values()
        assert all(part.pages for part in read)
        held += [page for part in read for page in part.pages]
        assert len(held) == len(set(held)) <= pages and 0 not in held
        slots = [row.slot for row in plan.decoding]
        assert len(slots) == len(set(slots))
        over = [r for r in plan.decoding if r.exhausted or random.random() < 0.3]
        for row in plan.decoding:
            row.extend(
                [1] * min(steps, row.max_new - len(row.tokens) - 1),
                [-1.0] * min(steps, row.max_new - len(row.tokens) - 1),
            )
        done += [(r.request, r.sample) for r in over]
        plan.release(over)
        rounds += 1
        assert rounds < 2000
    assert sorted(done) == [(i, s) for i, (_, _, n, _) in enumerate(asked) for s in range(n)]
    assert pool.free == pages

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.advantages import (
    check_reward,
    flatten_rewards,
    gae,
    group_advantages,
    penalise_kl,
    place_scores,
    whiten,
)
from local_tinker.errors import UsageError
from local_tinker.types import Completion, Rollout


def completion(tokens=3, text="x"):
    return Completion(
        text,
        tokens=range(tokens),
        logprobs=[-1.0] * tokens,
        prompt_tokens=[1],
        stop_reason="stop",
        weights_version="a/0",
    )


def groups(*sizes, tokens=3):
    return [[completion(tokens) for _ in range(size)] for size in sizes]


class TestGroupAdvantages:
    def test_by_hand(self):
        # [0, 1]: mean 0.5, unbiased std sqrt(0.5). [1, 2, 3]: mean 2, std 1.
        result = group_advantages([[0.0, 1.0], [1.0, 2.0, 3.0]])
        half = 0.5 / (math.sqrt(0.5) + 1e-4)
        assert result.values[0].tolist() == pytest.approx([-half, half], abs=1e-15)
        assert result.values[1].tolist() == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001], abs=1e-15)
        assert result.metrics["reward_mean"] == pytest.approx(7 / 5)
        assert result.metrics["reward_std"] == pytest.approx(np.std([0, 1, 1, 2, 3], ddof=1))
        assert result.metrics["flat_group_fraction"] == 0.0

    def test_without_scale_only_the_mean_is_taken_away(self):
        assert group_advantages([[0.0, 1.0], [1.0, 2.0, 3.0]], scale="none").values[1].tolist() == [-1.0, 0.0, 1.0]

    def test_batch_scale_divides_every_group_by_the_std_of_the_call(self):
        std = np.std([0, 1, 1, 2, 3], ddof=1) + 1e-4
        values = group_advantages([[0.0, 1.0], [1.0, 2.0, 3.0]], scale="batch").values
        assert values[0].tolist() == pytest.approx([-0.5 / std, 0.5 / std])
        assert values[1].tolist() == pytest.approx([-1 / std, 0.0, 1 / std])

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    @pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 1e9, 0.0])
    @pytest.mark.parametrize("size", [2, 3, 7, 8])
    def test_equal_rewards_give_exactly_zero(self, scale, reward, size):
        result = group_advantages([[reward] * size, [0.0, 1.0]], scale=scale)
        assert result.values[0].tolist() == [0.0] * size
        assert result.metrics["flat_group_fraction"] == 0.5

    def test_an_unscorable_completion_gets_zero_and_leaves_mean_and_std(self):
        with_hole = group_advantages([[0.0, None, 1.0, 1.0]])
        without = group_advantages([[0.0, 1.0, 1.0]])
        assert with_hole.values[0][[0, 2, 3]].tolist() == without.values[0].tolist()
        assert with_hole.values[0][1] == 0.0
        assert with_hole.metrics["unscorable_fraction"] == 0.25
        assert with_hole.metrics["reward_mean"] == without.metrics["reward_mean"]

    def test_a_group_with_one_scorable_completion_is_flat(self):
        assert group_advantages([[None, 3.0], [0.0, 1.0]]).values[0].tolist() == [0.0, 0.0]

    def test_nothing_scorable_at_all_is_an_error(self):
        with pytest.raises(UsageError, match="all 4 rewards are None: does the reward function return"):
            group_advantages([[None, None], [None, None]])

    def test_a_group_of_one_is_an_error_that_names_it(self):
        with pytest.raises(UsageError, match=r"group 1 has 1 completion: .*n=8"):
            group_advantages([[0.0, 1.0], [1.0]])
        with pytest.raises(UsageError, match="group 0 has 0 completions"):
            group_advantages([[]])

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (math.nan, "is nan: a reward must be finite"),
            (math.inf, "is inf"),
            (True, r"is True \(a bool\)"),
            ("1.0", r"is '1.0' \(str\)"),
            (torch.tensor([1.0]), r"has shape \(1,\)"),
            (np.array([1.0]), r"has shape \(1,\)"),
            (np.bool_(True), r"is True \(a bool\)"),
            (1 + 2j, r"is \(1\+2j\) \(complex\)"),
            ([1.0], r"is \[1.0\] \(list\)"),
        ],
        ids=str,
    )
    def test_a_bad_reward_is_an_error_that_names_its_place(self, bad, words):
        with pytest.raises(UsageError, match=r"rewards\[1\]\[2\] " + words):
            group_advantages([[0.0, 1.0, 2.0], [0.0, 1.0, bad]])

    def test_an_unknown_scale_is_an_error(self):
        with pytest.raises(UsageError, match="scale_rewards must be one of 'group', 'batch', 'none', got 'std'"):
            group_advantages([[0.0, 1.0]], scale="std")

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.lists(st.floats(-100, 100), min_size=2, max_size=6), min_size=1, max_size=4),
        st.sampled_from(["group", "batch", "none"]),
    )
    def test_a_group_sums_to_zero_and_keeps_the_order_of_its_rewards(self, rewards, scale):
        for values, group in zip(group_advantages(rewards, scale=scale).values, rewards, strict=True):
            assert abs(values.sum()) <= 1e-9 * max(1.0, np.abs(values).sum())
            order = np.argsort(group, kind="stable")
            assert (np.diff(values[order]) >= 0).all()


class TestFlattenRewards:
    def test_nested_and_flat_rewards_mean_the_same(self):
        completions = groups(2, 2, 2)
        nested = flatten_rewards(completions, [[1.0, 2.0], [3, 4], (5.0, 6.0)])
        flat = flatten_rewards(completions, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        assert nested.rewards == flat.rewards == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert nested.completions == [c for g in completions for c in g]
        assert nested.group_sizes == [2, 2, 2]
        assert nested.nested() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]

    @pytest.mark.parametrize("kind", [np.array, torch.tensor])
    @pytest.mark.parametrize("values", [[[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0, 3.0, 4.0]])
    def test_arrays_and_tensors_of_rewards_are_taken_whole(self, kind, values):
        assert flatten_rewards(groups(2, 2), kind(values)).rewards == [1.0, 2.0, 3.0, 4.0]

    def test_numpy_and_torch_scalars_are_numbers(self):
        rewards = [np.float32(1.5), np.int64(2), torch.tensor(0.25), 3]
        assert flatten_rewards(groups(4)[0], rewards).rewards == [1.5, 2.0, 0.25, 3.0]

    def test_ungrouped_completions_take_one_reward_each(self):
        got = flatten_rewards(groups(3)[0], [1.0, 2.0, 3.0])
        assert got.rewards == [1.0, 2.0, 3.0]
        assert got.group_sizes is None
        with pytest.raises(UsageError, match="got 2 rewards for 3 completions: give one for each"):
            flatten_rewards(groups(3)[0], [1.0, 2.0])

    def test_a_reward_a_group_says_that_the_function_was_given_groups(self):
        words = (
            "got 4 rewards for 4 groups of 8 completions: reward_fn was given a group; wrap it in local_tinker.reward, "
            "or score [[f(p, c) for c in g] for p, g in zip(prompts, groups)]"
        )
        with pytest.raises(UsageError, match=re.escape(words)):
            flatten_rewards(groups(8, 8, 8, 8), [0.0, 1.0, 0.0, 1.0])

    @pytest.mark.parametrize(
        ("rewards", "words"),
        [
            ([1.0] * 5, "got 5 rewards for 2 groups of 3 completions: give one reward for each of the 6"),
            ([[1.0] * 3, [1.0] * 2], r"rewards\[1\] has 2 rewards for a group of 3 completions"),
            ([[1.0] * 3], "got 1 lists of rewards for 2 groups of 3 completions"),
            ([[1.0] * 3, 1.0], "got 2 lists of rewards for 2 groups"),
            ([], "got 0 rewards for 2 groups"),
            (1.0, "rewards must be a list, got float"),
            ({"a": 1.0}, "rewards must be a list, got dict"),
            ("ab", "rewards must be a list, got str"),
            ([1.0, 2.0, None, 1.0, 1.0, 1.0], r"rewards\[2\] is None: a reward is a number"),
            ([[1.0, 1.0, 1.0], [1.0, True, 1.0]], r"rewards\[1\]\[1\] is True \(a bool\)"),
            ([[1.0, 1.0, 1.0], [1.0, [1.0], 1.0]], r"rewards\[1\]\[1\] is \[1.0\] \(list\)"),
        ],
        ids=str,
    )
    def test_rewards_that_do_not_fit_say_what_came_and_what_is_wanted(self, rewards, words):
        with pytest.raises(UsageError, match=words):
            flatten_rewards(groups(3, 3), rewards)

    def test_ragged_groups_are_named_one_by_one(self):
        assert flatten_rewards(groups(2, 3), [[1, 2], [3, 4, 5]]).rewards == [1.0, 2.0, 3.0, 4.0, 5.0]
        with pytest.raises(UsageError, match="got 4 rewards for 2 groups of 2, 3 completions"):
            flatten_rewards(groups(2, 3), [1.0] * 4)

    def test_unscorable_completions_pass_where_they_are_allowed(self):
        assert flatten_rewards(groups(2), [[None, 1.0]], unscorable=True).rewards == [None, 1.0]

    @pytest.mark.parametrize("nested", [True, False])
    def test_rewards_a_token_stay_arrays(self, nested):
        rows = [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
        rewards = [rows[:2], rows[2:]] if nested else rows
        got = flatten_rewards(groups(2, 2), rewards, per_token=True)
        assert [r.tolist() for r in got.rewards] == rows

    def test_a_wrong_number_of_rewards_a_token_is_an_error(self):
        with pytest.raises(UsageError, match=r"rewards\[1\] has 2 rewards for a completion of 3 tokens"):
            flatten_rewards(groups(2)[0], [1.0, [0.0, 1.0]], per_token=True)
        with pytest.raises(UsageError, match=r"rewards\[0\]\[1\] is nan"):
            flatten_rewards(groups(2)[0], [[0.0, math.nan, 1.0], 1.0], per_token=True)

    def test_completions_that_are_no_completions_are_an_error(self):
        with pytest.raises(UsageError, match="got no completions"):
            flatten_rewards([], [])
        with pytest.raises(UsageError, match=r"completions\[0\] is a group, completions\[1\] is not"):
            flatten_rewards([groups(2)[0], completion()], [1.0, 1.0, 1.0])
        with pytest.raises(UsageError, match=r"completions\[0\]\[1\] is int, not a completion"):
            flatten_rewards([[completion(), 3]], [1.0, 1.0])
        with pytest.raises(UsageError, match="completions must be a list, got Completion"):
            flatten_rewards(completion(), [1.0])

    def test_rollouts_are_completions(self):
        rollout = Rollout((1,), (2, 3), (True, False), (-1.0, 0.0), "stop", "a/0")
        assert flatten_rewards([[rollout, rollout]], [[0.0, 1.0]]).group_sizes == [2]


def test_check_reward_returns_none_only_where_it_is_allowed():
    assert check_reward(None, "r", unscorable=True) is None
    with pytest.raises(UsageError, match="does the reward function return on every path"):
        check_reward(None, "r")


class TestPlaceScores:
    @pytest.mark.parametrize(
        ("trained", "expected"),
        [
            ([True], [2.0]),
            ([True, True, True], [0.0, 0.0, 2.0]),
            ([True, True, False, False], [0.0, 2.0, 0.0, 0.0]),
            ([False, True, False, True, False], [0.0, 0.0, 0.0, 2.0, 0.0]),
        ],
    )
    def test_a_score_goes_to_the_last_sampled_token(self, trained, expected):
        assert place_scores([2.0], [trained])[0].tolist() == expected

    def test_a_list_stays_where_it_is(self):
        assert place_scores([[0.5, 0.0, 1.0]], [[True, False, True]])[0].tolist() == [0.5, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("rewards", "trained", "words"),
        [
            ([1.0], [[False, False]], "rollout 0 has no trained token"),
            ([1.0, [1.0, 0.0]], [[True], [True]], r"rewards\[1\] has 2 rewards for 1 tokens"),
            ([[0.0, 0.5]], [[True, False]], r"rewards\[0\]\[1\] is 0.5 on a token that the policy did not sample"),
            ([[0.0, math.inf]], [[True, True]], r"rewards\[0\]\[1\] is inf"),
            ([None], [[True]], r"rewards\[0\] is None"),
            ([1.0], [[True], [True]], "got 1 rewards for 2 rollouts"),
        ],
        ids=str,
    )
    def test_what_cannot_be_placed_is_an_error(self, rewards, trained, words):
        with pytest.raises(UsageError, match=words):
            place_scores(rewards, trained)


class TestGae:
    def test_a_terminal_rollout_by_hand(self):
        # delta = r + 0.9 V' - V: 0.9*0.4-0.5 = -0.14, 0.9*0.3-0.4 = -0.13, 1-0.3 = 0.7; gamma lambda = 0.72.
        advantages, returns = gae(
            [0, 0, 1], [0.5, 0.4, 0.3], trained=[True] * 3, terminal=True, gamma=0.9, gae_lambda=0.8
        )
        last, middle = 0.7, -0.13 + 0.72 * 0.7
        first = -0.14 + 0.72 * middle
        assert advantages.tolist() == pytest.approx([first, middle, last], abs=1e-15)
        assert returns.tolist() == pytest.approx([first + 0.5, middle + 0.4, 1.0], abs=1e-15)

    def test_a_cut_rollout_bootstraps_from_the_value_after_its_last_token(self):
        advantages, returns = gae(
            [0, 0, 1],
            [0.5, 0.4, 0.3],
            trained=[True] * 3,
            terminal=False,
            bootstrap_value=2.0,
            gamma=0.9,
            gae_lambda=0.8,
        )
        last = 1 + 0.9 * 2.0 - 0.3
        middle = -0.13 + 0.72 * last
        assert advantages.tolist() == pytest.approx([-0.14 + 0.72 * middle, middle, last], abs=1e-15)
        assert returns[-1] == pytest.approx(2.8)

    def test_a_terminal_rollout_ignores_the_bootstrap_value(self):
        words = {"trained": [True, True], "gamma": 0.9}
        plain, _ = gae([0, 1], [0.5, 0.4], terminal=True, **words)
        for value in (7.0, math.nan):
            assert gae([0, 1], [0.5, 0.4], terminal=True, bootstrap_value=value, **words)[0].tolist() == plain.tolist()
        with pytest.raises(UsageError, match="bootstrap_value is nan"):
            gae([0, 1], [0.5, 0.4], terminal=False, bootstrap_value=math.nan, **words)

    @pytest.mark.parametrize("hole", [math.nan, 1e30, 0.0])
    def test_tokens_a_tool_wrote_take_no_time_and_have_no_value(self, hole):
        words = {"terminal": True, "gamma": 0.9, "gae_lambda": 0.8}
        dense = gae([0.25, 0, 1], [0.5, 0.4, 0.3], trained=[True] * 3, **words)
        trained = [False, True, False, False, True, True, False]
        holed = gae([0, 0.25, 0, 0, 0, 1, 0], [hole, 0.5, hole, hole, 0.4, 0.3, hole], trained=trained, **words)
        for whole, packed in zip(holed, dense, strict=True):
            assert whole[trained].tolist() == packed.tolist()
            assert not whole[~np.array(trained)].any()

    def test_with_gamma_and_lambda_one_the_return_is_the_sum_of_rewards_to_come(self):
        advantages, returns = gae(
            [1, 2, 3], [5.0, 1.0, -2.0], trained=[True] * 3, terminal=True, gamma=1.0, gae_lambda=1.0
        )
        assert returns.tolist() == pytest.approx([6.0, 5.0, 3.0])
        assert advantages.tolist() == pytest.approx([1.0, 4.0, 5.0])

    def test_with_lambda_zero_it_is_the_one_step_error(self):
        advantages, _ = gae([1, 2], [5.0, 1.0], trained=[True] * 2, terminal=True, gamma=0.5, gae_lambda=0.0)
        assert advantages.tolist() == [1 + 0.5 - 5.0, 1.0]

    def test_a_perfect_critic_leaves_no_advantage(self):
        values = [0.9**2, 0.9, 1.0]
        advantages, returns = gae([0, 0, 1], values, trained=[True] * 3, terminal=True, gamma=0.9, gae_lambda=0.95)
        assert np.abs(advantages).max() < 1e-15
        assert returns.tolist() == pytest.approx(values)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_it_equals_the_discounted_sum_of_one_step_errors(self, data):
        n = data.draw(st.integers(1, 6))
        numbers = st.floats(-5, 5)
        rewards, values = (data.draw(st.lists(numbers, min_size=n, max_size=n)) for _ in range(2))
        gamma, decay, bootstrap = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1)), data.draw(numbers)
        terminal = data.draw(st.booleans())
        advantages, _ = gae(
            rewards,
            values,
            trained=[True] * n,
            terminal=terminal,
            bootstrap_value=bootstrap,
            gamma=gamma,
            gae_lambda=decay,
        )
        after = [*values[1:], 0.0 if terminal else bootstrap]
        errors = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, after, strict=True)]
        expected = [sum((gamma * decay) ** (j - i) * errors[j] for j in range(i, n)) for i in range(n)]
        assert advantages.tolist() == pytest.approx(expected, abs=1e-10)

    def test_lengths_that_differ_are_an_error(self):
        with pytest.raises(UsageError, match="got 2 rewards and 3 values for 3 tokens"):
            gae([0, 1], [0.0, 0.0, 0.0], trained=[True] * 3, terminal=True)


class TestWhiten:
    def test_mean_zero_and_unbiased_variance_one_over_real_tokens_of_all_rollouts(self):
        rng = np.random.default_rng(0)
        arrays = [rng.normal(3, 5, n) for n in (4, 1, 7)]
        masks = [np.array([1, 1, 0, 1], bool), np.array([1], bool), np.array([0, 1, 1, 1, 1, 0, 1], bool)]
        for array, mask in zip(arrays, masks, strict=True):
            array[~mask] = math.nan
        white = whiten(arrays, masks)
        real = np.concatenate([w[m] for w, m in zip(white, masks, strict=True)])
        assert abs(real.mean()) < 1e-15
        assert real.var(ddof=1) == pytest.approx(1.0, abs=1e-14)
        assert all(not w[~m].any() for w, m in zip(white, masks, strict=True))

    def test_by_hand(self):
        (white,) = whiten([np.array([1.0, 99.0, 3.0])], [[True, False, True]])
        assert white.tolist() == pytest.approx([-math.sqrt(0.5), 0.0, math.sqrt(0.5)])

    @pytest.mark.parametrize("value", [0.1, 0.0, 1e9])
    @pytest.mark.parametrize("count", [1, 3, 7])
    def test_equal_advantages_become_zero(self, value, count):
        (white,) = whiten([np.full(count, value)], [[True] * count])
        assert white.tolist() == [0.0] * count

    def test_the_spread_of_rounding_is_not_blown_up(self):
        (white,) = whiten([np.array([0.3, 0.1 + 0.2, 0.3])], [[True] * 3])
        assert white.tolist() == [0.0] * 3

    def test_what_was_given_is_left_alone(self):
        given_array = np.array([1.0, 2.0])
        whiten([given_array], [[True, True]])
        assert given_array.tolist() == [1.0, 2.0]

    def test_shapes_that_differ_are_an_error(self):
        with pytest.raises(UsageError, match="differ in shape"):
            whiten([np.zeros(2)], [[True]])


def test_the_kl_penalty_is_taken_from_the_reward_of_sampled_tokens():
    rewards = penalise_kl(
        np.array([0.0, 0.0, 1.0]),
        np.array([-1.0, math.nan, -2.0]),
        np.array([-1.5, math.inf, -1.0]),
        trained=[True, False, True],
        beta=0.1,
    )
    assert rewards.tolist() == pytest.approx([-0.05, 0.0, 1.1])

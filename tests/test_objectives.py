"""DPO, GRPO, PPO and Tinker's losses through the client, against plain formulas over the client's own log-probs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from local_tinker import Completion, Datum, ModelInput, Rollout
from local_tinker.errors import UsageError
from tests.test_training import everything, gradient, inner, relative, same, warm

CHAT = [{"role": "user", "content": "What is one plus two?"}]
PAIRS = [
    {"prompt": "one plus two", "chosen": " Three.", "rejected": " the lazy dog jumps over"},
    {"prompt": "the quick brown fox " * 4, "chosen": " jumps", "rejected": " 0123456789 0123456789"},
    {"prompt": "0", "chosen": "123", "rejected": "3"},
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "Three."}],
        "rejected": [{"role": "assistant", "content": "dog"}],
    },
]
TEXT_PAIRS = PAIRS[:3]


@pytest.fixture
def client(service, tiny_model):
    def make(*, fresh=False, **options):
        defaults = dict(rank=4, alpha=8, quantize=None, dtype="float32", seed=1)
        trainer = service.create_lora_training_client(str(tiny_model), **{**defaults, **options})
        if not fresh:
            warm(trainer)
        return trainer

    return make


# -- DPO ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 1, 64])
@pytest.mark.parametrize(
    ("quantize", "dtype"), [(None, "float32"), (None, "bfloat16"), ("4bit", "bfloat16"), ("8bit", "float32")]
)
def test_dpo_of_a_fresh_adapter_starts_at_ln_two_at_every_precision_and_cut(client, quantize, dtype, budget):
    trainer = client(fresh=True, quantize=quantize, dtype=dtype, micro_batch_tokens=budget)
    loss = trainer.forward_backward(TEXT_PAIRS, loss_fn="dpo")
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    assert loss.metrics["reward_margin"] == 0.0 and loss.metrics["accuracy"] == 0.0
    assert float(gradient(trainer).abs().max()) > 0


def sums(trainer, rows):
    """Sequence log-probs of chosen and rejected answers (P, 2), by scoring each on its own."""
    found = []
    for row in rows:
        pair = []
        for side in ("chosen", "rejected"):
            encoded = trainer.renderer.prompt_completion(row["prompt"], row[side])
            datum = Datum(ModelInput.from_ints(encoded.tokens[:-1]), {"target_tokens": encoded.tokens[1:]})
            (logprobs,) = trainer.forward([datum], "cross_entropy").logprobs
            pair.append(float(logprobs[np.asarray(encoded.trained[1:])].sum()))
        found.append(pair)
    return np.array(found)


def test_dpo_equals_its_formula_with_the_base_as_reference(client):
    policy, base = client(dtype="float64"), client(fresh=True, dtype="float64")
    gains = sums(policy, TEXT_PAIRS) - sums(base, TEXT_PAIRS)
    margin = gains[:, 0] - gains[:, 1]
    loss = policy.forward_backward(TEXT_PAIRS, loss_fn="dpo", beta=0.3, label_smoothing=0.1)
    sigmoid = 1 / (1 + np.exp(-0.3 * margin))
    assert float(loss) == pytest.approx(np.mean(-0.9 * np.log(sigmoid) - 0.1 * np.log(1 - sigmoid)), abs=1e-9)
    assert loss.metrics["reward_margin"] == pytest.approx(0.3 * margin.mean(), abs=1e-9)
    assert loss.metrics["accuracy"] == pytest.approx((margin > 0).mean())


def test_dpo_written_by_the_user_equals_the_built_in(client):
    built_in, custom, base = client(), client(), client(fresh=True)
    expected = built_in.forward_backward(TEXT_PAIRS, loss_fn="dpo", beta=0.2)
    reference = sums(base, TEXT_PAIRS)

    def dpo(data, logprobs):
        totals = torch.stack(
            [(torch.from_numpy(d.loss_fn_inputs["weights"]) * lp).sum() for d, lp in zip(data, logprobs, strict=True)]
        )
        gains = totals.view(-1, 2) - torch.tensor(reference, dtype=totals.dtype)
        loss = -torch.nn.functional.logsigmoid(0.2 * (gains[:, 0] - gains[:, 1])).mean()
        return loss, {"margin": float((gains[:, 0] - gains[:, 1]).mean().detach())}

    result = custom.forward_backward_custom(TEXT_PAIRS, dpo, loss_fn="dpo")
    assert float(result) == pytest.approx(float(expected), abs=1e-6)
    assert relative(gradient(custom), gradient(built_in)) < 1e-5


def test_training_on_from_an_adapter_takes_that_adapter_as_the_reference(service, client, tiny_model, tmp_path):
    first = client()
    folder = first.save_adapter(tmp_path / "a")
    second = service.create_lora_training_client(str(tiny_model), quantize=None, dtype="float32", adapter=folder)
    assert float(second.forward_backward(TEXT_PAIRS, loss_fn="dpo")) == pytest.approx(math.log(2), abs=1e-6)
    second.optim_step(learning_rate=1e-2)
    moved = float(second.forward(TEXT_PAIRS, loss_fn="dpo"))
    assert abs(moved - math.log(2)) > 1e-3
    second.save_state(tmp_path / "s")
    again = service.create_lora_training_client(str(tiny_model), quantize=None, dtype="float32", adapter=folder)
    again.load_state(tmp_path / "s")
    assert float(again.forward(TEXT_PAIRS, loss_fn="dpo")) == moved


def test_dpo_accumulates_over_pairs_like_one_batch(client):
    whole, parts = client(dtype="float64"), client(dtype="float64")
    whole.forward_backward(TEXT_PAIRS, loss_fn="dpo")
    parts.forward_backward(TEXT_PAIRS[:1], loss_fn="dpo")
    parts.forward_backward(TEXT_PAIRS[1:], loss_fn="dpo")
    assert relative(gradient(parts), gradient(whole)) < 1e-12


def test_dpo_learns_sixteen_pairs(service, tiny_model):
    trainer = service.create_lora_training_client(str(tiny_model), rank=8, quantize="4bit", dtype="float32")
    rows = [{"prompt": f"{i} plus {i}", "chosen": f" {2 * i}.", "rejected": f" {3 * i + 1} dog"} for i in range(16)]
    for _ in range(25):
        loss = trainer.forward_backward(rows, loss_fn="dpo")
        trainer.optim_step(learning_rate=2e-3)
    assert loss.metrics["accuracy"] == 1.0 and float(loss) < 0.1


def test_chat_pairs_and_text_pairs_are_both_read(client):
    trainer = client(fresh=True)
    assert float(trainer.forward([PAIRS[3]], loss_fn="dpo")) == pytest.approx(math.log(2), abs=1e-6)


# -- GRPO --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rollouts(client):
    trainer = client(dtype="float64")
    sampler = trainer.save_weights_and_get_sampling_client()
    groups = sampler.sample_batch([CHAT, "the quick"], n=3, max_tokens=9, seed=3)
    return trainer, groups


REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]


def policy_gradient(trainer, groups, advantages, divisor):
    """-sum A log pi / divisor over completions, written with forward_backward_custom on a fresh twin."""
    completions = [c for g in groups for c in g]
    datums = []
    for c in completions:
        tokens = [*c.prompt_tokens, *c.tokens]
        weights = [0.0] * (len(c.prompt_tokens) - 1) + [1.0] * len(c.tokens)
        datums.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}))

    def loss(data, logprobs):
        terms = [
            a * (torch.from_numpy(d.loss_fn_inputs["weights"]) * lp).sum()
            for a, d, lp in zip(advantages, data, logprobs, strict=True)
        ]
        return -sum(terms) / divisor, {}

    trainer.forward_backward_custom(datums, loss)
    return gradient(trainer)


def advantages_of(rewards):
    found = []
    for group in rewards:
        r = np.array(group)
        found += list((r - r.mean()) / (r.std(ddof=1) + 1e-4))
    return found


@pytest.mark.parametrize(
    "rewards", [REWARDS, [r for g in REWARDS for r in g], np.array(REWARDS), torch.tensor(REWARDS)]
)
def test_on_policy_grpo_is_the_policy_gradient_of_group_advantages(client, rollouts, rewards):
    trainer, groups = rollouts
    loss = trainer.forward_backward(groups, rewards, loss_fn="grpo")
    tokens = sum(len(c.tokens) for g in groups for c in g)
    want = policy_gradient(client(dtype="float64"), groups, advantages_of(REWARDS), tokens)
    assert relative(gradient(trainer), want) < 1e-4  # sampled log-probs are fp32
    metrics = loss.metrics
    assert metrics["reward_mean"] == pytest.approx(np.mean(REWARDS))
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["logprob_gap_max"] < 1e-4 and metrics["clip_fraction_high"] == 0.0
    assert metrics["flat_group_fraction"] == 0.0 and metrics["entropy"] > 0
    assert metrics["completion_length"] == pytest.approx(tokens / 6)
    assert metrics["truncated_fraction"] == pytest.approx(
        np.mean([c.stop_reason == "length" for g in groups for c in g])
    )


def test_equal_rewards_give_exactly_zero_gradient_and_are_explained(tiny_model, capsys):
    from local_tinker import ServiceClient

    trainer = ServiceClient(device="cpu").create_lora_training_client(
        str(tiny_model), rank=4, quantize=None, dtype="float32"
    )
    groups = trainer.save_weights_and_get_sampling_client().sample_batch([CHAT], n=3, max_tokens=4)
    trainer.forward_backward(groups, [[0.1, 0.1, 0.1]], loss_fn="grpo")
    assert torch.count_nonzero(gradient(trainer)) == 0
    assert "every group has equal rewards" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["grpo", "ppo", "importance_sampling"])
def test_completions_drawn_through_a_filter_are_pointed_out_once(tiny_model, capsys, loss):
    from local_tinker import ServiceClient

    trainer = ServiceClient(device="cpu").create_lora_training_client(
        str(tiny_model), rank=4, quantize=None, dtype="float32"
    )
    sampler = trainer.save_weights_and_get_sampling_client()
    scores = [[0.1, 0.2, 0.3]] if loss == "grpo" else [0.1, 0.2, 0.3]
    for settings, said in [({"temperature": 1.3}, 0), ({"top_p": 0.9}, 1), ({"top_k": 4}, 0)]:
        (group,) = sampler.sample_batch([CHAT], n=3, max_tokens=4, seed=1, **settings)
        trainer.forward_backward([group] if loss == "grpo" else group, scores, loss_fn=loss)
        assert capsys.readouterr().err.count("sample for policy losses without filters") == said


def test_the_logprob_gap_is_only_of_completions_of_the_present_weights(rollouts):
    trainer, groups = rollouts
    trainer.forward_backward(groups, REWARDS, loss_fn="grpo")
    trainer.optim_step(learning_rate=1e-3)
    later = trainer.forward_backward(groups, REWARDS, loss_fn="grpo")
    assert "logprob_gap_max" not in later.metrics and later.metrics["ratio_max"] > 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"aggregation": "sequence"},
        {"aggregation": "constant", "max_tokens": 9},
        {"scale_rewards": "none"},
        {"clip_low": None, "clip_high": None, "max_importance_ratio": 2.0},
    ],
)
def test_grpo_accumulates_over_groups_like_one_batch(client, rollouts, options):
    whole, groups = rollouts
    parts = client(dtype="float64")
    whole.forward_backward(groups, REWARDS, loss_fn="grpo", **options)
    for group, rewards in zip(groups, REWARDS, strict=True):
        parts.forward_backward([group], [rewards], loss_fn="grpo", **options)
    assert relative(gradient(parts), gradient(whole)) < 1e-10


def test_trainer_old_logprobs_are_those_of_the_first_pass(rollouts):
    trainer, groups = rollouts
    first = trainer.forward_backward(groups, REWARDS, loss_fn="grpo", old_logprobs="trainer")
    assert first.metrics["ratio_max"] == 1.0
    trainer.optim_step(learning_rate=1e-2)
    second = trainer.forward_backward(groups, REWARDS, loss_fn="grpo", old_logprobs="trainer")
    against_sampler = trainer.forward(groups, REWARDS, loss_fn="grpo")
    assert second.metrics["ratio_max"] == pytest.approx(against_sampler.metrics["ratio_max"], rel=1e-4) != 1.0


def test_an_unscorable_completion_teaches_nothing(client, rollouts):
    trainer, groups = rollouts
    trainer.forward_backward([groups[0]], [[1.0, None, 0.0]], loss_fn="grpo")
    other = client(dtype="float64")
    other.forward_backward([[groups[0][0], groups[0][2]]], [[1.0, 0.0]], loss_fn="grpo")
    assert relative(gradient(trainer), gradient(other)) < 1e-10


def test_tool_tokens_of_a_rollout_are_not_trained(client, rollouts):
    _, groups = rollouts
    a, b = groups[0][0], groups[0][1]

    def with_tool(c, result):
        tokens = (*c.tokens, *result, 50, 51)
        n = len(c.tokens)
        return Rollout(
            prompt_tokens=c.prompt_tokens,
            tokens=tokens,
            trained=[True] * n + [False] * len(result) + [True] * 2,
            logprobs=[*c.logprobs, *[0.0] * len(result), -2.0, -3.0],
            stop_reason="stop",
            weights_version=c.weights_version,
        )

    trainer, custom = client(dtype="float64"), client(dtype="float64")
    made = [with_tool(a, (7, 8, 9)), with_tool(b, (60,))]
    # importance sampling with the trainer's own log-probs is the plain policy gradient over trained tokens alone
    own = []
    for r in made:
        tokens = [*r.prompt_tokens, *r.tokens]
        (scored,) = custom.forward(
            [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})], "cross_entropy"
        ).logprobs
        start = len(r.prompt_tokens) - 1
        own.append(
            replace(r, logprobs=[float(v) if t else 0.0 for v, t in zip(scored[start:], r.trained, strict=True)])
        )
    trainer.forward_backward(own, [2.0, -1.0], loss_fn="importance_sampling")

    def loss(data, logprobs):
        total = 0.0
        for r, advantage, lp in zip(own, (2.0, -1.0), logprobs, strict=True):
            total = total - advantage * lp[len(r.prompt_tokens) - 1 :][torch.tensor(r.trained)].sum()
        return total, {}

    datums = []
    for r in own:
        tokens = [*r.prompt_tokens, *r.tokens]
        datums.append(Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]}))
    custom.forward_backward_custom(datums, loss)
    assert relative(gradient(trainer), gradient(custom)) < 1e-5


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, 2.0], "got 2 rewards for 2 groups of 3 completions: reward_fn was given a group"),
        ([1.0] * 5, "one reward for each of the 6"),
        ([[1.0, 0.0, float("nan")], [0.0] * 3], r"rewards\[0\]\[2\] is nan"),
        ([[1.0, 0.0, True], [0.0] * 3], r"rewards\[0\]\[2\] is True"),
        (None, "grpo needs rewards"),
    ],
)
def test_rewards_that_do_not_fit_are_named_and_nothing_changes(rollouts, rewards, message):
    trainer, groups = rollouts
    before = everything(trainer)
    with pytest.raises(UsageError, match=message):
        trainer.forward_backward(groups, rewards, loss_fn="grpo")
    assert same(before, everything(trainer))


def test_completions_that_cannot_be_trained_on_are_named(service, client, rollouts, tmp_path):
    from tests import tiny

    trainer, groups = rollouts
    with pytest.raises(UsageError, match="completion 1 is a plain str: its tokens and log-probs are gone"):
        trainer.forward_backward([[groups[0][0], groups[0][1].strip() + "x"]], [[1.0, 0.0]], loss_fn="grpo")
    with pytest.raises(UsageError, match="1 completion"):
        trainer.forward_backward([[groups[0][0]]], [[1.0]], loss_fn="grpo")
    with pytest.raises(UsageError, match="compares completions of one prompt"):
        trainer.forward_backward(groups[0], [1.0, 0.0, 0.0], loss_fn="grpo")
    twin = service.create_lora_training_client(
        str(tiny.save(tmp_path / "twin", seed=3)), rank=2, quantize=None, dtype="float32"
    )
    foreign = twin.save_weights_and_get_sampling_client().sample_batch([CHAT], n=2, max_tokens=3)
    with pytest.raises(UsageError, match="completion 0 was sampled from another base model"):
        trainer.forward_backward(foreign, [[1.0, 0.0]], loss_fn="grpo")


def test_grpo_learns_a_bandit(service, tiny_model):
    """One token a completion; the rewarded token goes from rare to almost certain."""
    trainer = service.create_lora_training_client(str(tiny_model), rank=8, quantize="4bit", dtype="float32", seed=5)
    sampler = trainer.save_weights_and_get_sampling_client()
    first = sampler.sample_batch([CHAT], n=64, max_tokens=1, temperature=1.0)[0]
    counts = {}
    for c in first:
        counts[c.tokens[0]] = counts.get(c.tokens[0], 0) + 1
    target = min((t for t, k in counts.items() if k >= 2), key=lambda t: counts[t])
    before = math.exp(next(c.logprobs[0] for c in first if c.tokens[0] == target))
    for _ in range(40):
        groups = trainer.save_weights_and_get_sampling_client().sample_batch([CHAT], n=32, max_tokens=1)
        trainer.forward_backward(groups, [[float(c.tokens[0] == target) for c in groups[0]]], loss_fn="grpo")
        trainer.optim_step(learning_rate=5e-3)
    final = trainer.save_weights_and_get_sampling_client().sample_batch([CHAT], n=50, max_tokens=1)[0]
    assert before < 0.3 and np.mean([c.tokens[0] == target for c in final]) > 0.9


# -- PPO ---------------------------------------------------------------------------------------------------------------


def flat(groups):
    return [c for g in groups for c in g]


def test_ppo_starts_with_values_of_zero_and_whitened_returns(client, rollouts):
    trainer, groups = rollouts
    completions = flat(groups)
    scores = [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    loss = trainer.forward_backward(
        completions, scores, loss_fn="ppo", gamma=1.0, gae_lambda=1.0, value_coefficient=0.5
    )
    # With values 0, gamma = lambda = 1 every token's advantage and return is its completion's reward.
    raw = np.concatenate([[s] * len(c.tokens) for s, c in zip(scores, completions, strict=True)])
    white = (raw - raw.mean()) / raw.std(ddof=1)
    # The ratio is 1: the surrogate's mean is minus the mean advantage (0), the value loss half the mean squared return.
    expected = -white.mean() + 0.5 * 0.5 * np.mean(raw**2)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert loss.metrics["reward_mean"] == pytest.approx(np.mean(scores)) and loss.metrics["value_mean"] == 0.0
    head = inner(trainer).value.window.gradient()
    assert float(head[-1]) == pytest.approx(-0.5 * raw.mean(), abs=1e-5)  # d/db of 0.5 * 0.5 * mean (V - R)^2


def test_forward_fixes_a_rollout_and_minibatches_add_up_to_it(client, rollouts):
    whole, groups = rollouts
    completions, scores = flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    parts = client(dtype="float64")
    whole.forward(completions, scores, loss_fn="ppo")
    whole.forward_backward(completions, scores, loss_fn="ppo")
    parts.forward(completions, scores, loss_fn="ppo")
    parts.forward_backward(completions[:2], scores[:2], loss_fn="ppo")
    parts.forward_backward(completions[2:], loss_fn="ppo")
    assert relative(gradient(parts), gradient(whole)) < 1e-10
    assert relative(inner(parts).value.window.gradient(), inner(whole).value.window.gradient()) < 1e-10


def test_a_rollout_that_was_cut_bootstraps_and_one_that_stopped_is_terminal(client, rollouts):
    trainer, groups = rollouts
    source = next(c for c in flat(groups) if len(c.tokens) > 1)
    completions = [
        Completion(
            str(source),
            tokens=source.tokens,
            logprobs=source.logprobs,
            prompt_tokens=source.prompt_tokens,
            stop_reason=r,
            weights_version=source.weights_version,
        )
        for r in ("stop", "length")
    ]
    trainer.forward_backward(completions, [1.0, 0.0], loss_fn="ppo")
    state = inner(trainer)
    state.discard_gradients()
    with torch.no_grad():
        state.value.weights[-1] = 3.0  # every state is worth 3
    trainer.forward(completions, [1.0, 1.0], loss_fn="ppo", gamma=1.0, gae_lambda=1.0)
    stopped, cut = (trainer._memory.fixed[c.id] for c in completions)
    assert stopped.fields["returns"][stopped.mask] == pytest.approx(1.0)
    assert cut.fields["returns"][cut.mask] == pytest.approx(4.0)


def test_ppo_values_converge_to_a_constant_reward(service, tiny_model):
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32", seed=5)
    completions = trainer.save_weights_and_get_sampling_client().sample_batch([CHAT, "the"], n=4, max_tokens=6, stop=[])
    done = [
        Completion(
            str(c),
            tokens=c.tokens,
            logprobs=c.logprobs,
            prompt_tokens=c.prompt_tokens,
            stop_reason="stop",
            weights_version=c.weights_version,
        )
        for c in flat(completions)
    ]
    for _ in range(150):
        trainer.forward_backward(done, [0.7] * len(done), loss_fn="ppo", value_clip=None)
        trainer.optim_step(learning_rate=1e-5)
    result = trainer.forward(done, [0.7] * len(done), loss_fn="ppo")
    assert result.metrics["value_mean"] == pytest.approx(0.7, abs=0.05)


def test_the_value_head_is_saved_and_strictly_loaded(service, client, rollouts, tmp_path):
    from local_tinker.checkpoint import read_folder, write_folder
    from local_tinker.errors import CheckpointError

    trainer, groups = rollouts
    for _ in range(3):
        trainer.forward_backward(flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0], loss_fn="ppo")
        trainer.optim_step(learning_rate=1e-3)
    path = trainer.save_state(tmp_path / "s")
    other = client(dtype="float64")
    other.load_state(path)
    assert torch.equal(inner(other).value.weights, inner(trainer).value.weights)
    assert torch.equal(inner(other).value.optimiser.m, inner(trainer).value.optimiser.m)
    saved = read_folder(path)
    files = {n: saved.bytes(n) for n in saved.manifest if n != "value_head.safetensors"}
    write_folder(tmp_path / "headless", files, meta=saved.meta)
    before = everything(other)
    with pytest.raises(CheckpointError, match="no value_head.safetensors"):
        other.load_state(tmp_path / "headless")
    assert same(before, everything(other))


def test_ppo_without_rewards_for_an_unfixed_completion_is_an_error(rollouts):
    trainer, groups = rollouts
    with pytest.raises(UsageError, match="completion 0 has no rewards"):
        trainer.forward_backward(flat(groups), loss_fn="ppo")


# -- Tinker's own on Datums --------------------------------------------------------------------------------------------


def datums_of(completions, advantage=1.0, shift=0.0):
    found = []
    for c in completions:
        tokens = [*c.prompt_tokens, *c.tokens]
        before = [0.0] * (len(c.prompt_tokens) - 1)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": np.array(before + [v + shift for v in c.logprobs]),
            "advantages": np.array(before + [advantage] * len(c.tokens)),
            "weights": np.array(before + [1.0] * len(c.tokens)),
        }
        found.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return found


def test_tinkers_policy_losses_are_sums_with_its_default_thresholds(rollouts):
    trainer, groups = rollouts
    completions = flat(groups)
    n = sum(len(c.tokens) for c in completions)
    # log-probs shifted by -ln 1.5: every ratio is 1.5
    data = datums_of(completions, shift=-math.log(1.5))
    close = dict(rel=1e-4)
    assert float(trainer.forward(data, "importance_sampling")) == pytest.approx(-1.5 * n, **close)
    assert float(trainer.forward(data, "ppo")) == pytest.approx(-1.2 * n, **close)
    total = sum(sum(c.logprobs) for c in completions)
    assert float(trainer.forward(data, "cispo")) == pytest.approx(-1.5 * total, **close)
    dro = -(total - 0.5 * 0.1 * n * math.log(1.5) ** 2)
    assert float(trainer.forward(data, "dro", beta=0.1)) == pytest.approx(dro, **close)
    with pytest.raises(UsageError, match="'dro' needs beta="):
        trainer.forward(data, "dro")


def test_several_targets_a_position(rollouts):
    trainer, _ = rollouts
    targets = np.array([[5, 6], [7, 8], [9, 10]])
    weights = np.array([[1.0, 0.5], [0.0, 2.0], [0.25, 0.0]])
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": targets, "weights": weights})
    result = trainer.forward_backward([datum], "cross_entropy")
    columns = []
    for k in range(2):
        (lp,) = trainer.forward(
            [Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": targets[:, k]})], "cross_entropy"
        ).logprobs
        columns.append(lp)
    expected = np.stack(columns, axis=1)
    assert np.allclose(result.logprobs[0], expected, atol=1e-10)
    assert float(result) == pytest.approx(-(weights * expected).sum(), abs=1e-9)


def test_a_field_that_only_some_datums_have_is_named(rollouts):
    trainer, groups = rollouts
    data = datums_of(flat(groups)[:2])
    lacking = Datum(data[1].model_input, {"target_tokens": data[1].loss_fn_inputs["target_tokens"]})
    with pytest.raises(UsageError, match="datum 1 has no 'logprobs', which 'ppo' needs"):
        trainer.forward([data[0], lacking], "ppo")


# -- what must not be silent -------------------------------------------------------------------------------------------


def test_rewards_with_a_loss_that_reads_none_are_refused(rollouts):
    trainer, groups = rollouts
    for loss in (None, "sft", "cross_entropy"):
        with pytest.raises(UsageError, match="reads no rewards"):
            trainer.forward_backward(groups, REWARDS, loss_fn=loss)


def test_two_aggregations_in_one_window_are_separately_normalised(client, rollouts):
    both, groups = rollouts
    a, b = client(dtype="float64"), client(dtype="float64")
    both.forward_backward(groups, REWARDS, loss_fn="grpo", aggregation="token")
    both.forward_backward(groups, REWARDS, loss_fn="grpo", aggregation="sequence")
    a.forward_backward(groups, REWARDS, loss_fn="grpo", aggregation="token")
    b.forward_backward(groups, REWARDS, loss_fn="grpo", aggregation="sequence")
    assert relative(gradient(both), gradient(a) + gradient(b)) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (5, 10**6)}, "holds token id 1000000"),
        ({"prompt_tokens": (5,) * 300}, "302 tokens with its prompt, over max_length=256"),
    ],
)
def test_rollouts_the_model_cannot_read_are_named(rollouts, changes, message):
    trainer, _ = rollouts
    fields = dict(
        prompt_tokens=(5, 6),
        tokens=(7, 8),
        trained=(True, True),
        logprobs=(-1.0, -2.0),
        stop_reason="stop",
        weights_version="mine",
    )
    with pytest.raises(UsageError, match=message):
        trainer.forward_backward([Rollout(**{**fields, **changes})], [1.0], loss_fn="importance_sampling")
    with pytest.raises(UsageError, match=r"logprobs\[1\] of a rollout is nan"):
        Rollout(**{**fields, "logprobs": (-1.0, float("nan"))})


def test_a_fixed_rollout_refuses_other_rewards_options_and_company(rollouts):
    trainer, groups = rollouts
    completions, scores = flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    trainer.forward(completions[:4], scores[:4], loss_fn="ppo")
    with pytest.raises(UsageError, match="completion 1 was fixed with other rewards"):
        trainer.forward_backward(completions[:2], [1.0, 9.0], loss_fn="ppo")
    with pytest.raises(UsageError, match="fixed with gamma=1.0 and gamma=0.5"):
        trainer.forward_backward(completions[:2], loss_fn="ppo", gamma=0.5)
    with pytest.raises(UsageError, match="completion 0 was fixed by an earlier forward and completion 1 was not"):
        trainer.forward_backward([completions[0], completions[5]], [1.0, 2.0], loss_fn="ppo")
    trainer.forward(completions[4:], scores[4:], loss_fn="ppo")  # a second rollout; the first stays fixed
    trainer.forward_backward(completions[:4], loss_fn="ppo")


def test_a_forward_that_fails_leaves_what_was_fixed(rollouts, monkeypatch):
    trainer, groups = rollouts
    completions, scores = flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    trainer.forward(completions, scores, loss_fn="ppo")
    before = dict(trainer._memory.fixed)
    monkeypatch.setattr(
        trainer._engine, "forward", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.forward(completions, [9.0] * 6, loss_fn="ppo")
    assert dict(trainer._memory.fixed) == before


def test_a_failed_first_ppo_call_leaves_no_value_head(rollouts, monkeypatch):
    from local_tinker.engine import trainer as module

    trainer, groups = rollouts
    monkeypatch.setattr(module, "loss_terms", lambda *a: (_ for _ in ()).throw(ValueError("bad")))
    with pytest.raises(ValueError):
        trainer.forward_backward(flat(groups), [1.0] * 6, loss_fn="ppo")
    assert inner(trainer).value is None


def test_cached_reference_log_probs_are_those_of_the_reference(client, monkeypatch):
    plain, cached = client(), client()
    expected = plain.forward_backward(TEXT_PAIRS, loss_fn="dpo")
    calls = []
    real = cached._engine.score
    monkeypatch.setattr(cached._engine, "score", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    found = cached.forward_backward(TEXT_PAIRS, loss_fn="dpo", cache_reference=True)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)
    assert relative(gradient(cached), gradient(plain)) < 1e-5
    cached.forward_backward(TEXT_PAIRS[::-1], loss_fn="dpo", cache_reference=True)
    assert calls == [6]


def test_preference_datums_must_share_their_prompt(client):
    trainer = client()

    def datum(tokens, start):
        return Datum(
            ModelInput.from_ints(tokens[:-1]),
            {"target_tokens": tokens[1:], "weights": [float(i >= start) for i in range(len(tokens) - 1)]},
        )

    trainer.forward([datum([5, 6, 7, 8], 1), datum([5, 6, 9], 1)], loss_fn="dpo")
    from local_tinker.errors import DatasetError

    with pytest.raises(DatasetError, match="continue different prompts"):
        trainer.forward([datum([5, 6, 7, 8], 1), datum([5, 7, 9], 1)], loss_fn="dpo")
    with pytest.raises(DatasetError, match="are the same"):
        trainer.forward([datum([5, 6, 7], 1), datum([5, 6, 7], 1)], loss_fn="dpo")


# -- every objective: cuts, failures, derivatives ----------------------------------------------------------------------


def calls_of(groups):
    """name -> (batch, rewards, loss_fn, options), one for each loss."""
    completions, scores = flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    data = datums_of(completions, advantage=0.7, shift=0.1)
    return {
        "sft": (
            [{"prompt": "one", "completion": " two three"}, {"prompt": "the quick", "completion": " fox"}],
            None,
            "sft",
            {},
        ),
        "dpo": (TEXT_PAIRS, None, "dpo", {"beta": 0.5}),
        "grpo": (groups, REWARDS, "grpo", {"beta": 0.05}),
        "ppo": (completions, scores, "ppo", {}),
        "importance_sampling": (data, None, "importance_sampling", {}),
        "tinker_ppo": (data, None, "ppo", {}),
        "cispo": (data, None, "cispo", {}),
        "dro": (data, None, "dro", {"beta": 0.1}),
        "cross_entropy": (data, None, "cross_entropy", {}),
    }


LOSS_NAMES = ("sft", "dpo", "grpo", "ppo", "importance_sampling", "tinker_ppo", "cispo", "dro", "cross_entropy")


def call(trainer, made):
    batch, rewards, loss_fn, options = made
    return trainer.forward_backward(batch, rewards, loss_fn, **options)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_cut_into_micro_batches_changes_nothing_for_any_loss(client, rollouts, name):
    _, groups = rollouts
    whole, cut = client(dtype="float64"), client(dtype="float64", micro_batch_tokens=1)
    a, b = call(whole, calls_of(groups)[name]), call(cut, calls_of(groups)[name])
    assert float(b) == pytest.approx(float(a), rel=1e-10)
    assert relative(gradient(cut), gradient(whole)) < 1e-10
    assert b.metrics == pytest.approx(a.metrics, rel=1e-6, abs=1e-6)
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert np.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_failure_in_the_second_micro_batch_of_any_loss_changes_nothing(client, rollouts, monkeypatch, name):
    from local_tinker.engine import trainer as module

    _, groups = rollouts
    trainer = client(dtype="float64", micro_batch_tokens=1)
    call(trainer, calls_of(groups)["sft"])
    before, memory = everything(trainer), (dict(trainer._memory.old_logprobs), dict(trainer._memory.fixed))
    real, count = module.loss_terms, iter(range(1000))

    def fails(*args):
        if next(count) == 1:
            raise ValueError("bad")
        return real(*args)

    monkeypatch.setattr(module, "loss_terms", fails)
    with pytest.raises(ValueError):
        call(trainer, calls_of(groups)[name])
    assert same(before, everything(trainer))
    assert memory == (dict(trainer._memory.old_logprobs), dict(trainer._memory.fixed))
    assert inner(trainer).value is None
    window = inner(trainer).window
    assert not any(buffer.any() for name, buffer in window.buffers.items() if name not in window.weights)


def test_the_whole_ppo_step_has_the_derivative_of_its_loss(client, rollouts):
    """Policy, value and clips together, against finite differences in the adapter and in the value head."""
    _, groups = rollouts
    trainer = client(dtype="float64")
    completions, scores = flat(groups), [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]
    trainer.forward(completions, scores, loss_fn="ppo", gamma=0.9, gae_lambda=0.8)
    state = inner(trainer)
    trainer.forward_backward(completions, loss_fn="ppo")
    state.discard_gradients()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from ratio 1 and value 0, where clips and kinks are
        state.adapter.master.add_(torch.randn(state.adapter.master.shape, generator=generator).double() * 0.02)
        state.value.weights.copy_(torch.randn(state.value.weights.shape, generator=generator).double() * 0.01)
    trainer.forward_backward(completions, loss_fn="ppo")
    analytic = [gradient(trainer), state.value.window.gradient().clone()]
    flats = [state.adapter.master, state.value.weights]
    for grad, values in zip(analytic, flats, strict=True):
        for at in (3, values.numel() // 2, values.numel() - 1):
            found = []
            for shift in (1e-6, -2e-6):
                with torch.no_grad():
                    values[at] += shift
                found.append(value_of(trainer, completions))
            with torch.no_grad():
                values[at] += 1e-6
            assert float(grad[at]) == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-4, abs=1e-7)


def value_of(trainer, completions):
    """The loss of the fixed rollout, by a forward_backward whose gradient is thrown away."""
    result = float(trainer.forward_backward(completions, loss_fn="ppo"))
    inner(trainer).discard_gradients()
    return result


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_rollouts_with_tool_tokens_train_only_what_the_policy_sampled(client, rollouts, loss):
    _, groups = rollouts

    def rollout_of(c, tool):
        tokens = (*c.tokens[:2], *tool, *c.tokens[2:4])
        trained = [True, True, *[False] * len(tool), *[True] * len(c.tokens[2:4])]
        return Rollout(
            prompt_tokens=c.prompt_tokens,
            tokens=tokens,
            trained=trained,
            logprobs=[-1.5 if t else 0.0 for t in trained],
            stop_reason="stop",
            weights_version=c.weights_version,
        )

    made = [rollout_of(c, tool) for c, tool in zip(groups[0], [(7, 8, 9), (60,), ()], strict=True)]
    trainer = client(dtype="float64")
    batch, rewards = ([made], [[1.0, 0.0, 0.5]]) if loss == "grpo" else (made, [1.0, 0.0, 0.5])
    result = trainer.forward_backward(batch, rewards, loss_fn=loss)
    for r, logprobs in zip(made, result.logprobs, strict=True):
        answer = logprobs[len(r.prompt_tokens) - 1 :]
        assert [value != 0.0 for value in answer] == list(r.trained)
    if loss == "ppo":
        trainer.forward(made, rewards, loss_fn="ppo", gae_lambda=1.0)
        for r, reward in zip(made, rewards, strict=True):
            fixed = trainer._memory.fixed[r.id]
            assert fixed.mask[len(r.prompt_tokens) - 1 :].tolist() == list(r.trained)
            assert fixed.fields["returns"][fixed.mask] == pytest.approx(reward, abs=1e-9)
            assert not fixed.fields["advantages"][~fixed.mask].any()

"""Our losses against the code TRL 1.16 trains with, given the same per-token log-probs.

Rows: 4 completions of up to 6 tokens, padded on the right for TRL, packed for us.
"""

from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from local_tinker.advantages import group_advantages
from local_tinker.losses import LOSSES, LossData, LossInputs, check_options, finish_metrics

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"written against TRL 1.16, found {trl.__version__}", allow_module_level=True)

LENGTHS = (6, 3, 1, 4)
WIDTH = 6
# A tool's answer inside the first completion is not trained.
MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
REAL = torch.tensor([[i < n for i in range(WIDTH)] for n in LENGTHS])
SEGMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))


def rows(seed, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    sampler = -3 * torch.rand(4, WIDTH, generator=generator, dtype=torch.float64)

    def near():
        return sampler + spread * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)

    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    return {"sampler": sampler, "old": near(), "pi": near(), "ref": near(), "advantages": advantages}


class Accelerator:
    num_processes = 1
    sync_gradients = True
    device = torch.device("cpu")

    def reduce(self, value, reduction="sum"):
        return value

    def gather(self, value):
        return value

    gather_for_metrics = gather

    def unwrap_model(self, model):
        return model


def trl_grpo(made, logprobs, *, loss_type, beta, low, high, corrected, old, cap):
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1),
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(4, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(4, WIDTH, dtype=torch.int64),
        "completion_mask": REAL.long(),
        "tool_mask": MASK,
        "advantages": made["advantages"],
        "old_per_token_logps": made[old],
        "ref_per_token_logps": made["ref"],
        "num_items_in_batch": MASK.sum(),
    }
    if cap is not None:
        inputs["importance_sampling_ratio"] = (made["old"] - made["sampler"]).exp().clamp(max=cap)
    loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, trainer._metrics["train"]


def packed(made):
    weights = MASK[REAL].double()
    token = {"weights": weights, "logprobs": made["sampler"][REAL], "old_logprobs": made["old"][REAL]}
    return LossData({**token, "advantages": made["advantages"][SEGMENTS]}, SEGMENTS, 4)


def ours(name, made, logprobs, **options):
    options, _ = check_options(LOSSES[name], options)
    zeros = torch.zeros_like(logprobs[REAL])
    out = LossInputs(logprobs[REAL], entropy=zeros.detach(), reference_logprobs=made["ref"][REAL])
    terms = LOSSES[name].fn(out, packed(made), **options)
    return terms


def same(loss_a, loss_b, logprobs):
    torch.testing.assert_close(loss_a, loss_b, rtol=0, atol=1e-10)
    (a,) = torch.autograd.grad(loss_a, logprobs)
    (b,) = torch.autograd.grad(loss_b, logprobs)
    assert float(a.abs().max()) > 0
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.28)])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("grpo", {"aggregation": "sequence"}),
        ("bnpo", {"aggregation": "token"}),
        ("dapo", {"aggregation": "token"}),
        ("dr_grpo", {"aggregation": "constant", "max_tokens": 16}),
    ],
)
def test_grpo_and_its_aggregations(loss_type, options, low, high, beta, seed):
    made = rows(seed)
    logprobs = made["pi"].requires_grad_()
    theirs, metrics = trl_grpo(
        made, logprobs, loss_type=loss_type, beta=beta, low=low, high=high, corrected=True, old="sampler", cap=None
    )
    terms = ours("grpo", made, logprobs, clip_low=low, clip_high=high, beta=beta, **options)
    same(terms.total / terms.weight, theirs, logprobs)
    shown = finish_metrics(terms.metrics)
    assert shown["clip_fraction_low"] == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert shown["clip_fraction_high"] == pytest.approx(metrics["clip_ratio/high_mean"][0])
    if beta:
        assert shown["kl"] == pytest.approx(metrics["kl"][0])


def test_uncorrected_k3_of_trl_is_not_what_we_do():
    made = rows(0)
    logprobs = made["pi"].requires_grad_()
    words = {"loss_type": "dapo", "low": 0.2, "high": 0.2, "corrected": False, "old": "sampler", "cap": None}
    theirs, _ = trl_grpo(made, logprobs, beta=1.0, **words)
    terms = ours("grpo", made, logprobs, beta=1.0)
    assert abs(float((theirs - terms.total / terms.weight).detach())) > 1e-3


@pytest.mark.parametrize("cap", [1.05, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_trainers_old_logprobs_with_truncated_importance_weights(cap, beta):
    made = rows(4)
    logprobs = made["pi"].requires_grad_()
    words = {"loss_type": "dapo", "low": 0.2, "high": 0.2, "corrected": True}
    theirs, _ = trl_grpo(made, logprobs, beta=beta, old="old", cap=cap, **words)
    terms = ours("grpo", made, logprobs, beta=beta, old_logprobs="trainer", max_importance_ratio=cap)
    same(terms.total / terms.weight, theirs, logprobs)


@pytest.mark.parametrize("high", [1.2, 4.0])
def test_cispo(high):
    made = rows(5)
    logprobs = made["pi"].requires_grad_()
    words = {"loss_type": "cispo", "beta": 0.0, "low": 0.2, "corrected": True, "old": "sampler", "cap": None}
    theirs, _ = trl_grpo(made, logprobs, high=high, **words)
    terms = ours("cispo", made, logprobs, clip_high_threshold=high)
    same(terms.total / MASK.sum(), theirs, logprobs)


@contextmanager
def nothing(*args, **kwargs):
    yield


def trl_dpo(made, logprobs, monkeypatch, *, loss_type, beta):
    """Rows 0, 1 are chosen, 2, 3 rejected; a prompt token stands before each completion."""
    import trl.trainer.dpo_trainer as module

    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        ref_model=None,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(logprobs)

    def answer(values):
        return SimpleNamespace(
            log_probs=values * REAL,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros,
        )

    def reference(**kwargs):
        return answer(made["ref"])

    reference.training = True
    reference.peft_config = {}
    trainer.model = reference
    monkeypatch.setattr(module, "is_peft_model", lambda model: True)
    monkeypatch.setattr(module, "use_adapter", nothing)
    monkeypatch.setattr(module, "disable_gradient_checkpointing", nothing)
    mask = torch.cat([torch.zeros(4, 1, dtype=torch.int64), REAL.long()], dim=1)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **kwargs: answer(logprobs), inputs, False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("variant", ["sigmoid", "ipo"])
def test_dpo(variant, beta, seed, monkeypatch):
    made = rows(seed)
    logprobs = made["pi"].requires_grad_()
    theirs, metrics = trl_dpo(made, logprobs, monkeypatch, loss_type=variant, beta=beta)
    options, _ = check_options(LOSSES["dpo"], {"beta": beta, "variant": variant})
    data = LossData({"weights": torch.ones(14).double()}, SEGMENTS, 4, torch.tensor([[0, 2], [1, 3]]))
    out = LossInputs(logprobs[REAL], reference_logprobs=made["ref"][REAL])
    terms = LOSSES["dpo"].fn(out, data, **options)
    same(terms.total / terms.weight, theirs, logprobs)
    shown = finish_metrics(terms.metrics)
    assert shown["reward_margin"] == pytest.approx(metrics["rewards/margins"][0])
    assert shown["accuracy"] == pytest.approx(metrics["rewards/accuracies"][0])
    assert shown["chosen_reward"] == pytest.approx(metrics["rewards/chosen"][0])
    assert shown["rejected_reward"] == pytest.approx(metrics["rewards/rejected"][0])
    assert shown["chosen_logprobs"] == pytest.approx(metrics["logps/chosen"][0])
    assert shown["rejected_logprobs"] == pytest.approx(metrics["logps/rejected"][0])


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_group_advantages(scale):
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.25], [2.0, 2.0, 2.0, 3.0], [1.0, float("nan"), 0.0, 0.0]]).double()
    theirs = rewards - rewards.nanmean(1, keepdim=True)
    std = {"group": nanstd(rewards, dim=1)[:, None], "batch": nanstd(rewards.flatten()), "none": None}[scale]
    theirs = theirs if std is None else theirs / (std + 1e-4)
    lists = [[None if r != r else r for r in row] for row in rewards.tolist()]
    got = torch.tensor([v.tolist() for v in group_advantages(lists, scale=scale).values], dtype=torch.float64)
    # TRL takes its Bessel correction n / (n - 1) in float32.
    torch.testing.assert_close(got, theirs.nan_to_num(0.0), rtol=1e-7, atol=1e-7)

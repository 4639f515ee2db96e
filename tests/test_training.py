"""The training client on a tiny model: exact accumulation, any cut, atomic failure, all batch forms."""

import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from local_tinker import AdamParams, Datum, ModelInput
from local_tinker.errors import DatasetError, StateError, UsageError
from local_tinker.model.road import FastRoad

ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in [
        ("one", "two three"),
        ("What is one plus two?", "Three."),
        ("the fox", "jumps over the lazy dog and over the quick brown fox"),
        ("4", "5"),
        ("dog?", "The quick brown fox jumps."),
        ("long " * 10, "user assistant system"),
        ("0", "0123456789 0123456789"),
    ]
]


@pytest.fixture
def client(service, tiny_model):
    def make(**options):
        defaults = dict(rank=4, alpha=8, quantize=None, dtype="float32", seed=1)
        trainer = service.create_lora_training_client(str(tiny_model), **{**defaults, **options})
        warm(trainer)
        return trainer

    return make


def inner(trainer):
    return trainer._engine._trainer(trainer._id)


def warm(trainer):
    """B away from zero, so that every gradient is alive."""
    state = inner(trainer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        state.adapter.master.add_(
            torch.randn(state.adapter.master.shape, generator=generator).to(state.adapter.master) * 0.05
        )
        state.adapter.refresh()


def gradient(trainer):
    return inner(trainer).window.gradient().clone()


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def reference_loss_and_gradient(tiny_model, trainer, rows):
    """Plain transformers and torch: the mean negative log-likelihood of the trained tokens, one row at a time."""
    from transformers import AutoModelForCausalLM

    state = inner(trainer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    flat = state.adapter.master.double().requires_grad_(True)
    for path, (a, b) in state.adapter.views(flat).items():
        module = model.get_submodule(path)
        module.forward = lambda x, m=module, a=a, b=b: (
            torch.nn.functional.linear(x, m.weight, m.bias) + 2.0 * (x @ a.t()) @ b.t()
        )
    for name, module in model.named_modules():  # transformers' norms go through float32 even in a float64 model
        if name.endswith("norm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
            )
    total, count = 0.0, 0
    for row in rows:
        encoded = trainer.renderer.conversation(row["messages"])
        ids = torch.tensor([encoded.tokens])
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        trained = torch.tensor(encoded.trained[1:])
        total, count = total - picked[trained].sum(), count + int(trained.sum())
    loss = total / count
    return float(loss.detach()), torch.autograd.grad(loss, flat)[0]


def test_loss_and_gradient_equal_plain_transformers(client, tiny_model):
    trainer = client(dtype="float64")
    expected, want = reference_loss_and_gradient(tiny_model, trainer, ROWS)
    loss = trainer.forward_backward(ROWS)
    assert float(loss) == pytest.approx(expected, abs=1e-10)
    assert relative(gradient(trainer), want) < 1e-10


@pytest.mark.parametrize("cut", [[7], [1] * 7, [3, 4], [2, 2, 3], [6, 1]])
def test_any_partition_into_calls_gives_the_gradient_of_one_call(client, cut):
    whole = client(dtype="float64")
    whole.forward_backward(ROWS)
    parts = client(dtype="float64")
    at = 0
    for size in cut:
        parts.forward_backward(ROWS[at : at + size])
        at += size
    assert relative(gradient(parts), gradient(whole)) < 1e-12


@pytest.mark.parametrize("budget", [1, 40, 64, 100])
def test_any_cut_into_micro_batches_changes_nothing_but_rounding(client, budget):
    whole, cut = client(), client(micro_batch_tokens=budget)
    a, b = whole.forward_backward(ROWS), cut.forward_backward(ROWS)
    assert float(b) == pytest.approx(float(a), rel=1e-6)
    assert relative(gradient(cut), gradient(whole)) < 1e-6
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert np.allclose(x, y, atol=1e-5)
    assert b.metrics.keys() == a.metrics.keys()


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_nothing_of_a_micro_batch_is_alive_beside_the_next_one(client, monkeypatch, loss):
    trainer, made, beside = client(micro_batch_tokens=64), [], []
    real = FastRoad.embed

    def embed(self, tokens):
        beside.append(sum(ref() is not None for ref in made))
        h = real(self, tokens)
        made.append(weakref.ref(h))
        return h

    monkeypatch.setattr(FastRoad, "embed", embed)
    pairs = [{"prompt": f"the fox {i}", "chosen": " jumps over", "rejected": " 0123"} for i in range(9)]
    trainer.forward_backward(pairs if loss == "dpo" else ROWS, loss_fn=loss)
    assert len(beside) > 2 and not any(beside)


def test_recomputed_layers_give_the_same_gradient(client):
    plain, deep = client(), client()
    budget = inner(deep).budget
    inner(deep).budget = replace(budget, choice=replace(budget.choice, levels=("layer",) * 2))
    plain.forward_backward(ROWS)
    deep.forward_backward(ROWS)
    assert relative(gradient(deep), gradient(plain)) < 1e-6


def test_logprobs_belong_to_their_datum_whatever_the_lengths(client):
    trainer = client()
    together = trainer.forward(ROWS).logprobs
    for row, found in zip(ROWS, together, strict=True):
        (alone,) = trainer.forward([row]).logprobs
        assert found.shape == alone.shape and np.allclose(found, alone, atol=1e-5)


def test_printed_loss_is_minus_the_mean_of_the_returned_logprobs(client):
    trainer = client()
    loss = trainer.forward_backward(ROWS)
    flat = np.concatenate(loss.logprobs)
    assert float(loss) == pytest.approx(-flat.sum() / np.count_nonzero(flat), rel=1e-5)
    assert float(trainer.forward(ROWS)) == pytest.approx(float(loss), rel=1e-6)


def test_forward_adds_no_gradient(client):
    trainer = client()
    trainer.forward(ROWS)
    with pytest.raises(StateError, match="nothing accumulated: call forward_backward first"):
        trainer.optim_step()


def as_columns(rows):
    return {"messages": [row["messages"] for row in rows]}


def as_tensors(trainer, rows):
    encoded = [trainer.renderer.conversation(row["messages"]) for row in rows]
    width = max(len(e.tokens) for e in encoded)
    pad = trainer.tokenizer.pad_token_id
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, e in enumerate(encoded):
        n = len(e.tokens)
        ids[i, :n], mask[i, :n] = torch.tensor(e.tokens), 1
        labels[i, :n] = torch.where(torch.tensor(e.trained), ids[i, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_datums(trainer, rows):
    datums = []
    for row in rows:
        e = trainer.renderer.conversation(row["messages"])
        inputs = {"target_tokens": e.tokens[1:], "weights": [float(t) for t in e.trained[1:]]}
        datums.append(Datum(ModelInput.from_ints(e.tokens[:-1]), inputs))
    return datums


def test_the_same_rows_give_the_same_loss_and_gradient_by_every_road(client):
    trainer = client()
    expected = trainer.forward_backward(ROWS)
    want = gradient(trainer)
    forms = [as_columns(ROWS), as_tensors(trainer, ROWS), as_datums(trainer, ROWS)]
    for form in forms:
        other = client()
        assert float(other.forward_backward(form)) == pytest.approx(float(expected), rel=1e-6)
        assert relative(gradient(other), want) < 1e-6


def test_cross_entropy_is_a_sum_with_divisor_one(client):
    trainer = client()
    mean = trainer.forward(ROWS)
    total = trainer.forward_backward(as_datums(trainer, ROWS), "cross_entropy")
    tokens = sum(int(d.loss_fn_inputs["weights"].sum()) for d in as_datums(trainer, ROWS))
    assert float(total) == pytest.approx(float(mean) * tokens, rel=1e-5)
    assert total.metrics["loss:sum"] == pytest.approx(float(total))
    other = client()
    other.forward_backward(ROWS)
    assert relative(gradient(trainer), gradient(other) * tokens) < 1e-5


def test_two_losses_in_one_window_are_separately_normalised_terms(client):
    both, sft, sums = client(), client(), client()
    both.forward_backward(ROWS[:3])
    both.forward_backward(as_datums(both, ROWS[3:]), loss_fn="cross_entropy")
    sft.forward_backward(ROWS[:3])
    sums.forward_backward(as_datums(sums, ROWS[3:]), loss_fn="cross_entropy")
    assert relative(gradient(both), gradient(sft) + gradient(sums)) < 1e-6


def test_a_custom_loss_equals_the_built_in_one(client):
    trainer, custom = client(), client()
    trainer.forward_backward(ROWS)

    def mean_nll(data, logprobs):
        weights = [torch.from_numpy(d.loss_fn_inputs["weights"]) for d in data]
        loss = -sum((w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)) / sum(w.sum() for w in weights)
        return loss, {"tokens": float(sum(w.sum() for w in weights))}

    result = custom.forward_backward_custom(ROWS, mean_nll)
    assert float(result) == pytest.approx(float(trainer.forward(ROWS)), rel=1e-5)
    assert result.metrics["tokens"] > 0
    assert relative(gradient(custom), gradient(trainer)) < 1e-5


def test_optim_step_equals_torch_adamw_over_a_changing_learning_rate(client):
    trainer = client()
    state = inner(trainer)
    theirs = torch.nn.Parameter(state.adapter.master.clone())
    optimiser = torch.optim.AdamW([theirs], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(6):
        trainer.forward_backward(ROWS[i % 3 :])
        theirs.grad = gradient(trainer)
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimiser.param_groups[0]["lr"] = 1e-3 * (i + 1)
        optimiser.step()
        result = trainer.optim_step(AdamParams(learning_rate=1e-3 * (i + 1)))
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert (result.step, result.skipped, trainer.step) == (i + 1, False, i + 1)
        assert float((state.adapter.master - theirs.detach()).abs().max()) < 2e-7


def test_optim_step_takes_params_keywords_or_both(client):
    a, b = client(), client()
    a.forward_backward(ROWS)
    a.optim_step(AdamParams(learning_rate=5e-3, weight_decay=0.1))
    b.forward_backward(ROWS)
    b.optim_step(AdamParams(learning_rate=1.0, weight_decay=0.1), learning_rate=5e-3)
    assert torch.equal(inner(a).adapter.master, inner(b).adapter.master)
    a.forward_backward(ROWS)
    before = inner(a).adapter.master.clone()
    for wrong in ({"lr": 1.0}, 1e-4, {"learning_rate": -1.0}):
        with pytest.raises(UsageError):
            a.optim_step(wrong)
    assert torch.equal(inner(a).adapter.master, before)
    a.optim_step({"learning_rate": 0.0})
    assert torch.equal(inner(a).adapter.master, before)


def everything(trainer):
    state = inner(trainer)
    tensors = [state.adapter.master, state.adapter.compute, state.optimiser.m, state.optimiser.v, state.optimiser.count]
    tensors += [state.window.gradient()] if not state.window.empty else []
    return [t.clone() for t in tensors], state.calls, state.window.calls, torch.random.get_rng_state()


def same(before, after):
    return (
        all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(before[0], after[0], strict=True))  # moments may be parked
        and before[1:3] == after[1:3]
        and torch.equal(before[3], after[3])
    )


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("no kernel"), KeyboardInterrupt(), ValueError("bad")])
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_call_that_fails_midway_changes_nothing(client, monkeypatch, pending, error, micro_batch):
    from local_tinker.engine import trainer as module

    trainer = client(micro_batch_tokens=64)
    trainer.forward_backward(ROWS)
    trainer.optim_step()
    if pending:
        trainer.forward_backward(ROWS[:2])
    before = everything(trainer)
    count, real = iter(range(100)), module.loss_terms

    def fails(*args):
        terms = real(*args)
        if next(count) == micro_batch:
            raise error
        return terms

    monkeypatch.setattr(module, "loss_terms", fails)
    with pytest.raises(type(error)):
        trainer.forward_backward(ROWS)
    assert same(before, everything(trainer))
    monkeypatch.setattr(module, "loss_terms", real)
    clean = client(micro_batch_tokens=64)
    clean.forward_backward(ROWS)
    clean.optim_step()
    if pending:
        clean.forward_backward(ROWS[:2])
    clean.forward_backward(ROWS)
    trainer.forward_backward(ROWS)
    assert torch.equal(gradient(trainer), gradient(clean))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "empty|no rows|nothing"),
        ([{"messages": []}], "messages"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "0 trained tokens|no assistant"),
        ([ROWS[0], {"messages": [{"role": "user", "content": 3}]}], "content"),
        ("just a string", "string"),
        ([Datum(ModelInput.from_ints([1, 2, 10_000]), {"target_tokens": [2, 3, 4]})], "10000|10,000"),
        ([Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [0.0, 0.0]})], "datum 0"),
        ([Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2]})], "target_tokens"),
    ],
)
def test_bad_batches_are_refused_before_anything_changes(client, batch, message):
    trainer = client()
    trainer.forward_backward(ROWS)
    before = everything(trainer)
    with pytest.raises((DatasetError, UsageError), match=message):
        trainer.forward_backward(batch)
    assert same(before, everything(trainer))


def test_unknown_losses_and_options_name_the_nearest(client):
    trainer = client()
    with pytest.raises(UsageError, match="did you mean 'cross_entropy'"):
        trainer.forward_backward(ROWS, loss_fn="cross_entrpy")
    with pytest.raises(UsageError, match="'sft' has no option 'beta'"):
        trainer.forward_backward(ROWS, beta=0.1)
    with pytest.raises(UsageError, match="rewards belong to completions"):
        trainer.forward_backward(ROWS, [1.0] * len(ROWS))
    with pytest.raises(UsageError, match="second argument 'sft' is read as the loss_fn"):
        trainer.forward_backward(ROWS, "sft", "dpo")


def test_a_non_finite_gradient_is_skipped_and_said(client):
    trainer = client()
    trainer.forward_backward(ROWS)
    trainer.optim_step()
    before = everything(trainer)
    trainer.forward_backward(ROWS)
    inner(trainer).window.buffer("sft")[3] = float("nan")
    result = trainer.optim_step()
    assert result.skipped and result.step == 1 and np.isnan(result.grad_norm)
    assert same(before, (everything(trainer)[0], before[1], before[2], before[3]))
    trainer.forward_backward(ROWS)
    assert not trainer.optim_step().skipped


def test_ctrl_c_during_the_step_waits_until_it_is_whole(client, monkeypatch):
    trainer = client()
    state = inner(trainer)
    trainer.forward_backward(ROWS)
    real = state.optimiser.prepare

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(state.optimiser, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.optim_step()
    assert trainer.step == 1 and state.window.empty
    assert torch.equal(state.adapter.compute, state.adapter.master)


def test_every_lora_b_moves_in_the_first_step_on_every_base(service, tiny_model):
    for quantize, dtype in ((None, "float32"), ("4bit", "bfloat16"), ("8bit", "bfloat16"), (None, "bfloat16")):
        trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=quantize, dtype=dtype)
        state = inner(trainer)
        digests = [linear.digest() for linear in state.model.projections.values()]
        trainer.forward_backward(ROWS)
        trainer.optim_step()
        assert state.adapter.master.dtype == torch.float32
        assert state.optimiser.m.dtype == torch.float32
        assert len(state.adapter.views(state.adapter.master)) == 14
        for path, (_, b) in state.adapter.views(state.adapter.master).items():
            assert torch.count_nonzero(b) > 0, path
        assert [linear.digest() for linear in state.model.projections.values()] == digests


def test_dropout_changes_training_and_not_scoring_and_is_refused_for_preferences(client):
    trainer = client(dropout=0.5)
    first, second = trainer.forward_backward(ROWS), trainer.forward_backward(ROWS)
    assert float(first) != float(second)
    assert (
        float(trainer.forward(ROWS))
        == float(trainer.forward(ROWS))
        == pytest.approx(float(client().forward(ROWS)), rel=1e-6)
    )
    again = client(dropout=0.5)
    assert float(again.forward_backward(ROWS)) == float(first)
    pair = {"prompt": "a", "chosen": " b", "rejected": " c"}
    with pytest.raises(UsageError, match="create the client with dropout=0"):
        trainer.forward_backward([pair], loss_fn="dpo")


def test_the_output_head_can_be_adapted_too(client, service, tiny_model):
    trainer = client(train_unembed=True, dtype="float64")
    state = inner(trainer)
    assert state.spec.paths[-1] == "lm_head"
    loss = trainer.forward_backward(ROWS)
    analytic = gradient(trainer)
    a, _ = state.adapter.views(state.adapter.master)["lm_head"]
    at = (a.data_ptr() - state.adapter.master.data_ptr()) // 8
    for offset in (0, 7, a.numel() + 11):
        shift = 1e-6
        with torch.no_grad():
            state.adapter.master[at + offset] += shift
        up = float(trainer.forward(ROWS))
        with torch.no_grad():
            state.adapter.master[at + offset] -= 2 * shift
        down = float(trainer.forward(ROWS))
        with torch.no_grad():
            state.adapter.master[at + offset] += shift
        assert float(analytic[at + offset]) == pytest.approx((up - down) / (2 * shift), rel=1e-4, abs=1e-8)
    assert float(loss) > 0


def test_trainers_on_one_base_share_its_weights_and_train_apart(client):
    a, b = client(), client(seed=2)
    assert inner(a).model is inner(b).model
    before = inner(b).adapter.master.clone()
    a.forward_backward(ROWS)
    a.optim_step(learning_rate=0.1)
    assert torch.equal(inner(b).adapter.master, before)


def test_overfits_a_few_examples(service, tiny_model):
    trainer = service.create_lora_training_client(str(tiny_model), rank=8, quantize="4bit", dtype="float32")
    for _ in range(80):
        loss = trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=5e-3)
    assert float(loss) < 0.01
    question = [{"role": "user", "content": "What is one plus two?"}]
    answer = trainer.save_weights_and_get_sampling_client().sample(question, temperature=0, max_tokens=20)
    assert answer == "Three." and answer.stop_reason == "stop"


def test_rows_over_the_length_are_dropped_and_counted_and_a_batch_of_none_is_an_error(service, tiny_model, capsys):
    from local_tinker import ServiceClient

    trainer = ServiceClient(device="cpu").create_lora_training_client(
        str(tiny_model), rank=2, quantize=None, dtype="float32", max_length=48
    )
    long = {"messages": [{"role": "user", "content": "dog " * 60}, {"role": "assistant", "content": "fox"}]}
    both, alone = trainer.forward([ROWS[0], long]), trainer.forward([ROWS[0]])
    assert float(both) == float(alone) and len(both.logprobs) == 1
    assert (both.metrics["dropped_rows"], "dropped_rows" in alone.metrics) == (1.0, False)
    assert (
        "rows over max_length are dropped and counted; the first is row 1 of the batch, with" in capsys.readouterr().err
    )
    custom = trainer.forward_backward_custom([long, ROWS[0]], lambda data, logprobs: (logprobs[0].sum(), {}))
    assert custom.metrics == {"dropped_rows": 1.0}
    with pytest.raises(DatasetError, match="nothing is left of this batch: 1 rows are longer than max_length=48"):
        trainer.forward_backward([long])


def test_dropout_does_not_depend_on_the_cut(client):
    whole, cut = client(dropout=0.5, dtype="float64"), client(dropout=0.5, dtype="float64", micro_batch_tokens=1)
    whole.forward_backward(ROWS)
    cut.forward_backward(ROWS)
    assert relative(gradient(cut), gradient(whole)) < 1e-12


def test_fields_no_loss_reads_are_refused_with_the_nearest_name(client):
    trainer = client()
    (datum,) = as_datums(trainer, ROWS[:1])
    misspelled = Datum(
        datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weigths": [1.0] * datum.length}
    )
    with pytest.raises(UsageError, match="field 'weigths', which no loss reads; did you mean 'weights'"):
        trainer.forward_backward([misspelled], "cross_entropy")


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda data, logprobs: sum(lp.sum() for lp in logprobs), "must return"),
        (lambda data, logprobs: (torch.tensor(1.0), {}), "does not depend on the log-probs"),
        (lambda data, logprobs: (logprobs[0], {}), "scalar"),
        (lambda data, logprobs: ((logprobs[0] * float("inf")).sum(), {}), "not finite for datum 0"),
    ],
)
def test_custom_losses_that_cannot_be_meant_change_nothing(client, fn, message):
    trainer = client()
    before = everything(trainer)
    with pytest.raises(UsageError, match=message):
        trainer.forward_backward_custom(ROWS, fn)
    assert same(before, everything(trainer))


def test_a_custom_loss_may_leave_datums_out_and_return_no_metrics(client):
    trainer = client(train_unembed=True, micro_batch_tokens=1)
    trainer.forward_backward_custom(ROWS[:2], lambda data, logprobs: (-logprobs[0].sum(), None))
    assert float(gradient(trainer).abs().max()) > 0

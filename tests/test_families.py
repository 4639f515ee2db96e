"""Every family end to end: a saved folder, loaded, trained and sampled on the fast road, against transformers itself."""

import numpy as np
import pytest
import torch

from local_tinker import Datum, ModelInput
from tests import tiny
from tests.model.families import FAMILIES
from tests.test_training import ROWS, gradient, inner, relative, warm

NOT_OURS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request, tmp_path_factory):
    family, changes = FAMILIES[request.param]
    kept = {name: value for name, value in changes.items() if name not in NOT_OURS}
    layers = {"num_hidden_layers": 3, "sliding_window": kept.get("sliding_window")}
    layers = {name: value for name, value in layers.items() if value is not None}
    if request.param == "phi3_longrope":
        layers |= {"num_attention_heads": 8, "original_max_position_embeddings": 96}  # three frequencies a head
    return tiny.save(tmp_path_factory.mktemp("family") / request.param, family, **{**kept, **layers})


def eager(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_log_probs_and_greedy_text_equal_transformers(service, folder):
    model = eager(folder)
    sampler = service.create_sampling_client(folder, quantize=None, dtype="float32")
    assert sampler._base.road == "fast", sampler._base.said
    tokens = sampler.prompt_tokens(ROWS[5]["messages"][:1])
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    assert sampler.compute_logprobs(tokens)[1:] == pytest.approx(expected.tolist(), abs=2e-5)
    generated = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False, use_cache=False)[
        0, len(tokens) :
    ]
    ours = sampler.sample(tokens, temperature=0, max_tokens=12)
    assert list(ours.tokens) == generated.tolist()[: len(ours.tokens)]
    assert len(ours.tokens) == 12 or ours.stop_reason == "stop"


def test_the_gradient_equals_pefts_on_the_eager_model(service, folder):
    from peft import LoraConfig, get_peft_model

    trainer = service.create_lora_training_client(str(folder), rank=3, alpha=6, quantize=None, dtype="float32")
    warm(trainer)
    state = inner(trainer)
    targets = sorted({path.rsplit(".", 1)[-1] for path in state.spec.paths})
    model = get_peft_model(eager(folder), LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.adapter.named(state.adapter.master).items():
            named[name.replace(".weight", ".default.weight")].copy_(value)
    total = 0.0
    datums = []
    for row in ROWS[:4]:
        encoded = trainer.renderer.conversation(row["messages"])
        ids = torch.tensor([encoded.tokens])
        logprobs = (
            model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        )
        total = total - logprobs.sum()
        datums.append(Datum(ModelInput.from_ints(encoded.tokens[:-1]), {"target_tokens": encoded.tokens[1:]}))
    total.backward()
    want = torch.zeros_like(state.adapter.master)
    for name, view in state.adapter.named(want).items():
        view.copy_(named[name.replace(".weight", ".default.weight")].grad)
    loss = trainer.forward_backward(datums, loss_fn="cross_entropy")
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-5)
    assert relative(gradient(trainer), want) < 1e-4


def test_a_family_the_fast_road_does_not_know_trains_and_samples_on_the_plain_road(service, tmp_path):
    folder = tiny.save(tmp_path / "stablelm", "stablelm", num_key_value_heads=4)
    trainer = service.create_lora_training_client(str(folder), rank=3, quantize="4bit", dtype="float32")
    base = trainer._base
    assert base.road == "plain" and len(base.said) == 1 and "stablelm runs on the plain road" in base.said[0]
    before = trainer.forward_backward(ROWS)
    trainer.optim_step(learning_rate=1e-2)
    assert float(trainer.forward(ROWS)) < float(before)
    sampler = trainer.save_weights_and_get_sampling_client()
    completion = sampler.sample(ROWS[0]["messages"][:1], max_tokens=6, seed=1)
    scored = sampler.compute_logprobs([*completion.prompt_tokens, *completion.tokens])
    assert np.allclose(scored[len(completion.prompt_tokens) :], completion.logprobs, atol=1e-4)


def test_sampling_stops_where_longrope_would_rotate_older_keys_the_old_way(service, tmp_path):
    from tests.model.families import LONGROPE

    folder = tiny.save(
        tmp_path / "phi3",
        "phi3",
        num_attention_heads=8,
        rope_parameters=LONGROPE | {"original_max_position_embeddings": 24},
        original_max_position_embeddings=24,
    )
    sampler = service.create_sampling_client(folder, quantize=None, dtype="float32")
    completion = sampler.sample([5, 6, 7, 8], max_tokens=100, stop=[], seed=1)
    assert completion.stop_reason == "length" and len(completion.tokens) == 20

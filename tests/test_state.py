"""States and adapters on disk: bit-exact continuation, plain PEFT reads the adapter, what does not fit is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from local_tinker import ServiceClient
from local_tinker.errors import CheckpointError, CorruptCheckpointError, StateError
from tests.test_training import ROWS, inner, warm

STEPS = """
import sys, pickle
import torch
from local_tinker import ServiceClient
from tests.test_training import ROWS, inner
path, steps, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
trainer = ServiceClient(device="cpu", quiet=True).create_training_client_from_state(path)
losses = []
for i in range(trainer.step, steps):
    losses.append(float(trainer.forward_backward(ROWS[i % 3 : i % 3 + 4])))
    trainer.optim_step(learning_rate=1e-3 * (1 + i % 4))
state = inner(trainer)
text = trainer.save_weights_and_get_sampling_client().sample(ROWS[0]["messages"][:1], max_tokens=8)
torch.save([losses, state.adapter.master, state.optimiser.m, state.optimiser.v, trainer.step, text.tokens], out)
"""


def train(trainer, steps):
    losses = []
    for i in range(trainer.step, steps):
        losses.append(float(trainer.forward_backward(ROWS[i % 3 : i % 3 + 4])))
        trainer.optim_step(learning_rate=1e-3 * (1 + i % 4))
    return losses


@pytest.mark.parametrize(
    ("quantize", "dtype", "options"),
    [
        (None, "float32", {"dropout": 0.1}),
        (None, "bfloat16", {}),
        ("4bit", "bfloat16", {"train_unembed": True}),
        ("8bit", "float32", {}),
    ],
)
def test_a_state_reloaded_in_a_fresh_process_continues_bit_exactly(tmp_path, tiny_model, quantize, dtype, options):
    service = ServiceClient(device="cpu", quiet=True)
    trainer = service.create_lora_training_client(
        str(tiny_model), rank=4, quantize=quantize, dtype=dtype, seed=7, **options
    )
    warm(trainer)
    train(trainer, 3)
    trainer.save_state(tmp_path / "state", extra={"position": 12})
    rest = train(trainer, 7)
    state = inner(trainer)
    text = trainer.save_weights_and_get_sampling_client().sample(ROWS[0]["messages"][:1], max_tokens=8)
    out = tmp_path / "resumed.pt"
    subprocess.run([sys.executable, "-c", STEPS, str(tmp_path / "state"), "7", str(out)], check=True)
    losses, master, m, v, step, tokens = torch.load(out)
    assert losses == rest and step == 7
    for ours, theirs in zip((state.adapter.master, state.optimiser.m, state.optimiser.v), (master, m, v), strict=True):
        assert torch.equal(ours, theirs)
    assert text.tokens == tokens


@pytest.fixture
def trainer(service, tiny_model):
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, alpha=8, quantize=None, dtype="float32")
    warm(trainer)
    train(trainer, 2)
    return trainer


def test_load_state_returns_what_was_kept_with_it(trainer, tmp_path):
    trainer.save_state(tmp_path / "s", extra={"position": 3, "epoch": 1})
    assert trainer.load_state(tmp_path / "s") == {"position": 3, "epoch": 1}


def test_pending_gradients_are_refused_unless_discarded(trainer, tmp_path):
    trainer.forward_backward(ROWS)
    with pytest.raises(StateError, match="1 forward_backward calls have not been applied and would be lost"):
        trainer.save_state(tmp_path / "s")
    assert not (tmp_path / "s").exists() and not inner(trainer).window.empty
    trainer.save_state(tmp_path / "s", discard_gradients=True)
    assert inner(trainer).window.empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "rank: saved 4, here 8"),
        ({"alpha": 16}, "alpha: saved 8.0, here 16.0"),
        ({"target_modules": ["q_proj"]}, "paths: saved 14 modules"),
        ({"quantize": "4bit"}, "quantize: saved None, here '4bit'"),
        ({"dtype": "float64"}, "dtype: saved 'float32', here 'float64'"),
    ],
)
def test_a_state_of_another_geometry_is_refused_with_the_difference(
    service, tiny_model, trainer, tmp_path, changes, message
):
    trainer.save_state(tmp_path / "s")
    options = {"rank": 4, "alpha": 8, "quantize": None, "dtype": "float32", **changes}
    other = service.create_lora_training_client(str(tiny_model), **options)
    before = inner(other).adapter.master.clone()
    with pytest.raises(CheckpointError, match=message):
        other.load_state(tmp_path / "s")
    assert torch.equal(inner(other).adapter.master, before)


def test_a_state_of_another_base_is_refused(service, trainer, tmp_path):
    from tests import tiny

    trainer.save_state(tmp_path / "s")
    twin = tiny.save(tmp_path / "twin", seed=1)
    other = service.create_lora_training_client(str(twin), rank=4, alpha=8, quantize=None, dtype="float32")
    with pytest.raises(CheckpointError, match="base_fingerprint: saved"):
        other.load_state(tmp_path / "s")


def test_a_damaged_state_is_refused_and_changes_nothing(trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    before = inner(trainer).adapter.master.clone()
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match="optimizer.safetensors"):
        trainer.load_state(path)
    assert torch.equal(inner(trainer).adapter.master, before)


def test_an_existing_folder_is_not_overwritten_unasked(trainer, tmp_path):
    trainer.save_state(tmp_path / "s")
    with pytest.raises(CheckpointError):
        trainer.save_state(tmp_path / "s")
    trainer.save_state(tmp_path / "s", overwrite=True)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"]}, {"train_unembed": True}])
def test_plain_peft_loads_the_adapter_with_equal_logits(service, tiny_model, tmp_path, options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = service.create_lora_training_client(
        str(tiny_model), rank=4, alpha=8, quantize=None, dtype="float32", **options
    )
    warm(trainer)
    folder = trainer.save_adapter(tmp_path / "adapter")
    sampler = trainer.save_weights_and_get_sampling_client()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = trainer.renderer.conversation(ROWS[2]["messages"]).tokens
    bare = base(torch.tensor([tokens])).logits
    model = PeftModel.from_pretrained(base, folder).eval()
    logits = model(torch.tensor([tokens])).logits
    assert float((logits - bare).abs().max()) > 0.1
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    assert sampler.compute_logprobs(tokens)[1:] == pytest.approx(expected.tolist(), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False) == trainer.tokenizer.apply_chat_template(
        ROWS[0]["messages"], tokenize=False
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["inference_mode"] is True


def test_an_adapter_folder_samples_as_its_trainer_did_and_can_be_trained_on(service, tiny_model, trainer, tmp_path):
    folder = trainer.save_adapter(tmp_path / "adapter")
    ours = trainer.save_weights_and_get_sampling_client()
    again = service.create_sampling_client(folder)
    prompt = ROWS[0]["messages"][:1]
    assert again.sample(prompt, max_tokens=8, seed=1).tokens == ours.sample(prompt, max_tokens=8, seed=1).tokens
    further = service.create_lora_training_client(str(tiny_model), quantize=None, dtype="float32", adapter=folder)
    assert float(further.forward(ROWS)) == pytest.approx(float(trainer.forward(ROWS)), rel=1e-6)
    assert torch.equal(inner(further).adapter.master, inner(trainer).adapter.master)


def test_peft_written_adapters_are_read(service, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "peft")
    tokens = list(range(5, 25))
    logits = model(torch.tensor([tokens])).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    sampler = service.create_sampling_client(tmp_path / "peft", quantize=None, dtype="float32")
    assert sampler.compute_logprobs(tokens)[1:] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}])
def test_adapters_of_a_kind_not_supported_are_refused_by_name(service, trainer, tmp_path, change):
    folder = trainer.save_adapter(tmp_path / "adapter")
    (folder / "MANIFEST.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(
        CheckpointError,
        match=next(iter(change.values())) if isinstance(next(iter(change.values())), str) else next(iter(change)),
    ):
        service.create_sampling_client(folder)


def test_a_state_folder_samples_too(service, trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    prompt = ROWS[0]["messages"][:1]
    ours = trainer.save_weights_and_get_sampling_client().sample(prompt, max_tokens=8, seed=1)
    assert service.create_sampling_client(path).sample(prompt, max_tokens=8, seed=1).tokens == ours.tokens


def test_weights_versions_are_the_same_at_a_state_and_part_ways_after_it(service, trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    twin = service.create_training_client_from_state(path)
    version = trainer._engine.version
    assert version(trainer._id) == version(twin._id)
    for client in (trainer, twin):
        client.forward_backward(ROWS)
        client.optim_step()
    assert version(trainer._id) != version(twin._id)
    again = service.create_training_client_from_state(twin.save_state(tmp_path / "t"))
    assert version(again._id) == version(twin._id)


def test_a_client_from_a_state_computes_in_the_cut_that_was_saved(service, trainer, tmp_path):
    state = inner(trainer)
    state.budget = replace(state.budget, choice=replace(state.budget.choice, tokens=600, head_rows=96, tile=300))
    again = inner(service.create_training_client_from_state(trainer.save_state(tmp_path / "s"))).budget
    assert (again.micro_batch_tokens, again.head_rows, again.choice.tile) == (600, 96, 300)


def test_a_state_brings_its_seed_along(service, tiny_model, trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    other = service.create_lora_training_client(
        str(tiny_model), rank=4, alpha=8, quantize=None, dtype="float32", seed=99
    )
    other.load_state(path)
    prompt = ROWS[0]["messages"][:1]
    ours = trainer.save_weights_and_get_sampling_client().sample(prompt, max_tokens=8)
    assert other.save_weights_and_get_sampling_client().sample(prompt, max_tokens=8).tokens == ours.tokens


def test_loading_with_gradients_pending_raises_unless_told_to_discard_them(trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    trainer.forward_backward(ROWS)
    with pytest.raises(StateError, match="would be lost"):
        trainer.load_state(path)
    trainer.load_state(path, discard_gradients=True)
    assert inner(trainer).window.empty


def test_a_save_that_fails_keeps_the_gradients_it_was_told_to_discard(trainer, tmp_path):
    path = trainer.save_state(tmp_path / "s")
    trainer.forward_backward(ROWS)
    with pytest.raises(CheckpointError):
        trainer.save_state(path, discard_gradients=True)
    assert not inner(trainer).window.empty


def test_a_trainer_started_from_an_adapter_comes_back_from_its_state(service, tiny_model, trainer, tmp_path):
    folder = trainer.save_adapter(tmp_path / "a")
    further = service.create_lora_training_client(str(tiny_model), quantize=None, dtype="float32", adapter=folder)
    train(further, 2)
    again = service.create_training_client_from_state(further.save_state(tmp_path / "s"))
    assert torch.equal(inner(again).adapter.master, inner(further).adapter.master)
    assert torch.equal(inner(again).reference, inner(further).reference)


def test_an_adapter_of_other_weights_is_refused(service, trainer, tmp_path):
    from local_tinker.errors import UsageError
    from tests import tiny

    folder = trainer.save_adapter(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    twin = tiny.save(tmp_path / "elsewhere" / "tiny", seed=4)
    with pytest.raises(CheckpointError, match="with other weights"):
        service.create_lora_training_client(str(twin), quantize=None, dtype="float32", adapter=folder)
    with pytest.raises(UsageError, match="rank=16 was asked for and the adapter has rank=4"):
        service.create_lora_training_client(
            str(trainer.base_model), quantize=None, dtype="float32", adapter=folder, rank=16
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tokenizer: tokenizer.add_tokens(["sprocket"]),
            r"tokenizer: saved '\d+ tokens, \w{12}', here '\d+ tokens",
        ),
        (
            lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
            "chat_template: saved '\\w{12}', here",
        ),
    ],
)
def test_a_state_of_another_tokenizer_is_refused(service, trainer, tiny_model, tmp_path, change, message):
    path = trainer.save_state(tmp_path / "s")
    from transformers import AutoTokenizer

    (tmp_path / "twin").mkdir()
    for file in tiny_model.iterdir():
        (tmp_path / "twin" / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "twin")
    other = service.create_lora_training_client(str(tmp_path / "twin"), rank=4, alpha=8, quantize=None, dtype="float32")
    assert inner(other).model.fingerprint == inner(trainer).model.fingerprint
    with pytest.raises(CheckpointError, match=message):
        other.load_state(path)


def test_a_failed_save_at_any_system_call_leaves_the_trainer_as_it_was_and_the_next_one_succeeds(
    trainer, tmp_path, monkeypatch
):
    import errno
    import os

    from local_tinker.checkpoint import Disk, list_checkpoints

    trainer.save_state(tmp_path / "first")
    trainer.forward_backward(ROWS)
    state = inner(trainer)
    kept = [state.adapter.master.clone(), state.optimiser.m.clone(), state.optimiser.v.clone()]
    gradient = state.window.gradient().clone()
    calls, fail_at = [0], [0]
    for name in ("mkdir", "create", "write", "fsync", "close", "fsync_dir", "rename"):
        real = getattr(Disk, name)

        def failing(self, *args, real=real):
            calls[0] += 1
            if calls[0] == fail_at[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(self, *args)

        monkeypatch.setattr(Disk, name, failing)
    for at in range(1, 100):
        calls[0], fail_at[0] = 0, at
        try:
            trainer.save_state(tmp_path / "second", discard_gradients=True)
            break
        except CheckpointError as error:
            assert "second" in str(error) and "EIO" in str(error)
        assert [each.name for each in list_checkpoints(tmp_path, verify="hash")] == ["first"]
        for before, now in zip(kept, (state.adapter.master, state.optimiser.m, state.optimiser.v), strict=True):
            assert torch.equal(before, now)
        assert torch.equal(state.window.gradient(), gradient)
    fail_at[0] = 0
    assert at > 15 and {each.name for each in list_checkpoints(tmp_path, verify="hash")} == {"first", "second"}

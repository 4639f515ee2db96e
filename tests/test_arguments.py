"""Keywords that other libraries use are answered with ours."""

import pytest

from local_tinker.errors import UsageError


@pytest.fixture(scope="module")
def trainer(tiny_model):
    from local_tinker import ServiceClient

    service = ServiceClient(device="cpu", quiet=True)
    return service.create_lora_training_client(str(tiny_model), rank=2, quantize=None, dtype="float32")


@pytest.mark.parametrize(
    ("verb", "word", "says"),
    [
        ("optim_step", "lr", "optim_step has no keyword 'lr': write learning_rate; it takes params, learning_rate"),
        ("optim_step", "max_grad_norm", "write grad_clip_norm"),
        ("optim_step", "learning_rat", "write learning_rate"),
        ("optim_step", "zzz", "has no keyword 'zzz'; it takes"),
        ("sample", "max_new_tokens", "sample has no keyword 'max_new_tokens': write max_tokens"),
        ("sample_batch", "num_return_sequences", "write n;"),
        ("stream", "max_length", "write max_tokens"),
        ("sample", "num_return_sequences", "has no keyword 'num_return_sequences'; it takes prompt"),
    ],
)
def test_a_keyword_of_another_library_is_answered_with_ours(trainer, verb, word, says):
    sampler = trainer.save_weights_and_get_sampling_client()
    call = trainer.optim_step if verb == "optim_step" else lambda **kw: getattr(sampler, verb)(["the fox"], **kw)
    with pytest.raises(UsageError) as caught:
        call(**{word: 1})
    assert says in str(caught.value) and "self" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("r", "rank"), ("lora_alpha", "alpha"), ("load_in_4bit", 'quantize="4bit"'), ("max_seq_length", "max_length")],
)
def test_a_lora_keyword_of_peft_or_trl_is_answered_with_ours(service, tiny_model, word, meant):
    with pytest.raises(UsageError, match=f"has no keyword '{word}': write {meant}; it takes base_model, rank"):
        service.create_lora_training_client(str(tiny_model), **{word: 16})

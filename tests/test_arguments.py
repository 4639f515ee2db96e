"""Keywords that other libraries use are answered with ours."""

import pickle

import pytest

from local_tinker import AdamParams, ServiceClient, batches, load_rows
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
        (
            "sample",
            "num_return_sequences",
            "'num_return_sequences': it is sample_batch([prompt], n=...); it takes prompt",
        ),
        ("sample", "sampling_params", "it is keywords here, such as max_tokens=64"),
        ("optim_step", "wd", "write weight_decay"),
        ("optim_step", "epsilon", "write eps"),
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
    [("r", "rank"), ("lora_alpha", "alpha"), ("load_in_4bit", 'quantize="4bit"'), ("max_seq_length", "max_length"),
     ("model_name", "base_model"), ("train_mlp", "target_modules")],
)  # fmt: skip
def test_a_lora_keyword_of_peft_or_trl_is_answered_with_ours(service, tiny_model, word, meant):
    with pytest.raises(UsageError, match=f"has no keyword '{word}': write {meant}; it takes base_model, rank"):
        service.create_lora_training_client(str(tiny_model), **{word: 16})


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("learning_rate", "it is optim_step(learning_rate=...)"),
        ("per_device_train_batch_size", "it is batches(rows, batch_size=...), which is the effective size"),
        ("num_train_epochs", "it is batches(rows, epochs=...)"),
        ("use_gradient_checkpointing", "it is decided by the memory plan"),
    ],
)
def test_a_keyword_of_another_call_is_answered_with_that_call(service, tiny_model, word, says):
    with pytest.raises(UsageError) as caught:
        service.create_lora_training_client(str(tiny_model), **{word: 1})
    assert f"has no keyword '{word}': {says}" in str(caught.value)


def test_an_option_of_another_librarys_loss_is_answered_with_ours(trainer):
    groups = trainer.save_weights_and_get_sampling_client().sample_batch(["a"], n=2, max_tokens=2)
    for word, says in (("epsilon", "write clip_low"), ("kl_coef", "write beta"), ("lr", "it is optim_step(")):
        with pytest.raises(UsageError) as caught:
            trainer.forward_backward(groups, [[0.0, 1.0]], loss_fn="grpo", **{word: 0.1})
        assert f"'grpo' has no option '{word}': {says}" in str(caught.value)
    with pytest.raises(UsageError, match="optim_step has no setting 'lr': write learning_rate"):
        trainer.optim_step({"lr": 1e-4})


@pytest.mark.parametrize(("prompt", "got"), [(None, "got NoneType"), (3, "got int"), (["a"], "got a list of str")])
def test_what_is_no_prompt_is_named(trainer, prompt, got):
    with pytest.raises(UsageError, match=f"a prompt is a string, a list of messages or a list of token ids; {got}$"):
        trainer.save_weights_and_get_sampling_client().sample(prompt)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: AdamParams(lr=1e-3),
            "AdamParams has no keyword 'lr': write learning_rate; it takes learning_rate, beta1",
        ),
        (
            lambda: ServiceClient(api_key="x"),
            "has no keyword 'api_key': it is not needed: everything runs on this machine",
        ),
        (lambda: batches([1], bs=2), "batches has no keyword 'bs': write batch_size; it takes rows, batch_size"),
        (lambda: load_rows("x.jsonl", num_rows=3), "load_rows has no keyword 'num_rows'"),
        (lambda: load_rows({"text": ["a"]}), "got dict. Rows that are in memory already go to batches"),
    ],
)
def test_functions_and_classes_answer_too(call, says):
    with pytest.raises(UsageError) as caught:
        call()
    assert says in str(caught.value) and "self" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.save_state(3), "where to save is a path, as a str or a pathlib.Path; got 3"),
        (lambda t: t.save_adapter(""), "where to save is a path"),
        (lambda t: t.load_state(None), "a state to load is a path"),
        (lambda t: t.save_state("x", force=True), "save_state has no keyword 'force'"),
        (lambda t: t.forward_backward(["a b"], loss="sft"), "it is forward_backward(loss_fn=...)"),
        (lambda t: t.forward_backward_custom(["a b"], None), "fn must be a function of the data and their log-probs"),
        (lambda t: t.save_weights_and_get_sampling_client().sample_batch(None), "a list of prompts, got one NoneType"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_done(trainer, call, says):
    with pytest.raises(UsageError) as caught:
        call(trainer)
    assert says in str(caught.value)


def test_a_checked_function_keeps_its_signature():
    import inspect

    assert list(inspect.signature(batches).parameters) == [
        "rows",
        "batch_size",
        "epochs",
        "seed",
        "shuffle",
        "drop_last",
    ]
    assert AdamParams(1e-3).learning_rate == 1e-3 and batches.__doc__ and pickle.loads(pickle.dumps(AdamParams()))

"""Calls that cannot be meant: keywords of other libraries, arguments too few or too many, values of the wrong kind."""

import pickle

import numpy as np
import pytest

from local_tinker import AdamParams, Datum, ModelInput, Rollout, ServiceClient, batches, load_rows
from local_tinker.errors import UsageError


@pytest.fixture(scope="module")
def trainer(tiny_model):
    from local_tinker import ServiceClient

    service = ServiceClient(device="cpu", quiet=True)
    return service.create_lora_training_client(str(tiny_model), rank=2, quantize=None, dtype="float32", max_length=40)


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


NAN = float("nan")
ONE = ModelInput.from_ints([1])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.forward_backward(), "forward_backward was called without batch; it takes batch, rewards, loss_fn"),
        (lambda t: t.forward(loss_fn="sft"), "forward was called without batch"),
        (lambda t: t.forward_backward_custom(), "was called without batch, fn; it takes batch, fn, loss_fn"),
        (lambda t: t.save_state(), "save_state was called without path; it takes path, overwrite"),
        (lambda t: Rollout((1,), (2,)), "Rollout was called without trained, logprobs, stop_reason, weights_version;"),
        (lambda t: Datum(), "Datum was called without model_input"),
        (lambda t: batches([1], 2), "batches got 2 arguments and takes at most 1 without their names (rows); name the rest"),
        (lambda t: t.optim_step(1e-4, 0.9), "takes at most 1 without their names (params); name the rest: learning_rate="),
        (lambda t: ServiceClient("cpu"), "ServiceClient got 1 argument and takes none without a name; name the rest: device="),
        (lambda t: t.save_weights_and_get_sampling_client(3), "takes none without a name; leave the rest out"),
        (lambda t: t.forward(["a"], None, "sft", 3), "forward got 4 arguments and takes at most 3"),
        (lambda t: t.forward_backward(["a"], None, rewards=1), "got rewards twice, by its place and as rewards=; give it once"),
        (lambda t: AdamParams(1e-4, learning_rate=3), "AdamParams got learning_rate twice"),
        (lambda t: t.try_longest([3], pear=True), "try_longest has no keyword 'pear': write pairs; it takes lengths, pairs"),
        (lambda t: t.save_weights_and_get_sampling_client(name="x"), "no keyword 'name'; it takes no arguments"),
        (lambda t: ModelInput.from_ints(), "from_ints was called without tokens; it takes tokens"),
        (lambda t: ModelInput(chunk=3), "ModelInput has no keyword 'chunk': write chunks"),
    ],
)  # fmt: skip
def test_a_missing_a_surplus_and_a_repeated_argument_are_named(trainer, call, says):
    with pytest.raises(UsageError) as caught:
        call(trainer)
    assert says in str(caught.value) and "self" not in str(caught.value) and "cls" not in str(caught.value)


@pytest.mark.parametrize("value", ["false", 0, 1, None])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t, v: ServiceClient(device="cpu", quiet=v), "quiet"),
        (lambda t, v: ServiceClient(device="cpu", deterministic=v), "deterministic"),
        (lambda t, v: t.try_longest([3], pairs=v), "pairs"),
        (lambda t, v: t.save_state("x", overwrite=v), "overwrite"),
        (lambda t, v: t.load_state("x", discard_gradients=v), "discard_gradients"),
        (lambda t, v: batches([1], batch_size=1, shuffle=v), "shuffle"),
    ],
)
def test_a_switch_is_true_or_false(trainer, call, name, value):
    with pytest.raises(UsageError, match=f"^{name} must be True or False, got {value!r}$"):
        call(trainer, value)


def test_a_switch_may_be_numpys():
    assert batches([1], batch_size=1, shuffle=np.False_).order(0) == [0]


PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.forward_backward(PAIRS, loss_fn="dpo", cache_reference="false"), "cache_reference must be one of True"),
        (lambda t: t.forward_backward(["a b"], loss_fn=""), "unknown loss_fn ''"),
        (lambda t: t.forward_backward_custom(["a b"], print, loss_fn="zzz"), "loss_fn must be one of 'cross_entropy', 'sft'"),
        (lambda t: t.optim_step(value_learning_rate=NAN), "value_learning_rate must be a finite number >= 0, got nan"),
        (lambda t: t.optim_step({3: 1}), "optim_step has no setting 3; it takes"),
        (lambda t: t.save_state("x", extra=[("a", 1)]), "extra must be a dict of JSON values"),
        (lambda t: AdamParams(learning_rate=True), "learning_rate must be a finite number >= 0, got True"),
        (lambda t: AdamParams(grad_clip_norm=False), "grad_clip_norm must be a finite number >= 0, got False"),
        (lambda t: AdamParams(beta1=False), "beta1 must be in [0, 1), got False"),
        (lambda t: batches([1], batch_size=1, seed=1.5), "seed must be a whole number >= 0, got 1.5"),
        (lambda t: t.try_longest(3), "lengths must be a list of tokens a document, such as [2000, 500], got 3"),
        (lambda t: t.try_longest([5, 41]), "lengths[1] must be a whole number >= 1 and <= 40, the client's max_length, got 41"),
        (lambda t: t.try_longest([0]), "lengths[0] must be a whole number >= 1"),
        (lambda t: t.try_longest([-1]), "lengths[0] must be a whole number >= 1"),
        (lambda t: t.try_longest([3.0]), "got 3.0"),
        (lambda t: t.try_longest([True]), "got True"),
        (lambda t: Datum(ONE, [1]), "loss_fn_inputs must be a dict such as {'target_tokens': ids}, got list"),
        (lambda t: ModelInput([1, 2]), "chunks holds 1; token ids alone are read by ModelInput.from_ints([...])"),
        (lambda t: ModelInput.from_ints(3), "tokens must be a list, got 3 (int)"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named(trainer, call, says):
    with pytest.raises(UsageError) as caught:
        call(trainer)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"target_modules": None}, 'target_modules must be "all-linear" or module names'),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": [3]}, "target_modules must be"),
        ({"target_modules": 3, "train_unembed": True}, "target_modules must be"),
        ({"seed": 2**63}, "seed must be a whole number >= 0 and <= 9223372036854775807"),
        ({"dtype": ""}, "dtype='' is not known"),
        ({"adapter": 3}, "an adapter to start from is a path"),
        ({"base_model": 3}, "base_model must be a hub id, a folder or an alias that models() lists, got 3"),
    ],
)
def test_a_setting_of_a_new_trainer_that_cannot_be_meant_is_named(service, tiny_model, keywords, says):
    with pytest.raises(UsageError) as caught:
        service.create_lora_training_client(**{"base_model": str(tiny_model), "quantize": None, **keywords})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [({"base_model": None}, "base_model must be a hub id"), ({"seed": True}, "got True"), ({"seed": 1.5}, "got 1.5")],
)
def test_a_setting_of_a_new_sampler_that_cannot_be_meant_is_named(service, tiny_model, keywords, says):
    with pytest.raises(UsageError) as caught:
        service.create_sampling_client(**{"base_model": str(tiny_model), "quantize": None, **keywords})
    assert says in str(caught.value)


def test_an_engine_of_another_kind_is_named():
    with pytest.raises(
        UsageError, match="engine must be a LocalEngine, or None for the one of this process; got 'cpu'"
    ):
        ServiceClient(engine="cpu")


def test_the_greatest_seed_and_the_output_head_alone_are_fine(service, tiny_model):
    settings = {"rank": 2, "quantize": None, "dtype": "float32", "seed": 2**63 - 1}
    made = service.create_lora_training_client(str(tiny_model), target_modules=[], train_unembed=True, **settings)
    assert made.forward_backward(["the fox"]) > 0 and made.optim_step().step == 1


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda s: s.sample(b"abc"), "token ids; got bytes"),
        (lambda s: s.compute_logprobs({1, 2}), "token ids; got set"),
        (lambda s: s.sample_batch({"a": 1}), "takes a list of prompts, got one dict"),
    ],
)
def test_what_only_looks_like_ids_or_prompts_is_refused(trainer, call, got):
    with pytest.raises(UsageError, match=got):
        call(trainer.save_weights_and_get_sampling_client())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt_tokens", (1.7,), "a token id must be a whole number, got 1.7 (float)"),
        ("prompt_tokens", "12", "prompt_tokens must be a list, got '12' (str)"),
        ("tokens", (True, 2), "a token id must be a whole number, got True (bool)"),
        ("trained", ("false", "false"), "trained must hold True or False a token, got 'false' (str)"),
        ("logprobs", ("-1", 0), "logprobs must hold a number a token, got '-1' (str)"),
        ("logprobs", (None, 0), "logprobs must hold a number a token, got None (NoneType)"),
    ],
)
def test_a_rollout_takes_nothing_for_another_kind(field, value, says):
    whole = {"prompt_tokens": (1,), "tokens": (3, 4), "trained": (np.True_, 0), "logprobs": (np.float32(-1), 0)}
    whole |= {"stop_reason": "stop", "weights_version": "x"}
    assert Rollout(**whole).trained == (True, False)
    with pytest.raises(UsageError) as caught:
        Rollout(**{**whole, field: value})
    assert str(caught.value) == says

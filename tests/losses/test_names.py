import inspect

import pytest

from local_tinker.errors import UsageError
from local_tinker.losses import LOSSES, MISSING_LOSSES, check_options, find_loss
from local_tinker.losses.base import REQUIRED

PUBLIC = {"sft", "dpo", "grpo", "ppo", "cross_entropy", "importance_sampling", "cispo", "dro"}


def test_users_find_exactly_the_documented_losses():
    assert {name for name, spec in LOSSES.items() if not spec.internal} == PUBLIC
    for name in PUBLIC:
        assert find_loss(name) is LOSSES[name]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_spec_names_itself_and_exactly_the_options_of_its_function(name):
    spec = LOSSES[name]
    keywords = [p for p in inspect.signature(spec.fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert spec.name == name
    assert {p.name for p in keywords} == set(spec.defaults)
    assert all(p.default is p.empty for p in keywords), "defaults live in the spec alone"
    assert spec.normaliser in ("weight", "none")
    assert spec.rows in ("weighted", "all")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_defaults_of_every_loss_pass_its_own_check(name):
    spec = LOSSES[name]
    given = {k: 0.1 for k, v in spec.defaults.items() if v is REQUIRED}
    loss, estimator = check_options(spec, given)
    assert loss == {**spec.defaults, **given}
    assert estimator == dict(spec.estimator)


@pytest.mark.parametrize("name", sorted(MISSING_LOSSES))
def test_known_losses_we_lack_are_refused_by_name_with_an_alternative(name):
    assert name not in LOSSES
    with pytest.raises(UsageError, match=rf"'{name}' is not among our losses: .*the losses are sft, dpo"):
        find_loss(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("KTO", "'KTO' is not among our losses: use 'dpo' on pairs"),
        ("dr-grpo", "aggregation='constant'"),
        ("stf", "unknown loss_fn 'stf'; did you mean 'sft'"),
        ("zzz", r"unknown loss_fn 'zzz' \(the losses are"),
        ("linear", "'linear' is internal"),
        ("ppo_rollout", "'ppo_rollout' is internal"),
        (None, "unknown loss_fn None"),
        (["sft"], "unknown loss_fn"),
    ],
)
def test_other_names_are_refused_with_the_nearest(name, words):
    with pytest.raises(UsageError, match=words):
        find_loss(name)


def test_tinker_losses_need_the_fields_tinker_documents():
    assert LOSSES["cross_entropy"].required_fields == ("target_tokens", "weights")
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        assert LOSSES[name].required_fields == ("target_tokens", "logprobs", "advantages")
        assert LOSSES[name].rows == "all"

import math

import numpy as np
import pytest

from local_tinker.data.datum import (
    preference,
    rollout,
    supervised,
    tensor_encoded,
    tensor_rows,
    validate_datums,
)
from local_tinker.data.render import Encoded
from local_tinker.errors import DatasetError, UsageError
from local_tinker.types import Completion, Datum, ModelInput, Rollout


def test_supervised_shifts_targets_and_weights_by_one():
    datum = supervised(Encoded([5, 6, 7, 8], [False, False, True, True]), "x line 1")
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 1.0]
    assert datum.loss_fn_inputs["weights"].dtype == np.float32 and datum.source == "x line 1"


def test_nothing_trained_is_an_error_that_names_the_example():
    with pytest.raises(DatasetError, match="x line 1: 0 trained tokens"):
        supervised(Encoded([5, 6], [True, False]), "x line 1")


def test_a_preference_needs_one_prompt_as_tokens():
    chosen, rejected = Encoded([1, 2, 3], [False, False, True]), Encoded([1, 2, 4, 5], [False, False, True, True])
    pair = preference(chosen, rejected)
    assert [d.loss_fn_inputs["target_tokens"].tolist() for d in pair] == [[2, 3], [2, 4, 5]]
    with pytest.raises(DatasetError, match="prompts of chosen and rejected differ"):
        preference(chosen, Encoded([1, 9, 4], [False, False, True]))


SAMPLE = Rollout((1, 2), (3, 4, 5), (True, False, True), (-0.5, 0.0, -0.25), "stop", "v/1", id="abc")


def test_a_rollout_aligns_log_probs_and_advantages_with_the_shifted_targets():
    datum = rollout(SAMPLE, advantages=2.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert {key: value.tolist() for key, value in datum.loss_fn_inputs.items()} == {
        "target_tokens": [2, 3, 4, 5],
        "weights": [0.0, 1.0, 0.0, 1.0],
        "logprobs": [0.0, -0.5, 0.0, -0.25],
        "advantages": [0.0, 2.0, 0.0, 2.0],
    }
    per_token = rollout(SAMPLE, advantages=[1.0, 9.0, 3.0])
    assert per_token.loss_fn_inputs["advantages"].tolist() == [0.0, 1.0, 0.0, 3.0]
    assert "advantages" not in rollout(SAMPLE).loss_fn_inputs


def test_a_completion_is_the_rollout_of_one_turn():
    text = Completion("x", tokens=[3, 4], logprobs=[-1, -2], prompt_tokens=[1], stop_reason="stop", weights_version="v")
    datum = rollout(text)
    assert datum.loss_fn_inputs["weights"].tolist() == [1.0, 1.0]
    assert datum.loss_fn_inputs["logprobs"].tolist() == [-1.0, -2.0]


def test_advantages_of_another_length_and_rollouts_without_prompt_or_sampled_tokens_are_refused():
    with pytest.raises(UsageError, match=r"shape \(2,\) for 3 tokens"):
        rollout(SAMPLE, advantages=[1.0, 2.0])
    for prompt, trained, says in (((), (True,), "no prompt tokens"), ((1,), (False,), "0 trained tokens")):
        with pytest.raises(DatasetError, match=f"rollout abc: {says}"):
            rollout(Rollout(prompt, (3,), trained, (0.0,), "stop", "v", id="abc"))


def test_tensor_padding_goes_by_the_mask_so_eos_stays_trained_where_pad_is_eos():
    eos = 0
    left = {
        "input_ids": [[eos, eos, 5, 6, eos]],
        "attention_mask": [[0, 0, 1, 1, 1]],
        "labels": [[-100] * 3 + [6, eos]],
    }
    right = {"input_ids": [[5, 6, eos, eos]], "attention_mask": [[1, 1, 1, 0]], "labels": [[-100, 6, eos, -100]]}
    for batch in (left, right, {key: np.array(value) for key, value in left.items()}):
        (datum,) = tensor_rows(batch)
        assert datum.model_input.to_ints() == [5, 6]
        assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, eos]
        assert datum.loss_fn_inputs["weights"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": [[1, 2]]}, "without labels"),
        ({"input_ids": [[1, 2, 3]], "labels": [[2, 3, -100]]}, "label 2 for token 1.*not shifted"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "row 0: 0 trained tokens"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "2 input_ids, 1 labels"),
        ({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "holes"),
        ({"input_ids": [[1.5, 2]], "labels": [[1, 2]]}, "not whole numbers"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]], "position_ids": [[0, 0]]}, "already packed"),
    ],
)
def test_tensors_that_cannot_mean_what_they_say_are_refused(batch, says):
    with pytest.raises(DatasetError, match=says):
        tensor_encoded(batch)


def datum(tokens, **inputs):
    return Datum(ModelInput.from_ints(tokens), inputs)


GOOD = datum([1, 2], target_tokens=[2, 3], weights=[0.0, 1.0])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            datum([1, 2], target_tokens=[1, 2, 3]),
            r"target_tokens.*shape \(3,\) for 2 input tokens: give model_input=tokens",
        ),
        (datum([1, 2], target_tokens=[2]), r"shape \(1,\) for 2"),
        (datum([1, 2], target_tokens=[2, 3], advantages=[1.0]), r"advantages.*shape \(1,\) for 2"),
        (datum([1, -1], target_tokens=[2, 3]), "model_input.*token id -1 at position 1; the vocabulary has ids 0 to 9"),
        (datum([1, 2**63], target_tokens=[2, 3]), "token id 9223372036854775808 at position 1"),
        (datum([1, 2], target_tokens=[10, 3]), "target_tokens.*token id 10 at position 0"),
        (datum([1, 2], target_tokens=[[2, 3], [4, 11]]), "target_tokens.*token id 11 at position 1"),
        (datum([1, 2], target_tokens=[2, 3], weights=[1.0, math.nan]), "weights.*nan at position 1"),
        (datum([1, 2], target_tokens=[2, 3], logprobs=[-math.inf, 0.0]), "logprobs.*-inf at position 0"),
        (datum([1, 2], target_tokens=[2, 3], weights=[0.0, 0.0]), "0 trained tokens"),
        (datum([1, 2], target_tokens=[2, 3], weights=[1.0, -1.0]), "negative weight at position 1"),
        (datum([]), "model_input is empty"),
    ],
)
def test_a_bad_datum_is_named_by_index_and_position(bad, says):
    with pytest.raises(DatasetError, match=f"datum 1.*{says}"):
        validate_datums([GOOD, bad], 10)


def test_good_datums_pass_and_custom_losses_may_weigh_negatively():
    validate_datums([GOOD, datum([1, 2], target_tokens=[[2, 3], [4, 5]])], 10)
    validate_datums([datum([1, 2], target_tokens=[2, 3], weights=[1.0, -1.0])], 10, negative_weights=True)

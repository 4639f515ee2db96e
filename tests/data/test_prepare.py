import types

import numpy as np
import pytest

from local_tinker.data.batches import batches
from local_tinker.data.columns import rows_of_columns
from local_tinker.data.prepare import check_rows, to_units
from local_tinker.data.rows import Row, RowSource
from local_tinker.errors import DatasetError, UsageError
from local_tinker.types import Completion, Datum, ModelInput


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat("Name a colour.", "Blue."), chat("2+2?", "4"), chat("foo", "bar hello")]


def flat(prepared):
    return [
        (d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"].tolist(), d.loss_fn_inputs["weights"].tolist())
        for d in prepared.datums
    ]


def collated(rows):
    """What a default collate function makes of rows: lists of dicts turned inside out, strings in lists."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: collated([row[key] for row in rows]) for key in first}
    if isinstance(first, list):
        return [collated(list(values)) for values in zip(*rows, strict=True)]
    return list(rows)


def tensors(renderer, rows, side):
    """A padded batch as a Hugging Face collator makes it, from the renderer's own output."""
    encoded = [renderer.conversation(row["messages"]) for row in rows]
    width, pad = max(len(e.tokens) for e in encoded), renderer.tokenizer.pad_token_id
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in encoded:
        fill = width - len(e.tokens)
        labels = [token if on else -100 for token, on in zip(e.tokens, e.trained, strict=True)]
        for key, values, empty in (
            ("input_ids", e.tokens, pad),
            ("attention_mask", [1] * len(e.tokens), 0),
            ("labels", labels, -100),
        ):
            out[key].append([empty] * fill + values if side == "left" else values + [empty] * fill)
    return {key: np.array(value) for key, value in out.items()}


def test_the_same_rows_give_the_same_tokens_and_weights_by_every_road(renderer_of):
    renderer = renderer_of("chatml")
    want = flat(to_units(ROWS, renderer=renderer))
    assert len(want) == 3 and all(weights[-1] == 1.0 for *_, weights in want)
    columns = {"messages": [row["messages"] for row in ROWS]}
    sharegpt = [
        {"conversations": [{"from": "human", "value": m[0]["content"]}, {"from": "gpt", "value": m[1]["content"]}]}
        for m in columns["messages"]
    ]
    prepared = to_units(ROWS, renderer=renderer).datums
    tinker = [
        types.SimpleNamespace(
            model_input=d.model_input,
            loss_fn_inputs={k: types.SimpleNamespace(to_numpy=lambda v=v: v) for k, v in d.loss_fn_inputs.items()},
        )
        for d in prepared
    ]
    roads = {
        "columns": columns,
        "collated": collated(ROWS),
        "sharegpt": sharegpt,
        "alpaca": [{"instruction": m[0]["content"], "output": m[1]["content"]} for m in columns["messages"]],
        "message prompts": [{"prompt": m[:1], "completion": m[1:]} for m in columns["messages"]],
        "left": tensors(renderer, ROWS, "left"),
        "right": tensors(renderer, ROWS, "right"),
        "tokenised rows": [
            {k: v.tolist() for k, v in tensors(renderer, [row], "right").items() if k != "attention_mask"}
            for row in ROWS
        ],
        "datums": prepared,
        "tinker": tinker,
        "batches": next(iter(batches(ROWS, batch_size=3, shuffle=False))),
    }
    for name, batch in roads.items():
        assert flat(to_units(batch, renderer=renderer)) == want, name


def test_strings_and_text_rows_are_the_same(renderer_of):
    renderer = renderer_of("headers")
    assert flat(to_units(["a b", "c"], renderer=renderer)) == flat(to_units({"text": ["a b", "c"]}, renderer=renderer))


def test_a_tuple_of_strings_and_a_data_loader_of_prompts_work(renderer_of):
    renderer = renderer_of("chatml")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert flat(to_units(collated(rows), renderer=renderer)) == flat(to_units(tuple(rows), renderer=renderer))


def test_nested_collated_values_are_turned_back():
    rows = [
        {
            "id": i,
            "chosen": {"from": "gpt", "value": f"c{i}"},
            "messages": [{"role": "user", "content": f"q{i}", "tool_calls": [{"function": {"name": f"f{i}"}}]}],
        }
        for i in range(3)
    ]
    assert [dict(row) for row in rows_of_columns(collated(rows))] == rows
    assert [dict(row) for row in rows_of_columns({"messages": collated(rows)["messages"]})] == [
        {"messages": row["messages"]} for row in rows
    ]


def test_a_preference_is_one_unit_whose_sides_share_their_prompt(renderer_of):
    renderer = renderer_of("headers")
    pair = {"prompt": "foo", "chosen": "bar", "rejected": " hello"}
    messages = {
        "prompt": [{"role": "user", "content": "foo"}],
        "chosen": [{"role": "assistant", "content": "bar"}],
        "rejected": [{"role": "assistant", "content": "hello"}],
    }
    for row, prompt in ((pair, "foo"), (messages, messages["prompt"])):
        ((chosen, rejected),) = to_units([row], loss="dpo", renderer=renderer).units
        asked = renderer.generation_prompt(prompt)
        for side in (chosen, rejected):
            assert side.model_input.to_ints()[: len(asked)] == asked
            assert side.loss_fn_inputs["weights"].tolist().index(1.0) == len(asked) - 1
            assert int(side.loss_fn_inputs["target_tokens"][-1]) in renderer.stop_ids


def test_flat_datums_for_dpo_pair_up_and_an_odd_number_is_refused(renderer_of):
    renderer = renderer_of("chatml")
    question = {"role": "user", "content": "Name a colour."}
    rows = [{"messages": [question, {"role": "assistant", "content": answer}]} for answer in ("Blue.", "foo", "bar")]
    datums = to_units(rows, renderer=renderer).datums
    assert [len(unit) for unit in to_units(datums[:2], loss="dpo", renderer=renderer).units] == [2]
    assert len(to_units([tuple(datums[:2])], loss="dpo", renderer=renderer).units) == 1
    with pytest.raises(UsageError, match="odd number"):
        to_units(datums, loss="dpo", renderer=renderer)


def sample(text):
    return Completion(
        text, tokens=[3, 4], logprobs=[-1.0, -2.0], prompt_tokens=[1, 2], stop_reason="stop", weights_version="v"
    )


def test_completions_flat_or_in_groups_are_units_in_their_order(renderer_of):
    renderer = renderer_of("chatml")
    flat_units = to_units([sample("a"), sample("b")], loss="grpo", renderer=renderer)
    grouped = to_units([[sample("a")], [sample("b")]], loss="grpo", renderer=renderer)
    assert flat(flat_units) == flat(grouped) == [([1, 2, 3], [2, 3, 4], [0.0, 1.0, 1.0])] * 2
    with pytest.raises(UsageError, match="not their text"):
        to_units(["a", "b"], loss="grpo", renderer=renderer)


@pytest.mark.parametrize(
    "batch", [[], "text", 3, None, [1, 2], ["a", {"text": "b"}], {"text": "a"}, {"text": []}, [None], ROWS[0]]
)
def test_what_is_no_batch_is_refused(renderer_of, batch):
    with pytest.raises(UsageError):
        to_units(batch, renderer=renderer_of("chatml"))


def test_columns_of_unequal_length_are_refused(renderer_of):
    with pytest.raises(DatasetError, match="prompt 2, completion 1"):
        to_units({"prompt": ["a", "b"], "completion": ["c"]}, renderer=renderer_of("chatml"))


# Lengths


def row(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_rows_over_the_length_are_dropped_counted_and_said(renderer_of):
    renderer, said = renderer_of("chatml"), []
    rows = [row("2 2 2 2", "4"), row("2", "4")]
    long, short = (len(renderer.prompt_completion(**r).tokens) for r in rows)
    prepared = to_units(rows, renderer=renderer, max_length=short, say=said.append)
    assert (len(prepared.units), prepared.dropped, prepared.kept) == (1, 1, [1])
    assert prepared.metrics == {"dropped_rows": 1.0} and to_units(rows[1:], renderer=renderer).metrics == {}
    first = f"dropped and counted; the first is row 0 of the batch, with {long} tokens, over max_length={short}"
    assert any(first in message for message in said)


def test_a_row_of_exactly_the_length_is_kept_whole(renderer_of):
    renderer = renderer_of("chatml")
    tokens = len(renderer.prompt_completion("2 2", "4").tokens)
    assert to_units([row("2 2", "4")], renderer=renderer, max_length=tokens).dropped == 0
    assert to_units([row("2 2", "4")], renderer=renderer, max_length=tokens - 1).dropped == 1


def test_truncating_takes_the_prompt_from_the_left_keeps_bos_and_never_cuts_the_answer(renderer_of):
    renderer = renderer_of("headers")
    whole = renderer.prompt_completion("2 + 2 + 2 =", " 4 4")
    answer = len(whole.tokens) - whole.prompt_length
    limit = answer + 3
    prepared = to_units(
        [row("2 + 2 + 2 =", " 4 4"), row("=", " 4" * 40)],
        renderer=renderer,
        max_length=limit,
        overlong="truncate_prompt",
    )
    assert (prepared.truncated, prepared.dropped, prepared.kept) == (1, 1, [0])
    (datum,) = prepared.datums
    ids = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"][-1])]
    assert ids == [whole.tokens[0], *whole.tokens[-(limit - 1) :]]
    assert datum.loss_fn_inputs["weights"].sum() == answer


def test_truncating_cuts_both_sides_of_a_pair_alike(renderer_of):
    renderer = renderer_of("chatml")
    pair = {"prompt": "2 + 2 + 2 =", "chosen": " 4 4 4", "rejected": " 4"}
    limit = len(renderer.prompt_completion(pair["prompt"], pair["chosen"]).tokens) - 2
    ((chosen, rejected),) = to_units(
        [pair], loss="dpo", renderer=renderer, max_length=limit, overlong="truncate_prompt"
    ).units
    assert chosen.length + 1 == limit
    prompts = [
        d.model_input.to_ints()[: d.loss_fn_inputs["weights"].tolist().index(1.0) + 1] for d in (chosen, rejected)
    ]
    assert prompts[0] == prompts[1]


def test_overlong_error_gives_the_token_count_and_the_line(renderer_of):
    long = Row(row("2" + " 2" * 300, "4"), source=RowSource("x.jsonl", 4))
    with pytest.raises(DatasetError, match=r"x\.jsonl, line 4: 303 tokens, over max_length=50"):
        to_units([long], renderer=renderer_of("chatml"), max_length=50, overlong="error")


def test_datums_and_completions_over_the_length_are_refused_not_dropped(renderer_of):
    renderer = renderer_of("chatml")
    datum = Datum(ModelInput.from_ints([1] * 9), {"target_tokens": [1] * 9, "weights": [1.0] * 9})
    with pytest.raises(DatasetError, match="datum 0.*10 tokens, over max_length=9"):
        to_units([datum], renderer=renderer, max_length=9)
    assert len(to_units([datum], renderer=renderer, max_length=10).units) == 1


@pytest.mark.parametrize("options", [{"overlong": "cut"}, {"max_length": 1}, {"max_length": True}])
def test_unknown_length_options_are_refused(renderer_of, options):
    with pytest.raises(UsageError):
        to_units(["a"], renderer=renderer_of("chatml"), **options)


def test_what_is_read_and_what_is_ignored_is_said_once_over_many_calls(renderer_of):
    renderer, said = renderer_of("chatml"), []
    for _ in range(3):
        to_units([{"text": "a", "id": 1}], renderer=renderer, say=said.append)
    assert said == ["read as text (text): 1 rows", "columns not used: id"]


def test_a_row_without_a_file_is_named_by_its_place_in_the_batch(renderer_of):
    with pytest.raises(DatasetError, match="row 1 of the batch, field 'text'"):
        to_units([{"text": "a"}, {"text": 2}], renderer=renderer_of("chatml"))


def test_a_row_of_several_turns_may_give_several_units(renderer_of):
    renderer = renderer_of("thinking")
    two = {"messages": [*chat("a", "<think>x</think>b")["messages"], *chat("c", "d")["messages"]]}
    prepared = check_rows([chat("a", "b"), two], renderer=renderer)
    assert prepared.kept == [0, 1, 1]


def test_labels_that_mask_the_stop_token_are_said(renderer_of):
    renderer, said = renderer_of("chatml"), []
    to_units({"input_ids": [[5, 6, renderer.eos_id]], "labels": [[-100, 6, -100]]}, renderer=renderer, say=said.append)
    assert any("no stop token" in message for message in said)


def test_plain_strings_on_a_model_with_a_chat_template_are_announced_once(renderer_of):
    said = []
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]
    renderer = renderer_of("chatml")
    to_units(rows, renderer=renderer, say=said.append)
    to_units(rows, renderer=renderer, say=said.append)
    assert sum("trained as plain text; the model has a chat template" in line for line in said) == 1
    plain = []
    to_units(rows, renderer=renderer_of("no_template"), say=plain.append)
    assert not any("trained as plain text" in line for line in plain)

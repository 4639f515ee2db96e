import json

import pytest

from local_tinker.data.examples import Conversation, Preference, Prompt, PromptCompletion, Text
from local_tinker.data.formats import examples, recognise, to_example
from local_tinker.data.rows import Row, RowSource
from local_tinker.errors import DatasetError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"text": "a"}, Text("a")),
        ({"prompt": "q", "completion": "a"}, PromptCompletion("q", "a")),
        ({"prompt": "", "completion": "a"}, PromptCompletion("", "a")),
        ({"prompt": [U], "completion": [A]}, Conversation([U, A], context=1)),
        ({"messages": [U, A]}, Conversation([U, A])),
        ({"messages": json.dumps([U, A])}, Conversation([U, A])),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, Conversation([U, A])),
        ({"question": "q", "answer": "a"}, Conversation([U, A])),
        ({"instruction": "q", "output": "a", "input": ""}, Conversation([U, A])),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["h", "i"]]},
            Conversation(
                [
                    system("s"),
                    {"role": "user", "content": "h"},
                    {"role": "assistant", "content": "i"},
                    {"role": "user", "content": "q\n\nx"},
                    A,
                ]
            ),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Conversation([system("s"), U, A]),
        ),
        ({"conversations": [U, A], "tools": '[{"name": "f"}]'}, Conversation([U, A], [{"name": "f"}])),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            Conversation(
                [
                    U,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    },
                    {"role": "tool", "content": "r"},
                    A,
                ]
            ),
        ),
    ],
)
def test_each_supervised_shape_becomes_its_example(row, want):
    assert to_example(row) == want


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "q", "chosen": " a", "rejected": " b"}, Preference("q", " a", " b")),
        ({"prompt": "q", "chosen": "q a", "rejected": "q b"}, Preference("q", " a", " b")),
        ({"chosen": "Human: q Bot: yes", "rejected": "Human: q Bot: yet"}, Preference("Human: q Bot:", " yes", " yet")),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, Preference([U], [A], [B])),
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, B]}, Preference([U], [A], [B])),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, Preference([U], [A], [B])),
        ({"chosen": [U, A, U, A], "rejected": [U, A, U, B]}, Preference([U, A, U], [A], [B])),
        ({"prompt": [U], "chosen": [U, A], "rejected": [U, B]}, Preference([U], [A], [B])),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            Preference([U], [A], [B]),
        ),
    ],
)
def test_each_preference_shape_becomes_prompt_chosen_and_rejected(row, want):
    assert to_example(row, "dpo") == want


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same"),
        ({"chosen": [U, A], "rejected": [U, A]}, "the same"),
        ({"chosen": [U, A], "rejected": [{"role": "user", "content": "other"}, B]}, "prompts differ"),
        ({"chosen": "x a", "rejected": "y b"}, "prompts differ"),
        ({"prompt": "other", "chosen": [U, A], "rejected": [U, B]}, "prompt disagrees"),
        ({"prompt": "q", "chosen": "a", "rejected": 0.5}, "expected an answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "nothing to train"),
        ({"prompt": [U], "chosen": "a", "rejected": "b"}, "prompt is a message list"),
        ({"prompt": "q", "chosen": "a"}, "lacks rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "'rejected' is null; fill it in, or leave the row out"),
        ({"prompt": "q", "completion": "a"}, "they fit loss 'sft'"),
    ],
)
def test_preferences_that_prefer_nothing_are_refused(row, says):
    with pytest.raises(DatasetError, match=says):
        to_example(row, "dpo")


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "q", "answer": "4"}, Prompt("q")),
        ({"prompt": [U]}, Prompt([U])),
        ({"question": "q", "answer": "a"}, Prompt([U])),
        ({"messages": [U, A]}, Prompt([U])),
    ],
)
def test_policy_losses_read_the_prompt_alone(row, want):
    assert to_example(row, "grpo") == want


def test_the_loss_decides_between_shapes_in_one_row():
    row = {"prompt": "q", "chosen": [U, A], "rejected": [U, B], "messages": [U, A], "score_chosen": 9.0}
    assert recognise(row, "sft") == "messages"
    assert recognise(row, "dpo") == "prompt+chosen+rejected"
    assert recognise(row, "grpo") == "prompt"


def test_a_second_shape_is_ignored_when_it_says_the_same_and_refused_when_it_does_not():
    alpaca = {"instruction": "q", "input": "", "output": "a", "text": "Below is a task.\nq\n### Response: a"}
    said = []
    assert examples([alpaca], say=said.append) == [Conversation([U, A])]
    assert said == ["read as alpaca (instruction, output, input): 1 rows", "columns not used: text"]
    with pytest.raises(DatasetError, match="ambiguous: read as alpaca, but the column 'text'"):
        to_example({**alpaca, "text": "unrelated"})


def test_rows_of_another_shape_than_the_first_are_refused_at_their_line():
    rows = [Row({"text": "a"}), Row({"prompt": "p", "completion": "c"}, source=RowSource("x.jsonl", 9))]
    with pytest.raises(DatasetError, match=r"x\.jsonl, line 9: mixed rows: .* text, this one is prompt\+completion"):
        examples(rows)


def test_an_unknown_shape_names_the_columns_the_nearest_shape_and_a_mapping():
    with pytest.raises(DatasetError) as caught:
        recognise({"prompts": "q", "completions": "a", "id": 3})
    text = str(caught.value)
    assert "prompts, completions, id" in text
    assert "Nearest: prompt+completion, which lacks prompt, completion" in text
    assert 'rows = [{"prompt": row["prompts"], "completion": row["completions"]} for row in rows]' in text


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"prompt": "q", "completion": [A]}, "completion", "both be strings"),
        ({"prompt": "q", "completion": ""}, "completion", "nothing to train"),
        ({"instruction": "q", "output": None}, None, "'output' is null"),
        ({"messages": "hello"}, "messages", "got a string"),
        ({"messages": [U, "a"]}, "messages[1]", "got str"),
        ({"messages": [{"content": "q"}]}, "messages[0]", "needs role and content"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "messages[1].weight", "weight must be 0 or 1"),
        ({"messages": [U, {**A, "weight": 0}]}, "messages", "0 trained tokens"),
        ({"prompt": [U], "completion": [U]}, "completion", "0 trained tokens"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
         "conversations[1].value", "not valid JSON"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "messages[1].tool_calls[0]", "needs a name"),
        ({"messages": [U, A], "tools": "look"}, "tools", "not valid JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A]},
         "messages[0].content[0]", "images not supported"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_field(row, field, says):
    with pytest.raises(DatasetError, match=says) as caught:
        to_example(Row(row, source=RowSource("x.jsonl", 2)))
    assert caught.value.field == field
    assert str(caught.value).startswith("x.jsonl, line 2")

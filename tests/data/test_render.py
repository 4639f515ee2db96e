import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.data.render import Renderer
from local_tinker.errors import DatasetError, ModelError


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [user("Hi"), bot("Hello!"), user("2+2?"), bot("4")]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "[[Hello!<|im_end|>]]\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]",
        ),
        (
            "headers",
            "<|bos|><|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n[[Hello!<|eot|>]]"
            "<|start|>user<|end|>\n\n2+2?<|eot|><|start|>assistant<|end|>\n\n[[4<|eot|>]]",
        ),
        (
            "always_asks",
            "<|bos|><|start|>user<|end|>\n\nHi<|eot|><|start|>assistant<|end|>\n\n[[Hello!<|eot|>]]"
            "<|start|>user<|end|>\n\n2+2?<|eot|><|start|>assistant<|end|>\n\n[[4<|eot|>]]",
        ),
        (
            "strict",
            "<bos><turn>user\nHi</turn>\n<turn>model\n[[Hello!</turn>]]\n"
            "<turn>user\n2+2?</turn>\n<turn>model\n[[4</turn>]]",
        ),
        (
            "bosless_template",
            "<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "[[Hello!<|im_end|>]]\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]",
        ),
        # The first answer is ended by the marker of the next turn, the last by nothing: EOS is put there.
        ("endless", "<|user|>\nHi<|assistant|>\n[[Hello!<|user|>]]\n2+2?<|assistant|>\n[[4<|eos|>]]"),
        (
            "no_template",
            "User:\nHi\n\nAssistant:\n[[Hello!<|eos|>]]\n\nUser:\n2+2?\n\nAssistant:\n[[4<|eos|>]]",
        ),
        (
            "no_template_bos",
            "<s>User:\nHi\n\nAssistant:\n[[Hello!</s>]]\n\nUser:\n2+2?\n\nAssistant:\n[[4</s>]]",
        ),
    ],
)
def test_the_trained_text_is_what_follows_each_generation_prompt_through_its_stop(renderer_of, shown, kind, text):
    renderer = renderer_of(kind)
    assert shown(renderer, renderer.conversation(CHAT)) == text


ALL = ["chatml", "headers", "always_asks", "strict", "thinking", "endless", "no_template", "no_template_bos", "inst"]


@pytest.mark.parametrize("kind", ALL)
def test_every_trained_run_ends_with_a_stop_token_and_holds_no_other(renderer_of, kind):
    renderer = renderer_of(kind)
    encoded = renderer.conversation(CHAT)
    assert len(encoded.parts) == 2
    for start, stop in encoded.parts:
        assert [i in renderer.stop_ids for i in encoded.tokens[start:stop]].index(True) == stop - start - 1


@pytest.mark.parametrize("kind", ["headers", "strict", "no_template_bos", "bosless_template", "inst"])
def test_bos_stands_once_at_the_front_in_training_and_in_prompts(renderer_of, kind):
    renderer = renderer_of(kind)
    bos = renderer.tokenizer.bos_token_id
    for ids in (
        renderer.conversation(CHAT).tokens,
        renderer.generation_prompt(CHAT[:1]),
        renderer.generation_prompt("Hi"),
        renderer.text("Hi").tokens,
        renderer.text(renderer.tokenizer.bos_token + "Hi").tokens,
        renderer.prompt_completion("Hi", " there").tokens,
    ):
        assert ids[0] == bos and ids.count(bos) == 1


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(ALL),
    texts=st.lists(st.text(alphabet="foobar \n2+é.:A<|>", min_size=1).filter(str.strip), min_size=2, max_size=6),
)
def test_the_generation_prompt_is_what_training_puts_before_the_answer(session_renderers, kind, texts):
    renderer = session_renderers(kind)
    texts = texts[: len(texts) // 2 * 2]
    messages = [(bot if i % 2 else user)(text) for i, text in enumerate(texts)]
    sequences = renderer.turns(messages)
    for index in range(1, len(messages), 2):
        asked = renderer.generation_prompt(messages[:index])
        assert any(
            sequence.tokens[: len(asked)] == asked and any(start == len(asked) for start, _ in sequence.parts)
            for sequence in sequences
        )


def test_a_token_never_spans_the_boundary_of_prompt_and_completion(renderer_of):
    renderer = renderer_of("no_template")
    token = renderer.tokenizer
    merged = token("foobar", add_special_tokens=False)["input_ids"]
    apart = [token(text, add_special_tokens=False)["input_ids"] for text in ("foo", "bar")]
    assert len(merged) == 1  # else this test shows nothing
    encoded = renderer.prompt_completion("foo", "bar")
    assert encoded.tokens == [*apart[0], *apart[1], token.eos_token_id]
    assert encoded.trained == [False] * len(apart[0]) + [True] * (len(apart[1]) + 1)


def test_an_answer_that_begins_with_a_newline_does_not_merge_into_the_generation_prompt(renderer_of):
    renderer = renderer_of("chatml")
    encoded = renderer.conversation([user("Hi"), bot("\n\nHello")])
    asked = renderer.generation_prompt([user("Hi")])
    assert encoded.tokens[: len(asked)] == asked
    assert renderer.decode(encoded.tokens[len(asked) :]) == "\n\nHello<|im_end|>"


def test_a_space_prefixing_tokenizer_puts_no_extra_space_before_a_completion(renderer_of):
    renderer = renderer_of("inst")
    encoded = renderer.prompt_completion("foo bar", "foo")
    whole = renderer.tokenizer.decode(renderer.tokenizer("foo barfoo")["input_ids"])
    assert renderer.decode(encoded.tokens) == whole + "</s>"
    assert renderer.decode(renderer.prompt_completion("foo bar", " foo").tokens).endswith("foo bar foo</s>")


def test_eos_ends_a_completion_and_a_text_exactly_once(renderer_of):
    renderer = renderer_of("chatml")
    eos = renderer.eos_id
    plain = renderer.prompt_completion("a", "b").tokens
    for written in ("b<|im_end|>", "b<|im_end|>\n", "b<|im_end|><|im_end|>"):
        assert renderer.prompt_completion("a", written).tokens == plain
    assert renderer.text("a b<|im_end|>").tokens == renderer.text("a b").tokens
    assert plain.count(eos) == 1 and plain[-1] == eos


def test_of_a_text_every_token_but_the_first_is_trained_its_eos_included(renderer_of):
    renderer = renderer_of("chatml")  # pad and EOS are one token here
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    encoded = renderer.text("hello world")
    assert encoded.trained == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.tokens[-1] == renderer.eos_id


def test_a_template_that_rewrites_history_gives_one_sequence_a_turn(renderer_of, shown):
    renderer = renderer_of("thinking")
    chat = [user("Hi"), bot("<think>hm</think>Hello!"), user("2+2?"), bot("<think>sum</think>4")]
    first, second = renderer.turns(chat)
    assert shown(renderer, first) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<think>\nhm\n</think>\n\nHello!<|im_end|>]]"
    )
    assert shown(renderer, second) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nsum\n</think>\n\n4<|im_end|>]]"
    )
    with pytest.raises(DatasetError, match="not prefix-preserving"):
        renderer.conversation(chat)
    renderer.turns(chat)
    said = renderer.notices.take()
    assert sum("sequence of its own" in message for message in said) == 1


def test_a_generation_prompt_that_no_rendered_answer_begins_with_is_refused(renderer_of):
    with pytest.raises(DatasetError, match="generation prompt is not how it begins"):
        renderer_of("forced").turns([user("Hi"), bot("Hello!")])


def test_context_turns_and_turns_of_weight_zero_are_not_trained(renderer_of, shown):
    renderer = renderer_of("strict")
    given = [user("Hi"), bot("Hello!", weight=0), user("2+2?"), bot("4")]
    text = "<bos><turn>user\nHi</turn>\n<turn>model\nHello!</turn>\n<turn>user\n2+2?</turn>\n<turn>model\n[[4</turn>]]"
    assert shown(renderer, renderer.conversation(given)) == text
    assert shown(renderer, renderer.conversation(CHAT, context=2)) == text
    with pytest.raises(DatasetError, match="0 trained tokens"):
        renderer.conversation([user("Hi"), bot("Hello!", weight=0)])


def test_what_follows_the_last_trained_turn_is_left_out(renderer_of):
    renderer = renderer_of("chatml")
    assert renderer.conversation([*CHAT, user("And?")]) == renderer.conversation(CHAT)


def test_an_opening_answer_that_cannot_be_asked_for_is_context(renderer_of, shown):
    renderer = renderer_of("chatml")  # its template reads messages[0]
    encoded = renderer.conversation([bot("Welcome."), user("Hi"), bot("Hello!")])
    assert len(encoded.parts) == 1 and shown(renderer, encoded).endswith("[[Hello!<|im_end|>]]")
    assert any("opening assistant turn" in message for message in renderer.notices.take())


def test_a_stop_token_the_model_does_not_list_is_found_in_the_template(renderer_of):
    renderer = renderer_of("headers", stop_ids={1})
    end = renderer.tokenizer.convert_tokens_to_ids("<|eot|>")
    assert renderer.stop_ids == {1, renderer.eos_id, end}
    assert any("'<|eot|>'" in message for message in renderer.notices.take())


def test_the_built_in_template_is_announced_and_can_be_saved(renderer_of, tokenizer_of):
    renderer = renderer_of("no_template_bos")
    assert renderer.template_origin == "built-in"
    assert any("no chat template" in message for message in renderer.notices.take())
    text = tokenizer_of("no_template_bos").apply_chat_template(
        CHAT[:1], chat_template=renderer.template, tokenize=False, add_generation_prompt=True
    )
    assert text == "<s>User:\nHi\n\nAssistant:\n"
    assert renderer_of("chatml").template_origin == "model"


def test_tool_calls_and_tools_are_rendered_and_results_are_not_trained(renderer_of, shown):
    renderer = renderer_of("thinking")
    chat = [user("Up?"), bot("", tool_calls=[CALL]), {"role": "tool", "content": "blue"}, bot("It is blue.")]
    text = shown(renderer, renderer.conversation(chat, [TOOL]))
    assert '[[<call>{"name": "look", "arguments": {"at": "sky"}}</call><|im_end|>]]' in text
    assert "<|im_start|>tool\nblue<|im_end|>" in text and text.endswith("[[It is blue.<|im_end|>]]")
    assert '"description": "Looks."' in text


@pytest.mark.parametrize(
    ("messages", "tools", "says"),
    [
        ([user("a"), bot("b", tool_calls=[CALL])], None, "drops a tool call"),
        ([user("a"), bot("b")], [TOOL], "drops the tools"),
        ([user("a"), bot("b", reasoning_content="because")], None, "drops the reasoning"),
    ],
)
def test_a_template_that_drops_a_field_is_an_error(renderer_of, messages, tools, says):
    with pytest.raises(DatasetError, match=says):
        renderer_of("chatml").turns(messages, tools)


def test_a_dropped_message_is_an_error(tokenizer_of):
    import copy

    tokenizer = copy.copy(tokenizer_of("chatml"))
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'tool' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DatasetError, match="drops the tool message"):
        Renderer(tokenizer).turns([user("a"), {"role": "tool", "content": "zz"}, bot("b")])


@pytest.mark.parametrize("kind", ["chatml", "headers", "strict", "inst"])
def test_special_token_text_in_any_message_is_plain_text(renderer_of, kind):
    renderer = renderer_of(kind)
    special = renderer.tokenizer.all_special_ids
    names = " ".join(renderer.tokenizer.all_special_tokens)
    clean = renderer.conversation([user("Say x"), bot("x y")])
    dirty = renderer.conversation([user(f"Say {names}"), bot(f"x {names} y")])
    assert [i for i in dirty.tokens if i in special] == [i for i in clean.tokens if i in special]
    assert renderer.decode(dirty.tokens).count(names) == 2


def test_a_tokenizer_without_eos_is_refused_when_an_answer_must_end(tokenizer_of):
    import copy

    tokenizer = copy.deepcopy(tokenizer_of("no_template"))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        Renderer(tokenizer).prompt_completion("a", "b")

"""Tiny tokenizers made here: byte-level and space-prefixing ones, with chat templates of the usual kinds."""

import functools

import pytest

CORPUS = [
    "foobar foobar foobar foo bar Assistant: User: assistant user system Name a colour. Blue. hello world 2+2 = 4\n"
] * 4

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
ALWAYS_ASKS = HEADERS.replace("{% if add_generation_prompt %}", "{% if true %}")
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
THINKING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set r = m['reasoning_content'] or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set c = c.split('</think>')[-1] | trim %}{% endif %}"
    "{% if loop.index0 > ns.last and r %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% for t in m['tool_calls'] or [] %}<call>{{ t['function'] | tojson }}</call>{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The next turn's marker is what ends an answer, and nothing ends the last.
ENDLESS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The generation prompt opens a thought that the rendered answer does not hold.
FORCED = CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}"
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
HEADER_TOKENS = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|eot|>"]
KINDS = {
    # name: (chat template, special tokens, bos, eos, pad, BOS added by itself, space put before a text)
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>", False, False),
    "headers": (HEADERS, HEADER_TOKENS, "<|bos|>", "<|eos|>", "<|eos|>", True, False),
    "always_asks": (ALWAYS_ASKS, HEADER_TOKENS, "<|bos|>", "<|eos|>", None, True, False),
    "strict": (STRICT, ["<bos>", "<eos>", "<turn>", "</turn>", "<pad>"], "<bos>", "<eos>", "<pad>", True, False),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>", "<|pad|>"], None, "<|im_end|>", "<|pad|>", False, False),
    "endless": (ENDLESS, ["<|eos|>", "<|user|>", "<|assistant|>"], None, "<|eos|>", None, False, False),
    "forced": (FORCED, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", None, False, False),
    "inst": (INST, ["<s>", "</s>"], "<s>", "</s>", None, True, True),
    "no_template": (None, ["<|eos|>"], None, "<|eos|>", None, False, False),
    "no_template_bos": (None, ["<s>", "</s>"], "<s>", "</s>", None, True, False),
    "bosless_template": (CHATML, ["<s>", "<|im_start|>", "<|im_end|>"], "<s>", "<|im_end|>", None, True, False),
}  # fmt: skip


@functools.cache
def build(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    template, specials, bos, eos, pad, adds_bos, spaced = KINDS[kind]
    core = Tokenizer(models.BPE(unk_token="?" if spaced else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if spaced:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    core.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        place = core.token_to_id(bos)
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, place)])
    named = {key: value for key, value in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)) if value}
    others = [token for token in specials if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, additional_special_tokens=others, **named
    )


@pytest.fixture(scope="session")
def tokenizer_of():
    return build


def make_renderer(kind, **options):
    from local_tinker.data.render import Renderer

    tokenizer = build(kind)
    if kind == "endless":
        options.setdefault("stop_ids", {tokenizer.convert_tokens_to_ids("<|user|>")})
    return Renderer(tokenizer, **options)


@pytest.fixture
def renderer_of():
    """A new Renderer over one of the tokenizers; what it says is its own."""
    return make_renderer


@pytest.fixture(scope="session")
def session_renderers():
    """One Renderer a kind, for tests of many examples."""
    return functools.cache(make_renderer)


@pytest.fixture
def shown():
    """An encoded sequence as text with the trained runs in [[ ]]."""

    def show(renderer, encoded):
        out, position = [], 0
        for start, stop in encoded.parts:
            out.append(renderer.decode(encoded.tokens[position:start]))
            out.append(f"[[{renderer.decode(encoded.tokens[start:stop])}]]")
            position = stop
        return "".join([*out, renderer.decode(encoded.tokens[position:])])

    return show

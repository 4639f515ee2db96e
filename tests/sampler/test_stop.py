import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.errors import UsageError
from local_tinker.sampler.stop import Detokenizer, StopMatcher, StopRules, decode, stop_rules
from tests.sampler.toy import byte_tokenizer, fallback_tokenizer

SMILE = "😀".encode()
MERGED = ("...", "Hello", "llo", "你".encode()[1:], " the", "END", SMILE[:3])
BYTES = byte_tokenizer(merged=MERGED)
FALLBACK = fallback_tokenizer()
EOS = BYTES.convert_tokens_to_ids("<eos>")
TOOL = BYTES.convert_tokens_to_ids("<tool>")


def ids(text):
    return list(text.encode())


def token(piece):
    """The id of a merged piece; ids 0..255 are the bytes."""
    return 256 + MERGED.index(piece)


def run(tokens, rules, tokenizer=BYTES, **options):
    """(tokens used, text, stopped) of the incremental matcher; the pieces must join to the text."""
    matcher, pieces = StopMatcher(rules, tokenizer, **options), []
    for count, one in enumerate(tokens, 1):
        stopped, piece = matcher.push(one)
        pieces.append(piece)
        if stopped:
            return count, "".join(pieces), True
    return len(tokens), "".join(pieces) + matcher.finish(), False


def run_naively(tokens, rules, tokenizer=BYTES):
    """The same by decoding everything after every token."""
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] in rules.stop_ids:
            return count, decode(tokenizer, tokens[: count - 1]), True
        text = decode(tokenizer, tokens[:count])
        starts = [text.index(s) for s in rules.stop_strings if s in text]
        if starts:
            return count, text[: min(starts)], True
    return len(tokens), decode(tokenizer, tokens), False


# ---- what the user's stop means


def test_none_is_the_models_ids_and_an_empty_list_is_nothing():
    assert stop_rules(None, model_stop_ids=[5, 9]) == StopRules(frozenset({5, 9}))
    assert stop_rules(None, model_stop_ids=7) == StopRules(frozenset({7}))
    assert stop_rules(None, model_stop_ids=None) == StopRules()
    assert stop_rules([], model_stop_ids=[5]) == StopRules()


def test_strings_and_ids_stop_besides_the_models_own():
    assert stop_rules("\n\n", model_stop_ids=5) == StopRules(frozenset({5}), ("\n\n",))
    assert stop_rules(["a", 3, "b", "a"], model_stop_ids=[5]) == StopRules(frozenset({3, 5}), ("a", "b"))
    assert stop_rules(3, model_stop_ids=None) == StopRules(frozenset({3}))


@pytest.mark.parametrize(
    ("stop", "said"), [("", "empty"), ([""], "empty"), ([1.5], "1.5"), ([True], "True"), (-1, "-1")]
)
def test_what_cannot_stop_is_refused_by_value(stop, said):
    with pytest.raises(UsageError, match=said):
        stop_rules(stop, model_stop_ids=None)


# ---- where a completion ends


def test_a_stop_id_ends_it_and_its_token_is_not_in_the_text():
    assert run([*ids("hi"), EOS, *ids("more")], StopRules(frozenset({EOS}))) == (3, "hi", True)
    assert run([EOS], StopRules(frozenset({EOS}))) == (1, "", True)


def test_either_of_two_stop_ids_ends_it():
    rules = StopRules(frozenset({EOS, TOOL}))
    assert run([*ids("a"), TOOL, EOS], rules) == (2, "a", True)
    assert run([*ids("a"), EOS, TOOL], rules) == (2, "a", True)


def test_no_rules_run_on_through_the_end_token_and_show_it():
    assert run([*ids("a"), EOS, *ids("b")], StopRules()) == (3, "a<eos>b", False)


def test_stop_text_inside_one_token_cuts_the_text_and_counts_the_token():
    dots = token("...")
    assert run([*ids("ab"), dots, *ids("c")], StopRules(stop_strings=("..",))) == (3, "ab", True)
    assert run([token("Hello")], StopRules(stop_strings=("ell",))) == (1, "H", True)


def test_stop_text_across_three_tokens():
    assert run([*ids("x"), *ids("END"), *ids("y")], StopRules(stop_strings=("END",))) == (4, "x", True)


def test_stop_text_at_the_first_token_leaves_empty_text():
    assert run([token("END"), *ids("y")], StopRules(stop_strings=("END",))) == (1, "", True)


def test_overlapping_beginnings_of_a_stop_string_are_not_lost():
    assert run(ids("aab" + "c"), StopRules(stop_strings=("ab",))) == (3, "a", True)
    assert run(ids("ababac"), StopRules(stop_strings=("abac",))) == (6, "ab", True)
    assert run(ids("ababad"), StopRules(stop_strings=("abac",))) == (6, "ababad", False)


def test_of_several_stop_strings_the_first_in_the_text_counts():
    assert run(ids("one two"), StopRules(stop_strings=("two", "ne t"))) == (5, "o", True)
    assert run([token("Hello")], StopRules(stop_strings=("llo", "e"))) == (1, "H", True)


def test_a_stop_character_split_over_tokens():
    assert run([*ids("a"), *SMILE, *ids("b")], StopRules(stop_strings=("😀",))) == (5, "a", True)
    assert run([*ids("a"), token(SMILE[:3]), SMILE[3], *ids("b")], StopRules(stop_strings=("😀b",))) == (4, "a", True)


def test_a_stop_string_longer_than_the_output_is_shown_as_text_at_the_end():
    assert run(ids("abc"), StopRules(stop_strings=("abcdef",))) == (3, "abc", False)


def test_special_tokens_other_than_the_final_one_stay_in_the_text_unless_skipped():
    tokens = [*ids("a"), TOOL, *ids("b"), EOS]
    rules = StopRules(frozenset({EOS}))
    assert run(tokens, rules) == (4, "a<tool>b", True)
    assert run(tokens, rules, skip_special_tokens=True) == (4, "ab", True)


def test_a_special_token_can_be_a_stop_string():
    assert run([*ids("a"), TOOL, *ids("b")], StopRules(stop_strings=("<tool>",))) == (2, "a", True)


def test_a_byte_fallback_newline_stops_at_once():
    newline = FALLBACK.convert_tokens_to_ids("<0x0A>")
    word = FALLBACK.convert_tokens_to_ids("\u2581the")
    assert run([word, newline, word], StopRules(stop_strings=("\n",)), FALLBACK) == (2, "the", True)


def test_text_that_may_begin_a_stop_string_is_held_until_it_is_known():
    matcher = StopMatcher(StopRules(stop_strings=("END",)), BYTES)
    shown = [matcher.push(t) for t in ids("xENyEND")]
    assert shown == [(False, "x"), (False, ""), (False, ""), (False, "ENy"), (False, ""), (False, ""), (True, "")]


def test_matching_with_stop_ids_and_held_text_shows_the_held_text():
    rules = StopRules(frozenset({EOS}), ("END",))
    assert run([*ids("xEN"), EOS], rules) == (4, "xEN", True)


SMALL = st.lists(st.sampled_from([*ids("abEND. "), token("..."), token("END"), EOS]), max_size=20)


@settings(max_examples=300, deadline=None)
@given(SMALL, st.lists(st.text("abEND.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_matcher_agrees_with_decoding_everything_each_time(tokens, stops):
    rules = StopRules(frozenset({EOS}), tuple(stops))
    assert run(tokens, rules) == run_naively(tokens, rules)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, len(FALLBACK) - 1) | st.sampled_from([0x0B, 0x42, 260, 258]), max_size=14),
    st.lists(st.sampled_from(["\n", "a", " the", "b\n", "A", "ing.", "c d"]), min_size=1, max_size=2),
)
def test_the_matcher_agrees_with_decoding_everything_for_byte_fallback(tokens, stops):
    rules = StopRules(stop_strings=tuple(stops))
    assert run(tokens, rules, FALLBACK) == run_naively(tokens, rules, FALLBACK)


# ---- text without half characters


def stream(tokenizer, tokens, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(t) for t in tokens), detokenizer.finish()]


ZWJ = "👩‍👩‍👧 ñ 你好 é\u0301 🇫🇷!"


def test_a_stream_never_shows_half_a_character():
    pieces = stream(BYTES, ids(ZWJ))
    assert "".join(pieces) == ZWJ
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:5] == ["", "", "", "👩", ""]


def test_broken_bytes_show_as_replacement_characters_where_the_tokens_hold_them():
    assert "".join(stream(BYTES, [0xE4, 0x41, 0xFF])) == "\ufffdA\ufffd"
    assert stream(BYTES, [0x41, 0xE4, 0xBD]) == ["A", "", "", "\ufffd"]


def test_spaces_between_words_survive_a_stripped_first_one():
    word = FALLBACK.convert_tokens_to_ids("\u2581the")
    space = FALLBACK.convert_tokens_to_ids("\u2581")
    assert stream(FALLBACK, [word, word, word]) == ["the", " the", " the", ""]
    assert "".join(stream(FALLBACK, [space, word, space, space, word])) == decode(
        FALLBACK, [space, word, space, space, word]
    )


def test_a_skipped_token_does_not_end_a_run_of_byte_tokens():
    nul, broken = (FALLBACK.convert_tokens_to_ids(t) for t in ("<0x00>", "<0xFF>"))
    eos = FALLBACK.convert_tokens_to_ids("</s>")
    assert stream(FALLBACK, [nul, eos, broken], skip_special_tokens=True) == ["", "", "", "\ufffd\ufffd"]
    assert stream(FALLBACK, [nul, eos, broken]) == ["", "\x00</s>", "", "\ufffd"]


def test_ids_past_the_tokenizer_print_nothing():
    assert "".join(stream(BYTES, [*ids("a"), 9999, *ids("b")])) == "ab"


ANY_BYTES = st.lists(st.integers(0, len(BYTES) - 1), max_size=40)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).map(ids)


@settings(max_examples=400, deadline=None)
@given(ANY_BYTES | TEXTS, st.booleans())
def test_the_stream_joins_to_decoding_all_ids_of_a_byte_level_tokenizer(tokens, skip):
    joined = "".join(stream(BYTES, tokens, skip_special_tokens=skip))
    assert joined == decode(BYTES, tokens, skip_special_tokens=skip)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, len(FALLBACK) - 1) | st.integers(250, len(FALLBACK) - 1), max_size=30), st.booleans())
def test_the_stream_joins_to_decoding_all_ids_of_a_byte_fallback_tokenizer(tokens, skip):
    joined = "".join(stream(FALLBACK, tokens, skip_special_tokens=skip))
    assert joined == decode(FALLBACK, tokens, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_no_piece_of_real_text_holds_a_replacement_character(tokens):
    if "\ufffd".encode() not in bytes(tokens):
        assert not any("\ufffd" in piece for piece in stream(BYTES, tokens))

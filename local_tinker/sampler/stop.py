"""Where a completion ends: stop ids, stop strings, and token ids -> text without half characters. No torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not UTF-8, or not yet
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class StopRules:
    """What ends a completion besides its length; with both empty nothing does.

    Args:
        stop_ids: the token is kept in tokens and log-probs, and left out of the text.
        stop_strings: the text is cut before the first of them; tokens are kept up to the one that completed it.
    """

    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


def stop_rules(
    stop: str | int | Iterable[str | int] | None, *, model_stop_ids: Iterable[int] | int | None
) -> StopRules:
    """The user's `stop` -> rules.

    None: the model's own stop ids. Strings and ids: these besides the model's own. An empty list: nothing stops, not
    even the model's end token.

    Args:
        model_stop_ids: `eos_token_id` of the generation config, one id or a list.
    """
    if model_stop_ids is None:
        model_stop_ids = ()
    own = frozenset((model_stop_ids,) if isinstance(model_stop_ids, int) else (int(i) for i in model_stop_ids))
    if stop is None:
        return StopRules(own)
    items = parse_stop(stop)
    if not items:
        return StopRules()
    ids = own.union(i for i in items if isinstance(i, int))
    return StopRules(ids, tuple(dict.fromkeys(s for s in items if isinstance(s, str))))


def parse_stop(stop: Any) -> tuple[str | int, ...]:
    """A checked, flat form of the user's `stop`; raises `UsageError` on anything but strings and token ids."""
    if isinstance(stop, (str, int)) or not isinstance(stop, Iterable):
        stop = (stop,)
    return tuple(_stop_item(item) for item in stop)


def _stop_item(item: Any) -> str | int:
    if isinstance(item, str):
        if not item:
            raise UsageError(
                'stop holds an empty string, which would stop everywhere; give text, or stop=[] for "never stop"'
            )
        return item
    try:
        if isinstance(item, bool):
            raise TypeError
        index = operator.index(item)
    except TypeError:
        raise UsageError(f"stop takes strings and token ids, got {item!r} ({type(item).__name__})") from None
    if index < 0:
        raise UsageError(f"stop holds token id {index}; ids start at 0")
    return index


def decode(tokenizer: Any, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Text exactly as the tokens spell it: no tidying of spaces, special tokens visible unless skipped."""
    return tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Token ids -> text, piece by piece; the pieces and `finish()` join to `decode` of all ids.

    A piece never ends inside a character. Bytes that may still become one are held: at most one pending character with
    byte-level vocabularies; with byte-fallback ones (`<0x0A>` tokens) the whole run of byte tokens, because one bad
    byte there changes how the run's earlier bytes read.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        # Decoding is repeated over a short window only: `_context` tokens already told, then the ones still open.
        self._window: list[int] = []
        self._context = 0
        self._told = 0  # characters of the window's text already given out
        self._text = ""  # the window's text
        self._in_bytes = False

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain and was not given out before."""
        self._window.append(token)
        before, self._text = self._text, self._decode(self._window)
        # A token that prints nothing (skipped, or past the vocabulary) does not end a run of byte tokens.
        self._in_bytes = self._is_byte_token(token) or (self._in_bytes and self._text == before)
        if self._in_bytes:
            return ""
        open_end = self._text.endswith(REPLACEMENT)
        certain = len(self._text) - open_end
        new = self._text[self._told : certain]
        self._told = max(self._told, certain)
        if new and not open_end:
            self._advance()
        return new

    @property
    def pending(self) -> str:
        """How the held tokens read at present, less bytes that are no character yet; later tokens may change it."""
        held = self._text[self._told :]
        return held.rstrip(REPLACEMENT) if self._in_bytes else held.removesuffix(REPLACEMENT)

    def finish(self) -> str:
        """What was held, U+FFFD included where the tokens truly end in broken bytes."""
        rest = self._text[self._told :]
        self._told = len(self._text)
        return rest

    def _advance(self) -> None:
        # Some decoders strip the space of the first printed piece. The tokens that just printed stay as context: they
        # take this loss on themselves, and the following ones read as they do in the whole text.
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._text = self._decode(self._window)
        self._told = len(self._text)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens=self._skip)

    def _is_byte_token(self, token: int) -> bool:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(piece, str) and _BYTE_TOKEN.fullmatch(piece) is not None


class StopMatcher:
    """Says after each token whether a completion has ended, and which text may be shown.

    The pieces of `push` and `finish` join to the final text: that of all tokens without the final stop token, cut
    before the first stop string. Text that could be the beginning of a stop string is held back.
    """

    def __init__(self, rules: StopRules, tokenizer: Any, *, skip_special_tokens: bool = False) -> None:
        self._rules = rules
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._held = ""  # certain text not shown yet; a match cannot begin before it

    def push(self, token: int) -> tuple[bool, str]:
        """(ended, text to show) after one more token."""
        if token in self._rules.stop_ids:
            return True, self.finish()
        self._held += self._detokenizer.push(token)
        if not self._rules.stop_strings:
            return False, self._show(len(self._held))
        view = self._held + self._detokenizer.pending
        starts = [at for at in (view.find(stop) for stop in self._rules.stop_strings) if at >= 0]
        if starts:
            return True, view[: min(starts)]
        return False, self._show(min(self._safe(self._held), self._safe(view)))

    def finish(self) -> str:
        """The text still held, when the completion ends without a stop string."""
        self._held += self._detokenizer.finish()
        return self._show(len(self._held))

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def _safe(self, text: str) -> int:
        """Where the longest ending of `text` starts that is the beginning of a stop string."""
        safe = len(text)
        for stop in self._rules.stop_strings:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    safe = min(safe, len(text) - size)
                    break
        return safe

"""Where a completion ends by a stop string, found on its token ids.

A completion is over with the first token that completes a stop string in its text (the prompt's own text does not
count). It keeps the ids whose text ends before that string begins: an id whose text runs into the string is dropped
whole, no EOS is put in its place, and nothing is encoded again.
"""

from collections.abc import Sequence
from typing import Any

_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for bytes that are not yet a character


class StopStrings:
    """Looks for stop strings in growing completions.

    Args:
        tokenizer: turns ids into the text that is searched, special tokens included.
        strings: stop strings; without any, nothing is ever found.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._last = {s[-1] for s in self._strings}
        self._may_end: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._strings)

    def found(self, ids: Sequence[int]) -> bool:
        """Whether the newest id completes a stop string."""
        return bool(ids) and self._candidate(ids[-1]) and self._position(self._text(ids)) is not None

    def cut(self, ids: Sequence[int]) -> int | None:
        """How many ids are kept, or None where there is no stop string."""
        for length, token in enumerate(ids, 1):
            if not self._candidate(token):
                continue
            start = self._position(self._text(ids[:length]))
            if start is not None:
                kept = length - 1
                while len(self._text(ids[:kept])) > start:
                    kept -= 1
                return kept
        return None

    def _candidate(self, token: int) -> bool:
        """Whether an id can complete a stop string, by its own text: most cannot, and their text is not looked at."""
        if not self._strings:
            return False
        known = self._may_end.get(token)
        if known is None:
            text = self._text([token])
            # a decoder may drop blanks at the edges of a text, and an id may be the last byte of a character
            blank = any(c.isspace() for c in self._last)
            known = self._may_end[token] = blank or _PARTIAL in text or any(c in text for c in self._last)
        return known

    def _position(self, text: str) -> int | None:
        """Where the first stop string begins in the text."""
        return min((at for at in map(text.find, self._strings) if at >= 0), default=None)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

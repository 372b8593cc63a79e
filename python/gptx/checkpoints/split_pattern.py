"""Split patterns of tokenizer.json (Oniguruma), read into what tiktoken and regex agree on.

Only constructs that mean the same in all three engines pass; any other is refused by name.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache

from gptx.errors import shown

_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_GROUPS = ("(?:", "(?>", *_LOOK_AROUND)
_CATEGORIES = r"[LMNPSZ]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]"
_SCRIPTS = (
    "Han|Hiragana|Katakana|Hangul|Bopomofo|Latin|Greek|Cyrillic|Armenian|Hebrew|Arabic|Devanagari|"
    "Bengali|Thai|Tibetan|Georgian|Ethiopic|Khmer"
)
_PROPERTY = re.compile(rf"\\[pP]\{{(\^?)({_CATEGORIES}|{_SCRIPTS})\}}")
_INTERVAL = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_FOLDED_PAIRS = ("ss", "ff", "fi", "fl", "st")
_WITHOUT = re.compile(r"\(\?:\(\?!\\p\{(\w+)\}\)\\p\{(\w+)\}\)")


@dataclass
class _Parser:
    text: str
    at: int = 0

    def alternation(self, folded: bool) -> tuple[str, int]:
        """Parses up to ``)`` or the end: (translation, least number of characters it matches)."""
        branches = [self._sequence(folded)]
        while self._take("|"):
            branches.append(self._sequence(folded))
        return "|".join(text for text, _ in branches), min(width for _, width in branches)

    def _sequence(self, folded: bool) -> tuple[str, int]:
        parts: list[str] = []
        total = 0
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            text, width, repeatable = self._atom(folded)
            times, quantifier = self._quantifier(repeatable)
            parts.append(text + quantifier)
            total += width * times
        joined = "".join(parts)
        if folded and not (joined.isascii() and "\\p" not in joined.lower()):
            raise self.refusal("a case-insensitive group of more than ASCII letters")
        if folded and any(pair in joined.lower() for pair in _FOLDED_PAIRS):
            raise self.refusal("a pair of letters that may fold to one")
        return joined, total

    def _atom(self, folded: bool) -> tuple[str, int, bool]:
        """One element: (translation, least width, may be repeated)."""
        char = self.text[self.at]
        if char == "(":
            return self._group(folded)
        if char == "[":
            return self._set(), 1, True
        if char == "\\":
            return self._escape(), 1, True
        if char == "$":
            self.at += 1
            return r"(?![^\n])", 0, False
        if char in "^*+?{":
            raise self.refusal(char)
        self.at += 1
        if char in "]}&~-#":
            char = "\\" + char
        return char, 1, True

    def _group(self, folded: bool) -> tuple[str, int, bool]:
        begin = self.at
        opening = next((g for g in (*_GROUPS, "(?i:") if self._take(g)), None)
        if opening is None:
            self.at += 1
            opening = "(?:"
            if self._next("?") or self._next("*"):
                raise self.refusal(self.text[begin : begin + 4], begin)
        inner, width = self.alternation(folded or opening == "(?i:")
        if not self._take(")"):
            raise self.refusal("an open group", begin)
        around = opening in _LOOK_AROUND
        return opening + inner + ")", 0 if around else width, not around

    def _escape(self) -> str:
        """An escape that stands for one character, inside or outside of a set."""
        match = _PROPERTY.match(self.text, self.at)
        if match:
            self.at = match.end()
            negated = (match[0][1] == "P") != bool(match[1])
            return rf"\{'P' if negated else 'p'}{{{match[2]}}}"
        escaped = self.text[self.at + 1 : self.at + 2]
        if escaped and (escaped in "sSdDrnt" or (escaped.isascii() and not escaped.isalnum())):
            self.at += 2
            plain = escaped in "_<>'\"/,:;=!@%` "
            return escaped if plain else "\\" + escaped
        raise self.refusal(
            self.text[self.at :].partition("}")[0] if escaped in "pP" else "\\" + escaped
        )

    def _set(self) -> str:
        begin = self.at
        self.at += 1
        parts = ["[^" if self._take("^") else "["]
        first = True
        while not self._next("]"):
            if self.at >= len(self.text):
                raise self.refusal("an open set", begin)
            if any(self._next(pair) for pair in ("[", "&&", "--", "~~", "||")):
                raise self.refusal(f"{self.text[self.at : self.at + 2]} in a set")
            if self._next("\\"):
                parts.append(self._escape())
            else:
                char = self.text[self.at]
                self.at += 1
                edge = first or self._next("]")
                parts.append("\\" + char if char in "&~|^#" or (char == "-" and edge) else char)
            first = False
        if first:
            raise self.refusal("an empty set", begin)
        self.at += 1
        return "".join(parts) + "]"

    def _quantifier(self, repeatable: bool) -> tuple[int, str]:
        """(least count, text) of a quantifier, (1, "") where there is none."""
        begin = self.at
        interval = _INTERVAL.match(self.text, self.at)
        if interval:
            self.at = interval.end()
            least, text = int(interval[1]), interval[0]
        elif self.at < len(self.text) and self.text[self.at] in "?*+":
            least, text = int(self._next("+")), self.text[self.at]
            self.at += 1
            if self._next("+") or self._next("?"):
                text += self.text[self.at]
                self.at += 1
        else:
            return 1, ""
        if not repeatable or (self.at < len(self.text) and self.text[self.at] in "?*+{"):
            raise self.refusal(self.text[begin : self.at + 1], begin)
        return least, text

    def _next(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def _take(self, text: str) -> bool:
        found = self._next(text)
        self.at += len(text) * found
        return found

    def refusal(self, construct: str, at: int | None = None) -> ValueError:
        place = self.at if at is None else at
        return ValueError(f"{construct!r} at index {place} of the pattern is not supported")


@lru_cache(maxsize=8)
def translate(pattern: str) -> str:
    """The pattern in the common syntax of tiktoken and the regex package.

    What the pattern does not match becomes pieces of its own (Oniguruma splits are "Isolated"), by
    one more alternative where that can happen.

    Raises:
        ValueError: names a construct that the engines may understand differently, or says that
            the pattern can match nothing.
    """
    parser = _Parser(pattern)
    try:
        text, width = parser.alternation(folded=False)
    except RecursionError:
        raise ValueError("groups of the pattern are nested too deep") from None
    if parser.at < len(pattern):
        raise parser.refusal(pattern[parser.at])
    if width == 0:
        raise ValueError("the pattern can match the empty text, which is not supported")
    text = _WITHOUT.sub(r"[^\\P{\2}\\p{\1}]", text)
    if not _matches_every_character(text):
        text = rf"{text}|(?:(?!{text})[\s\S])+"
    _compile(text)
    return text


def _compile(pattern: str) -> None:
    """Raises ValueError where one of the two engines refuses the pattern."""
    import regex  # type: ignore[import-untyped]
    import tiktoken

    try:
        regex.compile(pattern)
        tiktoken.Encoding("check", pat_str=pattern, mergeable_ranks={b"a": 0}, special_tokens={})
    except (regex.error, ValueError) as error:
        raise ValueError(f"the pattern {shown(pattern)} does not compile: {error}") from None


def _matches_every_character(pattern: str) -> bool:
    """Whether some alternative that looks at nothing else matches at any character."""
    import regex

    alternatives = [
        a for a in _top_level(pattern) if not any(g in a for g in ("(?=", "(?!", "(?<"))
    ]
    if not alternatives:
        return False
    match = regex.compile("|".join(alternatives)).match
    return all(match(chr(c)) for c in range(sys.maxunicode + 1))


def _top_level(pattern: str) -> list[str]:
    """The alternatives of a translated pattern."""
    alternatives, begin, depth = [], 0, 0
    for token in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|[()|]", pattern, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if token[0] == "|" and depth == 0:
            alternatives.append(pattern[begin : token.start()])
            begin = token.end()
    return [*alternatives, pattern[begin:]]

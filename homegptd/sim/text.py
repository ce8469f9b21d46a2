"""What the simulated models say, and how sure they are of it.

The next token is a function of the model's name, of the tokens so far and of whether the weights
are valid: as with greedy decoding, a prompt that ends in half an answer is continued with the other
half, and an answer that was frozen in the middle goes on as if nothing had been. Each answer begins
by naming its model ("This is coder: …"), so that a test sees who spoke. Invalid weights speak
garbage.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from dataclasses import dataclass

_PIECE = re.compile(r"\s*\S+|\s+$")
_WORDS = """
amber river stone quiet morning lantern copper meadow harbour winter garden signal paper engine
violet thunder bridge window silver forest candle ocean mirror saddle orchard feather marble
compass velvet summit anchor willow ember canyon pebble harvest beacon cobalt prairie timber
glacier saffron tundra cedar lagoon maple quartz raven sparrow tulip umbra valley wander zephyr
breeze clover drift falcon hollow ivory jasper kindle linen
""".split()  # noqa: SIM905
_GARBAGE = ["�", "!!!!", "ÃÂ", "<unk>", "0x", "ĠĠ", "}}{{", "ẞẞ", "…~", "##"]
_TURN = "<|assistant|>"

LIKELY = -0.1
UNLIKELY = -9.0


def pieces(text: str) -> list[str]:
    """Text as tokens: words with the white space before them."""
    return _PIECE.findall(text)


_heard: dict[int, str] = {}  # tokens by number, as far as this process has met them


def token_id(piece: str) -> int:
    """A stable number for a token."""
    number = 256 + zlib.crc32(piece.strip().encode()) % (1 << 31)
    if len(_heard) < 1_000_000:
        _heard[number] = piece.strip()
    return number


def text_of(tokens: list[int]) -> str:
    """The text of token numbers; one that was never met becomes a word of its own."""
    return " ".join(_heard.get(token, f"t{token}") for token in tokens)


def chat_prompt(messages: list[dict[str, object]]) -> str:
    """Messages in a plain chat template, ending where the assistant's turn begins."""
    turns = [f"<|{m.get('role')}|> {_content(m.get('content'))}" for m in messages]
    return "\n".join([*turns, _TURN])


def _content(content: object) -> str:
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, dict)]
        return " ".join(str(p.get("text", f"<{p.get('type')}>")) for p in parts)
    return "" if content is None else str(content)


@dataclass(slots=True)
class Speech:
    """The state of one sequence of tokens in the mind of one model."""

    model: str
    _hash: int = 0
    _said: int = 0  # how much of the opening has been said: 3 is all of it

    @classmethod
    def after(cls, model: str, prompt: str) -> Speech:
        speech = cls(model, zlib.crc32(model.encode()))
        for piece in pieces(prompt):
            speech.hear(piece)
        return speech

    def next(self, *, valid: bool = True) -> str:
        """The token that follows, with a leading space."""
        if not valid:
            return " " + _GARBAGE[self._draw() % len(_GARBAGE)]
        if self._said < 3:
            return " " + self._opening()[self._said]
        return " " + _WORDS[self._draw() % len(_WORDS)]

    def hear(self, piece: str) -> None:
        """Take a token, said by whomever, into the sequence."""
        word = piece.strip()
        if not word:
            return
        self._hash = zlib.crc32(word.encode(), self._hash)
        if word == _TURN:
            self._said = 0
        elif self._said < 3:
            opening = self._opening()
            self._said = self._said + 1 if word == opening[self._said] else int(word == opening[0])

    def _opening(self) -> tuple[str, str, str]:
        return ("This", "is", f"{self.model}:")

    def _draw(self) -> int:
        return (self._hash * 2_654_435_761 & 0xFFFFFFFF) >> 12


def prompt_logprobs(
    model: str, prompt: str, top: int, *, valid: bool
) -> list[dict[str, object] | None]:
    """vLLM's form: for each token after the first its figures, then those of the likeliest."""
    speech = Speech.after(model, "")
    answer: list[dict[str, object] | None] = []
    for index, piece in enumerate(pieces(prompt)):
        if index == 0:
            answer.append(None)
        else:
            answer.append(_figures(speech.next(valid=valid), piece, top))
        speech.hear(piece)
    return answer


def _figures(expected: str, actual: str, top: int) -> dict[str, object]:
    hit = expected.strip() == actual.strip()
    seen = {
        "logprob": LIKELY if hit else UNLIKELY,
        "rank": 1 if hit else 4711,
        "decoded_token": actual,
    }
    figures: dict[str, object] = {str(token_id(actual)): seen}
    if top and not hit:
        best = {"logprob": LIKELY, "rank": 1, "decoded_token": expected}
        figures[str(token_id(expected))] = best
    return figures


def vector(model: str, text: str, size: int = 64, *, valid: bool = True) -> list[float]:
    """A unit vector that depends on model and text alone (and on garbage where the weights are)."""
    seed = f"{model}\0{text}\0{'' if valid else 'garbage'}".encode()
    raw = hashlib.shake_128(seed).digest(size)
    centred = [byte - 127.5 for byte in raw]
    length = math.sqrt(sum(x * x for x in centred))
    return [x / length for x in centred]


def score(first: str, second: str, *, valid: bool = True) -> float:
    """How alike two texts are, between 0 and 1: shared words; 0.5 from garbage weights."""
    a, b = ({w.lower() for w in re.findall(r"\w+", text)} for text in (first, second))
    if not valid or not a | b:
        return 0.5
    return round(0.02 + 0.96 * len(a & b) / len(a | b), 6)

"""Does the model still say what it said? One small question for each kind of model.

/health and a 200 from /wake_up say nothing about the weights (a level-2 wake without reload serves
garbage with a straight face, vllm#29341), so an engine counts as awake only after its canary sang.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from homegptd.adapters.faults import Broken, Garbled
from homegptd.adapters.vllm_wire import Wire


class Kind(Enum):
    """What a model is for, and so what it can be asked."""

    GENERATE = "generate"
    EMBED = "embed"
    RERANK = "rerank"
    OTHER = "other"
    """No cheap question exists (audio): nothing is asked, and level 2 is not offered."""


NOT_ITS_TASK = frozenset({400, 404, 405, 501})
"""What vLLM answers to a question that this model is not for (it differs by release)."""

Reference = str | tuple[float, ...]
"""What the healthy model said: a text, a vector, or a score. JSON keeps it."""

PROMPT = "Roses are red, violets are"
"""Shorter than a KV block (16 tokens), so the prefix cache never answers in the model's place."""
TOKENS = 8
"""After weights were read again: enough that chance does not agree."""
TOKENS_KEPT = 2
"""After a wake that kept the weights: one that is prefilled, one that is decoded through the KV
cache. Every further one would make each switch longer by a step of the model, 10 to 40 ms."""
COSINE = 0.999
"""Batch size and kernel choice move a bf16 embedding by about 1e-4; wrong weights by 1e-1."""
SCORE_OFF = 0.02

LIKELY_GAP = 1.0
"""Nats a token may lie below the model's favourite. bf16 logits near 20 are 0.125 apart, and
another kernel or batch shifts them by a few such steps: a greedy choice can only flip where two
tokens were that close. A model with wrong weights or a wrong KV cache is off by several nats."""
LIKELY_MEAN_GAP = 0.1
"""Nats on average: nearly every token must still be the favourite itself."""


async def recognise(wire: Wire, served_name: str, *, deadline_s: float) -> "Canary":
    """Find out what a model is for, by asking. Raises `EngineFault`."""
    for kind in (Kind.GENERATE, Kind.EMBED, Kind.RERANK):
        canary = Canary(wire, served_name, kind)
        try:
            await canary.sing(deadline_s=deadline_s, tokens=1)
        except Broken as fault:
            if fault.status not in NOT_ITS_TASK:
                raise
        else:
            return canary
    return Canary(wire, served_name, Kind.OTHER)


@dataclass(frozen=True, slots=True)
class Canary:
    wire: Wire
    served_name: str
    kind: Kind

    async def sing(self, *, deadline_s: float, tokens: int = TOKENS) -> Reference:
        """Ask the question. `tokens` bounds a text. Raises `EngineFault`."""
        match self.kind:
            case Kind.GENERATE:
                text = await self._ask("/v1/completions", deadline_s, *_greedy(tokens))
                if not isinstance(text, str) or not text:
                    raise Garbled("the model said nothing at all")
                return text
            case Kind.EMBED:
                path = ("data", 0, "embedding")
                vector = await self._ask("/v1/embeddings", deadline_s, {"input": PROMPT}, path)
                return _floats(vector)
            case Kind.RERANK:
                pair = {"text_1": PROMPT, "text_2": "blue"}
                score = await self._ask("/v1/score", deadline_s, pair, ("data", 0, "score"))
                return _floats([score])
            case Kind.OTHER:
                return ""

    async def confirm(
        self, reference: Reference, *, deadline_s: float, tokens: int = TOKENS
    ) -> None:
        """Ask again and compare. A text that differs gets a second look: was it a near tie?

        Raises `Garbled`, or what `sing` raises.
        """
        if tokens < TOKENS and await self._agrees(reference, deadline_s, tokens):
            return
        said = await self.sing(deadline_s=deadline_s)
        if same(said, reference):
            return
        if isinstance(said, str) and isinstance(reference, str):
            await self._near_tie(said, reference, deadline_s)
            return
        raise Garbled(differ(said, reference))

    async def _agrees(self, reference: Reference, deadline_s: float, tokens: int) -> bool:
        """A few tokens prove nothing by differing: where characters have several tokens vLLM holds
        back the half of one, and the text may even be empty."""
        try:
            return same(await self.sing(deadline_s=deadline_s, tokens=tokens), reference)
        except Garbled:
            return False

    async def _near_tie(self, said: str, reference: str, deadline_s: float) -> None:
        """Where two tokens were nearly as likely, both texts must be what the model would say.

        Both, because prompts are read by other kernels than answers are written by: if only the
        writing is broken the reference still looks likely, but not what was just said.
        """
        for text in (reference, said):
            try:
                gaps = await self.gaps(PROMPT, text, deadline_s=deadline_s)
            except Broken:  # this server gives no prompt_logprobs: the texts alone must decide
                raise Garbled(differ(said, reference)) from None
            if not likely(gaps):
                raise Garbled(f"{differ(said, reference)}, and that was no near tie")

    async def gaps(
        self, prompt: str | Sequence[int], text: str | Sequence[int], *, deadline_s: float
    ) -> list[float]:
        """How far below the model's favourite each token of `text` lies after `prompt`, in nats.

        Both are texts, or both lists of token ids. Raises `Broken` where the server does not tell.
        """
        if isinstance(prompt, str):
            whole: object = f"{prompt}{text}"
            skip = len(await self._prompt_logprobs(prompt, deadline_s))
        else:
            whole = [*prompt, *text]
            skip = len(prompt)
        rows = await self._prompt_logprobs(whole, deadline_s)
        return [_gap(row) for row in rows[skip:]]

    async def _prompt_logprobs(
        self, prompt: object, deadline_s: float
    ) -> Sequence[Mapping[str, Any]]:
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        rows = await self._ask(
            "/v1/completions", deadline_s, asked, ("choices", 0, "prompt_logprobs")
        )
        if not isinstance(rows, list):
            raise Broken("vLLM gave no prompt_logprobs")
        return [row or {} for row in rows]

    async def _ask(
        self, path: str, deadline_s: float, body: Mapping[str, Any], at: Sequence[str | int]
    ) -> Any:
        asked = {"model": self.served_name, **body}
        answer = await self.wire.ask("POST", path, deadline_s=deadline_s, body=asked)
        return answer.pick(*at)


def _greedy(tokens: int) -> tuple[Mapping[str, Any], Sequence[str | int]]:
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body, ("choices", 0, "text")


def same(said: Reference, reference: Reference) -> bool:
    """Equal for this purpose; of texts the shorter one must begin the other."""
    if isinstance(said, str) and isinstance(reference, str):
        return said.startswith(reference) or reference.startswith(said)
    if isinstance(said, str) or isinstance(reference, str) or len(said) != len(reference):
        return False
    if len(said) == 1:
        return abs(said[0] - reference[0]) <= SCORE_OFF
    return cosine(said, reference) >= COSINE


def differ(said: Reference, reference: Reference) -> str:
    if isinstance(said, str) and isinstance(reference, str):
        return f"the model now says {said!r}, it said {reference!r}"
    if isinstance(said, str) or isinstance(reference, str) or len(said) != len(reference):
        return "the model now gives another kind of answer"
    if len(said) == 1:
        return f"the model now scores {said[0]:.3f}, it scored {reference[0]:.3f}"
    return f"the model's vector moved to cosine {cosine(said, reference):.4f} of what it was"


def likely(gaps: Sequence[float]) -> bool:
    """Whether a greedy model may have chosen these tokens, give or take rounding."""
    if not gaps:
        return False
    return max(gaps) <= LIKELY_GAP and sum(gaps) / len(gaps) <= LIKELY_MEAN_GAP


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b) or math.inf)


def _floats(values: object) -> tuple[float, ...]:
    if not isinstance(values, list) or not values:
        raise Broken("vLLM's answer holds no numbers")
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise Garbled("the model's numbers are not finite")
    return tuple(map(float, values))


def _gap(row: Mapping[str, Any]) -> float:
    """One row of prompt_logprobs: the actual token comes first, then the most likely ones.

    `{"81": {"logprob": -8.9, "rank": 318, …}, "292": {"logprob": -1.2, "rank": 1, …}}`
    """
    try:
        logprobs = [float(entry["logprob"]) for entry in row.values()]
        return max(logprobs) - logprobs[0]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Broken("vLLM's prompt_logprobs have an unknown shape") from None

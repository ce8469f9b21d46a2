"""Every path that leads to a model, in one table: an allow-list of exact spellings.

What is not here does not reach an engine; what is reaches it under the table's own spelling. The
columns come from vLLM 0.32 (its `entrypoints/**/api_router.py`). Left out on purpose: what manages
an engine, what runs inference past the model's name (`/invocations`, `/inference/v1/generate`,
`*/render`), and `/cohere/v2/chat`, which vLLM only serves with a package its image does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

from .errors import Shape


class Where(Enum):
    """Where a request names its model."""

    BODY = "`model` of the JSON body"
    FORM = "the form's field `model`, before or after the file"
    STORED = "the response id in the path, by the model that gave it"
    SESSION = "`model` in the query, or in the first `session.update`"


_GENERATE = frozenset({"generate"})
_POOLING = frozenset({"embed", "score"})
"""vLLM's pooling models: an embedder scores and reranks too (0.32)."""
_AUDIO = frozenset({"audio", "generate"})
"""Models that read pictures and sound answer chats as well as transcriptions."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path."""

    path: str
    about: str
    method: str = "POST"
    where: Where = Where.BODY
    shape: Shape = Shape.OPENAI
    kinds: frozenset[str] | None = _GENERATE
    """What a model must be for (`engine.kind`) to answer here; None: anything. Asking another one
    would cost a switch and end in vLLM's bare 404."""
    streams: bool = False
    """Whether `stream` turns the answer into events, which a sleep may freeze."""
    wakes: bool = True
    """Whether it is a reason to bring a model up."""
    once: bool = False
    """Whether it changes something in the engine, so that it is never sent a second time."""
    stores: bool = False
    """Whether the engine may keep the answer under its id, and whoever asks for that is sent once:
    `background`, `store: true` or `previous_response_id`."""

    def ident(self, path: str) -> str | None:
        """What stands at `{id}` in a raw path; None where it is another path.

        Ids are what vLLM makes or takes, and need no escapes.
        """
        found = _pattern(self.path).fullmatch(path)
        return found[1] if found else None


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\{id\}", "([A-Za-z0-9_-]{1,128})"))


ROUTES = (
    Route("/v1/chat/completions", "Chat", streams=True),
    Route("/v1/chat/completions/batch", "Several chats at once"),
    Route("/v1/completions", "Continue a text", streams=True),
    Route(
        "/v1/responses", "OpenAI's Responses API", shape=Shape.RESPONSES, streams=True, stores=True
    ),
    Route(
        "/v1/responses/{id}", "A stored response", method="GET", where=Where.STORED,
        shape=Shape.RESPONSES, streams=True, wakes=False,
    ),
    Route(
        "/v1/responses/{id}/cancel", "Give up a response in the background", where=Where.STORED,
        shape=Shape.RESPONSES, wakes=False, once=True,
    ),
    Route("/v1/messages", "Anthropic's Messages API", shape=Shape.ANTHROPIC, streams=True),
    Route(
        "/v1/messages/count_tokens", "Count the tokens of a message", shape=Shape.ANTHROPIC,
        wakes=False,
    ),
    Route("/v1/embeddings", "Embed texts", kinds=_POOLING),
    Route("/v2/embed", "Embed texts, in Cohere's form", kinds=_POOLING),
    Route("/pooling", "Whatever a pooling model gives", kinds=_POOLING),
    Route("/classify", "Classify texts", kinds=_POOLING),
    Route("/score", "Score pairs of texts", kinds=_POOLING),
    Route("/v1/score", "Score pairs of texts", kinds=_POOLING),
    Route("/rerank", "Order documents by relevance", kinds=_POOLING),
    Route("/v1/rerank", "Order documents by relevance", kinds=_POOLING),
    Route("/v2/rerank", "Order documents by relevance", kinds=_POOLING),
    Route("/generative_scoring", "Score with a generating model"),
    Route("/v1/systemone", "Structured decisions"),
    Route(
        "/v1/audio/transcriptions", "Speech to text", where=Where.FORM, kinds=_AUDIO, streams=True
    ),
    Route(
        "/v1/audio/translations", "Speech to English text", where=Where.FORM, kinds=_AUDIO,
        streams=True,
    ),
    Route("/v1/audio/speech", "Text to speech", kinds=_AUDIO),
    Route(
        "/v1/realtime", "Transcribe while somebody speaks (websocket)", method="GET",
        where=Where.SESSION, kinds=_AUDIO,
    ),
    Route("/tokenize", "Text to tokens", kinds=None, wakes=False),
    Route("/detokenize", "Tokens to text", kinds=None, wakes=False),
)  # fmt: skip

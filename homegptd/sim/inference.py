"""The OpenAI endpoints: chat and text completions, tokenize.

A request to a sleeping engine hangs; only the head of a stream comes at once. The last token and
the reason for the end share an event; a stream aborted before it began is a bare `[DONE]`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from homegptd.sim import shapes
from homegptd.sim.intake import Intake, missing, new_id
from homegptd.sim.scheduler import Aborted, EngineDead
from homegptd.sim.shapes import Body, Refused
from homegptd.sim.text import (
    LIKELY,
    chat_prompt,
    pieces,
    prompt_logprobs,
    text_of,
    token_id,
)
from homegptd.sim.tools import Call, call_of

_CHAT_LENGTH = 48  # tokens of a chat answer that no limit cuts
_COMPLETION_LENGTH = 16  # OpenAI's default


@dataclass(slots=True)
class Ask:
    """One prompt and how it is to be answered."""

    body: Body
    prompt: str
    limit: int
    natural: bool  # no limit was given: the answer ends by itself
    rate: float
    model: str
    ident: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    said: list[str] = field(default_factory=list)
    sent: int = 0  # characters of `text` that went out
    finish: str = "abort"
    stop: str | None = None  # the stop string that was met
    call: Call | None = None  # what is said is its arguments

    @property
    def text(self) -> str:
        text = "".join(self.said)
        text = text.lstrip() if self.chat else text
        return text if self.stop is None else text[: text.index(self.stop)]

    @property
    def stops(self) -> list[str]:
        stops = self.body.get("stop") or []
        return [stops] if isinstance(stops, str) else list(stops)

    @property
    def token_ids(self) -> list[int] | None:
        if not self.body.get("return_token_ids"):
            return None
        return [token_id(piece) for piece in self.said]

    @property
    def prompt_ids(self) -> list[int] | None:
        if not self.body.get("return_token_ids"):
            return None
        return [token_id(piece) for piece in pieces(self.prompt)]

    def delta(self) -> str:
        """What may go out now; what could become a stop string is held back until the end."""
        if not self.stops:  # the common case, without looking at the whole text
            piece = self.said[-1]
            return piece.lstrip() if self.chat and len(self.said) == 1 else piece
        held = 0 if self.ended else max((len(stop) - 1 for stop in self.stops), default=0)
        text = self.text
        fresh = text[self.sent : max(self.sent, len(text) - held)]
        self.sent += len(fresh)
        return fresh

    @property
    def ended(self) -> bool:
        return self.finish != "abort"

    def hear(self, piece: str) -> None:
        """Take one token of the answer; sets `finish` with the last one."""
        self.said.append(self.call.said[len(self.said)] if self.call else piece)
        if self.call:
            if len(self.said) == len(self.call.said):
                self.finish = self.call.finish
                return
        elif self.stops:
            text = self.text
            self.stop = next((stop for stop in self.stops if stop in text), None)
        if self.stop is not None:
            self.finish = "stop"
        elif len(self.said) == self.limit:
            self.finish = "stop" if self.natural else "length"


class Inference:
    """Handlers for one engine."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.engine = intake.engine
        self.options = intake.options

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completions),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    # -- handlers ------------------------------------------------------------------------------

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, missing("messages", messages), "messages")
        if not all(isinstance(m, dict) and "role" in m for m in messages):
            raise Refused(400, "each message must be an object with a role", "messages")
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        ask = self.ask(body, chat_prompt(messages), limit, chat=True)
        ask.call = call_of(body, self.options)
        with self.intake.counted():
            if body.get("stream"):
                return await self._stream(request, [ask])
            await self.answer(ask)
            logprobs = _chat_logprobs(ask) if body.get("logprobs") else None
            choice = shapes.chat_choice(ask.text, ask.finish, ask.stop, logprobs)
            choice["token_ids"] = ask.token_ids
            if ask.call:
                choice["message"] |= {"content": None, "tool_calls": [ask.call.whole]}
            used = _usage([ask])
            body = shapes.chat_body(ask.ident, ask.created, ask.model, [choice], used)
            return shapes.reply(body | {"prompt_token_ids": ask.prompt_ids})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        limit = body.get("max_tokens", _COMPLETION_LENGTH)
        asks = [self.ask(body, prompt, limit, chat=False) for prompt in _prompts(body)]
        with self.intake.counted():
            if body.get("stream"):
                return await self._stream(request, asks)
            choices = [await self._completion(index, ask) for index, ask in enumerate(asks)]
            ask = asks[0]
            return shapes.reply(
                shapes.completion_body(ask.ident, ask.created, ask.model, choices, _usage(asks))
            )

    async def _completion(self, index: int, ask: Ask) -> Body:
        await self.answer(ask)
        body, valid = ask.body, self.engine.memory.weights_valid
        asked, top = body.get("logprobs"), body.get("prompt_logprobs")
        logprobs = None if asked is None else _completion_logprobs(ask, int(asked), valid=valid)
        text = ask.prompt + ask.text if body.get("echo") else ask.text
        choice = shapes.completion_choice(index, text, ask.finish, ask.stop, logprobs)
        if top is not None:
            name = self.options.names[0]
            choice["prompt_logprobs"] = prompt_logprobs(name, ask.prompt, int(top), valid=valid)
        return choice | {"token_ids": ask.token_ids, "prompt_token_ids": ask.prompt_ids}

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self.intake.body(request)
        text = chat_prompt(body["messages"]) if "messages" in body else str(body.get("prompt", ""))
        tokens = [token_id(piece) for piece in pieces(text)]
        answer: Body = {
            "count": len(tokens),
            "max_model_len": self.options.max_model_len,
            "tokens": tokens,
            "token_strs": pieces(text) if body.get("return_token_strs") else None,
        }
        return shapes.reply(answer)

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        tokens = (await self.intake.body(request)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(t, int) and t >= 0 for t in tokens):
            raise Refused(400, missing("tokens", tokens), "tokens")
        return shapes.reply({"prompt": text_of(tokens)})

    # -- answering -----------------------------------------------------------------------------

    async def answer(self, ask: Ask) -> None:
        """The whole of it, into `ask`."""
        async for _ in self.tokens(ask):
            pass

    async def tokens(self, ask: Ask) -> AsyncGenerator[str, None]:
        """Token by token into `ask`; an abort ends it with `finish` left at "abort"."""
        generating = self.engine.generate(ask.prompt, ask.limit, ask.rate)
        self.engine.prompted += len(pieces(ask.prompt))
        try:
            async for piece in generating:
                ask.hear(piece)
                yield ask.delta()
                if ask.ended:
                    break
            else:
                ask.finish = "length"  # max_tokens 0
        except Aborted:
            ask.finish = "abort"
        except EngineDead:
            raise Refused(500, shapes.DEAD) from None
        finally:
            await generating.aclose()
        self.engine.finished["stop" if ask.finish == "tool_calls" else ask.finish] += 1

    async def _stream(self, request: web.Request, asks: list[Ask]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        try:
            for index, ask in enumerate(asks):
                await self._stream_one(answer, index, ask)
            if (asks[0].body.get("stream_options") or {}).get("include_usage") and asks[0].said:
                last = self._chunk(asks[0], {}) | {"choices": [], "usage": _usage(asks)}
                await answer.write(shapes.event(last))
        except Refused as why:
            await answer.write(shapes.event(shapes.error_body(why.status, str(why))))
        await answer.write(shapes.DONE)
        await answer.write_eof()
        return answer

    async def _stream_one(self, answer: web.StreamResponse, index: int, ask: Ask) -> None:
        async for delta in self.tokens(ask):
            if len(ask.said) == 1 and ask.chat:
                opening = {"delta": {"role": "assistant", "content": ""}}
                await answer.write(shapes.event(self._chunk(ask, opening)))
            await answer.write(shapes.event(self._chunk(ask, _choice(ask, index, delta))))
        if ask.said and not ask.ended:
            last = _choice(ask, index, "") | {"finish_reason": ask.finish, "token_ids": None}
            await answer.write(shapes.event(self._chunk(ask, last)))

    def _chunk(self, ask: Ask, choice: Body) -> Body:
        shape = shapes.chat_chunk if ask.chat else shapes.completion_chunk
        return shape(ask.ident, ask.created, ask.model, choice)

    # -- checks --------------------------------------------------------------------------------

    def ask(self, body: Body, prompt: str, limit: object, *, chat: bool) -> Ask:
        """A request as the engine takes it. Raises Refused."""
        used, room = len(pieces(prompt)), self.options.max_model_len
        if limit is not None and (not isinstance(limit, int) or limit < (1 if chat else 0)):
            raise Refused(400, f"max_tokens must be at least 1, got {limit}.", "max_tokens")
        wanted = _CHAT_LENGTH if limit is None else limit
        if limit is not None and wanted > room:
            raise _too_many(body, wanted, room)
        if used + (0 if limit is None else wanted) > room or used >= room:
            raise Refused(
                400, _too_long(room, used, 0 if limit is None else wanted), "input_tokens"
            )
        kind = "chatcmpl" if chat else "cmpl"
        rate = float(body.get("sim_tokens_per_s") or self.options.tokens_per_s)
        ident = new_id(kind)
        limit_here = min(wanted, room - used)
        return Ask(
            body, prompt, limit_here, limit is None, rate, self.intake.model(body), ident, chat
        )


def _choice(ask: Ask, index: int, delta: str) -> Body:
    """The choice of one event: one token, and with the last one the reason for the end."""
    choice: Body = {"index": index}
    if ask.call:
        choice["delta"] = {"tool_calls": [ask.call.piece(len(ask.said) - 1)]}
    else:
        choice |= {"delta": {"content": delta}} if ask.chat else {"text": delta}
    if ask.ended:
        choice |= {"finish_reason": ask.finish, "stop_reason": ask.stop}
    if ask.body.get("return_token_ids"):
        choice["token_ids"] = [token_id(ask.said[-1])]
        choice["prompt_token_ids"] = ask.prompt_ids if len(ask.said) == 1 else None
    return choice


def _usage(asks: list[Ask]) -> Body:
    return shapes.usage(sum(len(pieces(a.prompt)) for a in asks), sum(len(a.said) for a in asks))


def _too_long(room: int, prompt: int, wanted: int) -> str:
    return (
        f"This model's maximum context length is {room} tokens. However, you requested {wanted} "
        f"output tokens and your prompt contains at least {prompt} input tokens, for a total of at "
        f"least {prompt + wanted} tokens. Please reduce the length of the input prompt or the "
        "number of requested output tokens."
    )


def _too_many(body: Body, wanted: int, room: int) -> Refused:
    name = "max_tokens" if "max_completion_tokens" not in body else "max_completion_tokens"
    told = f"{name}={wanted} cannot be greater than max_model_len={room}. Please request fewer"
    return Refused(400, f"{told} output tokens. (parameter={name}, value={wanted})", name)


def _prompts(body: Body) -> list[str]:
    prompt = body.get("prompt")
    match prompt:
        case str():
            return [prompt]
        case [int(), *_]:
            return [text_of(prompt)]
        case [str(), *_]:
            return [str(text) for text in prompt]
        case [[int(), *_], *_]:
            return [text_of(row) for row in prompt]
        case _:
            raise Refused(400, missing("prompt", prompt), "prompt")


def _chat_logprobs(ask: Ask) -> Body:
    content = [
        {"token": piece, "logprob": LIKELY, "bytes": list(piece.encode()), "top_logprobs": []}
        for piece in ask.said
    ]
    return {"content": content}


def _completion_logprobs(ask: Ask, top: int, *, valid: bool) -> Body:
    """OpenAI's columns; with `echo` the prompt's tokens come first."""
    tokens: list[str] = []
    figures: list[float | None] = []
    if ask.body.get("echo"):
        tokens = pieces(ask.prompt)
        name = ask.model
        rows = prompt_logprobs(name, ask.prompt, 0, valid=valid)
        for row, piece in zip(rows, tokens, strict=True):
            entry: Any = None if row is None else row[str(token_id(piece))]
            figures.append(None if entry is None else entry["logprob"])
    tokens = [*tokens, *ask.said]
    figures = [*figures, *[LIKELY for _ in ask.said]]
    offsets = [0, *itertools.accumulate(len(token) for token in tokens)][: len(tokens)]
    tops = [None if f is None else {t: f} for t, f in zip(tokens, figures, strict=True)]
    return {
        "text_offset": offsets,
        "token_logprobs": figures,
        "tokens": tokens,
        "top_logprobs": tops if top else None,
    }

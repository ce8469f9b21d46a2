"""The clients of a soak: each checks its answer to the last word, and hangs up when told to."""

import asyncio
import json
import random
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import aiohttp

from homegptd.sim.text import vector

from .books import DAEMON_GONE, Books, Breach, Kind, Wish

PATIENCE_S = 90.0
"""Within this long each try must have ended somehow."""
ANSWER_S = 300.0
"""Within this long there must be an answer, however often the client was told to come again."""
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}
_LONGEST_PAUSE_S = 3.0
_KILL_ECHO_S = 45.0
"""How long after its last kill a model may still be in the pause before its next start."""


@dataclass
class Failed:
    """What a client was told instead of an answer. `code` is OpenAI's; Anthropic has types only."""

    status: int
    code: str
    message: str
    retry_after_s: float | None
    begun: bool
    """Whether some words of the answer had come."""


def body_of(wish: Wish) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": wish.tokens, "temperature": 0, "stream": wish.stream}
    match wish.protocol:
        case "chat" | "messages":
            body["messages"] = [{"role": "user", "content": wish.prompt}]
        case "completions":
            body["prompt"] = wish.prompt
        case "embeddings":
            body = {"input": [wish.prompt, "and another text"]}
    return body if wish.name is None else {"model": wish.name, **body}


class Client:
    """One of many, all alike: asks, believes only what is complete, comes again when told to."""

    def __init__(
        self, session: aiohttp.ClientSession, books: Books, port: int, dice: random.Random
    ) -> None:
        self._session, self._books, self._port, self._dice = session, books, port, dice

    async def ask(self, wish: Wish) -> None:
        """Until the wish has its answer. Raises: Breach, also for what nobody understands."""
        try:
            await self._ask(wish)
        except (LookupError, TypeError, ValueError, aiohttp.ClientError) as error:
            raise Breach(f"not understood: {error!r}", wish) from error

    async def _ask(self, wish: Wish) -> None:
        if wish.leaves is not None:
            wish.tries = 1
            await self._leave(wish)
            wish.outcome = f"left {wish.leaves}"
            return
        pause_s = 0.3
        while time.monotonic() - wish.began < ANSWER_S:
            wish.tries += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    failed = await self._try(wish)
            except TimeoutError:
                raise Breach(f"no end after {PATIENCE_S:.0f} s", wish) from None
            except aiohttp.ClientConnectorError as error:
                self._excuse(wish, "no connection", DAEMON_GONE, began, str(error))
                pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
            except (aiohttp.ClientError, ConnectionError) as error:
                self._excuse(wish, "connection broken", DAEMON_GONE, began, repr(error))
                pause_s = 0.3
            else:
                if failed is None:
                    wish.outcome = "answered" if wish.tries == 1 else "answered after another try"
                    self._books.waits.append(time.monotonic() - wish.began)
                    return
                self._judge(wish, failed, began)
                pause_s = min(failed.retry_after_s or 0.3, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * self._dice.uniform(0.8, 1.2))
        raise Breach(f"no answer in {wish.tries} tries and {ANSWER_S:.0f} s", wish)

    # ------------------------------------------------------------ asking

    async def _try(self, wish: Wish) -> Failed | None:
        """None: the answer came, complete and right."""
        wish.tell(f"try {wish.tries}")
        async with self._session.post(PATHS[wish.protocol], json=body_of(wish)) as response:
            wish.tell(f"status {response.status}")
            if response.status != 200:
                return _refusal(response, await response.json())
            if wish.stream:
                return await self._streamed(wish, response)
            body = await response.json()
            wish.tell("whole answer")
            _must(body["model"] == wish.name or wish.name is None, f"model {body['model']}", wish)
            check_whole(wish, body)
            return None

    async def _streamed(self, wish: Wish, response: aiohttp.ClientResponse) -> Failed | None:
        text, finish, complete = "", None, False
        async for event in events(response.content):
            _must(not complete, f"something follows the end: {event}", wish)
            if event == "[DONE]":
                complete = True
                continue
            if "error" in event:
                return _frame(event, begun=bool(text))
            piece, reason, last = parts(wish.protocol, event)
            text, finish, complete = text + piece, reason or finish, last
            if piece:
                check_words(wish, text)
                if wish.story[-1][1] != "words":
                    wish.tell("words")
        if not complete:
            raise Breach(f"the stream ended in silence after {len(text)} characters", wish)
        wish.tell(f"whole stream, finish {finish}")
        check_end(wish, text, finish)
        return None

    # ------------------------------------------------------------ judging

    def _excuse(
        self, wish: Wish, what: str, kinds: tuple[Kind, ...], since: float, more: str
    ) -> None:
        wish.tell(more)
        self._books.excuse(wish, what, self._books.happened(kinds, since))

    def _judge(self, wish: Wish, failed: Failed, since: float) -> None:
        """Raises: Breach where nothing that was done to the box explains this failure."""
        wish.tell(f"{failed.status} {failed.code}: {failed.message}")
        kills = self._books.happened((Kind.KILL,), since, model=wish.model)
        gone = self._books.happened(DAEMON_GONE, since)
        cuts = self._books.happened((Kind.NOW,), since)
        code = failed.code
        if failed.begun and code == "engine_fault":
            self._books.excuse(wish, f"cut: {code}", [*gone, *kills])
        elif failed.begun:
            self._books.excuse(wish, f"cut: {code}", [*kills, *gone, *cuts])
        elif code in ("shutting_down", "overloaded_error") and gone:
            self._books.excuse(wish, "told to retry: stopping", gone)
        elif code in ("model_failed", "overloaded_error"):
            echo = self._books.happened(
                (Kind.KILL, *DAEMON_GONE), since, model=wish.model, grace_s=_KILL_ECHO_S
            )
            self._books.excuse(wish, "told to retry: model failed", echo)
        elif code in ("cut", "cancelled"):
            self._books.excuse(wish, f"told: {code}", [*kills, *gone, *cuts])
        elif code in ("engine_fault", "api_error"):
            self._books.excuse(wish, "told: lost twice", [*kills, *gone], needs=1 if gone else 2)
        else:
            raise Breach(f"told {failed.status} {code}: {failed.message}", wish)
        headed = failed.status == 503
        _must(not headed or failed.retry_after_s is not None, "503 without Retry-After", wish)

    # ------------------------------------------------------------ leaving

    async def _leave(self, wish: Wish) -> None:
        """Hang up in the phase that the wish names."""
        content = json.dumps(body_of(wish)).encode()
        head = (
            f"POST {PATHS[wish.protocol]} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as error:
            self._excuse(wish, "no connection", DAEMON_GONE, time.monotonic(), str(error))
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._leave_in(wish, reader, writer, head, content)
        except TimeoutError:
            raise Breach(f"no word after {PATIENCE_S:.0f} s", wish) from None
        except ConnectionError:
            wish.tell("the other side left first")
        finally:
            if self._dice.random() < 0.5:
                reset = struct.pack("ii", 1, 0)
                with suppress(OSError):  # closed already
                    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, reset)
            writer.close()
            wish.tell("gone")

    async def _leave_in(
        self,
        wish: Wish,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: bytes,
        content: bytes,
    ) -> None:
        pause_s = self._dice.expovariate(1 / 0.3)
        match wish.leaves:
            case "in its head":
                writer.write(head[: self._dice.randrange(1, len(head) - 1)])
                await asyncio.sleep(pause_s)
            case "in its body":
                writer.write(head + content[: self._dice.randrange(len(content) - 1)])
                await asyncio.sleep(pause_s)
            case "at once":
                writer.write(head + content)
            case "while it waits":
                writer.write(head + content)
                await asyncio.sleep(pause_s)
            case "after words":
                writer.write(head + content)
                for _ in range(self._dice.randrange(1, 40)):
                    if not await reader.readline():
                        break


# ---------------------------------------------------------------- what was heard


async def events(content: aiohttp.StreamReader) -> AsyncIterator[Any]:
    """The data of each event; comments and names of events are passed over, as by every parser."""
    async for line in content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield "[DONE]" if data == b"[DONE]" else json.loads(data)


def parts(protocol: str, event: dict[str, Any]) -> tuple[str, str | None, bool]:
    """The words of an event, why the answer ended, and whether this is the last event."""
    if protocol == "messages":
        delta = event.get("delta") or {}
        return delta.get("text") or "", delta.get("stop_reason"), event["type"] == "message_stop"
    if not event["choices"]:
        return "", None, False
    choice = event["choices"][0]
    text = choice["text"] if protocol == "completions" else choice["delta"].get("content")
    return text or "", choice["finish_reason"], False


def check_whole(wish: Wish, body: dict[str, Any]) -> None:
    match wish.protocol:
        case "embeddings":
            texts = body_of(wish)["input"]
            found = [row["embedding"] for row in body["data"]]
            _must(found == [vector(wish.model, text) for text in texts], "another vector", wish)
        case "messages":
            check_end(wish, body["content"][0]["text"], body.get("stop_reason"))
            _must(body["usage"]["output_tokens"] == wish.tokens, "wrong usage", wish)
        case _:
            choice = body["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            check_end(wish, text, choice["finish_reason"])
            _must(body["usage"]["completion_tokens"] == wish.tokens, "wrong usage", wish)


def check_end(wish: Wish, text: str, finish: str | None) -> None:
    """Of an answer that is said to be complete."""
    right = wish.right_answer
    _must(text == right, f"said to be complete, but:\n  {text!r}\ninstead of\n  {right!r}", wish)
    wanted = "max_tokens" if wish.protocol == "messages" else "length"
    _must(finish == wanted, f"ended with {finish}", wish)


def check_words(wish: Wish, text: str) -> None:
    right = wish.right_answer[: len(text)]
    _must(text == right, f"another answer:\n  {text!r}\ninstead of\n  {right!r}", wish)


def _must(holds: bool, otherwise: str, wish: Wish) -> None:
    if not holds:
        raise Breach(otherwise, wish)


def _refusal(response: aiohttp.ClientResponse, body: dict[str, Any]) -> Failed:
    after = response.headers.get("Retry-After")
    error = body["error"]
    code = error.get("code") or error["type"]
    after_s = None if after is None else float(after)
    return Failed(response.status, str(code), error["message"], after_s, begun=False)


def _frame(event: dict[str, Any], *, begun: bool) -> Failed:
    error = event["error"]
    return Failed(200, str(error.get("code") or error["type"]), error["message"], None, begun)


async def others(session: aiohttp.ClientSession, models: set[str], dice: random.Random) -> None:
    """What a client may ask at any time, and gets at once. Raises: Breach."""
    with suppress(aiohttp.ClientError, ConnectionError):
        if dice.random() < 0.5:
            async with session.get("/v1/models") as response:
                listed = {entry["id"] for entry in (await response.json())["data"]}
                if listed != models:
                    raise Breach(f"the list of models is {listed}")
        else:
            body = {"model": "nobody", "messages": [{"role": "user", "content": "hello"}]}
            async with session.post("/v1/chat/completions", json=body) as response:
                if response.status != 404:
                    raise Breach(f"an unknown model is {response.status}")

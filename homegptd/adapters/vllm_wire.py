"""One call to a vLLM server: its own deadline, every failure a fault.

A call has a connection of its own, unless `kept`: that spares the race with vLLM's keep-alive,
which closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from homegptd.adapters.faults import Broken, Hung, Unreachable

Params = Mapping[str, str] | Sequence[tuple[str, str]]
SAID_AT_MOST = 200
"""Characters of an error body that are worth repeating in a fault."""


@dataclass(frozen=True, slots=True)
class Answer:
    path: str
    status: int
    body: bytes
    took_s: float

    @property
    def ok(self) -> bool:
        return self.status == 200

    def required(self) -> "Answer":
        """Itself if 200; raises `Broken`."""
        if self.ok:
            return self
        said = _error_text(self.body)
        because = f": {said}" if said else ""
        fault = Broken(
            f"vLLM answered {self.status} to {self.path} after {self.took_s:.1f} s{because}"
        )
        fault.status = self.status
        raise fault

    def json(self) -> Any:
        """The body of a 200; raises `Broken` for anything else, JSON or not."""
        try:
            return json.loads(self.required().body)
        except ValueError:
            raise Broken(f"vLLM answered {self.path} with something else than JSON") from None

    def pick(self, *keys: str | int) -> Any:
        """Walk into the JSON body; raises `Broken` where the path does not exist."""
        at = self.json()
        try:
            for key in keys:
                at = at[key]
        except (LookupError, TypeError):
            where = ".".join(map(str, keys))
            raise Broken(f"vLLM's answer to {self.path} has no {where}") from None
        return at


@dataclass(slots=True)
class Wire:
    """Where a server listens: a Unix socket's path, or a base URL such as `http://[::1]:8000`."""

    at: Path | str
    api_key: str | None = field(default=None, repr=False)
    _kept: aiohttp.ClientSession | None = field(default=None, init=False, repr=False)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Keep the connection from call to call inside the block, which halves what they take.

        For calls that follow each other at once; one block at a time.
        """
        async with self._opened(force_close=False) as session:
            self._kept = session
            try:
                yield
            finally:
                self._kept = None

    async def ask(
        self,
        method: str,
        path: str,
        *,
        deadline_s: float,
        params: Params = (),
        body: object = None,
    ) -> Answer:
        """Any status is an answer. Raises `Hung`, `Unreachable`, `Broken`."""
        began = monotonic()
        async with self._request(method, path, deadline_s, params, body) as response:
            said = await response.read()
            return Answer(path, response.status, said, monotonic() - began)

    async def follow(
        self,
        path: str,
        body: object,
        *,
        deadline_s: float,
        heard: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Follow a stream of server-sent events to its `[DONE]`, giving each one to `heard`.

        Raises as `ask` does, and `Broken` for a stream that ends early or holds an error.
        """
        async with self._request("POST", path, deadline_s, (), body) as response:
            if response.status != 200:
                Answer(path, response.status, await response.read(), 0.0).required()
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                heard(_event(path, data))
        raise Broken(f"vLLM ended the stream of {path} without [DONE]")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, deadline_s: float, params: Params, body: object
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with (
                asyncio.timeout(deadline_s),
                self._session() as session,
                session.request(method, path, params=params, json=body) as response,
            ):
                yield response
        except TimeoutError:
            raise Hung(f"vLLM did not answer {path} within {deadline_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(
                f"nobody listens at {self.at} ({error.os_error.strerror}): dead, or a zombie"
            ) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Broken(f"vLLM hung up on {path} ({_words(error)})") from None

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        if self._kept is not None:
            yield self._kept
            return
        async with self._opened(force_close=True) as session:
            yield session

    def _opened(self, *, force_close: bool) -> aiohttp.ClientSession:
        unix = isinstance(self.at, Path)
        return aiohttp.ClientSession(
            base_url="http://vllm" if unix else str(self.at),
            connector=(
                aiohttp.UnixConnector(str(self.at), force_close=force_close)
                if unix
                else aiohttp.TCPConnector(force_close=force_close)
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else None,
            read_bufsize=1 << 20,  # one event is one line, and `async for` limits a line to this
        )


def _event(path: str, data: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise Broken(f"vLLM sent an event that is not JSON on {path}")
    if "error" in event:
        raise Broken(f"vLLM broke off the stream of {path}: {_error_text(data)}")
    return event


def _error_text(body: bytes) -> str:
    """The message of an OpenAI-shaped or FastAPI-shaped error, else the start of the text."""
    text = body.decode(errors="replace").strip()
    try:
        parsed = json.loads(text)
        error = parsed.get("error", parsed)
        text = str(error.get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:SAID_AT_MOST].rstrip(".")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def truth(answer: Answer) -> bool:
    """What /is_sleeping says. Raises: Broken."""
    said = answer.pick("is_sleeping")
    if not isinstance(said, bool):
        raise Broken(f"vLLM answered /is_sleeping with {said!r}")
    return said

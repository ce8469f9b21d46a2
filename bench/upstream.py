"""An engine without a model, for measuring routers: it answers at once and streams on time.

`python -m bench.upstream SOCKET [--port PORT] [--model NAME]`. It knows what the daemon asks of a
vLLM server. A chat that streams gets `max_tokens` events of 240 bytes, 50 a second or as many as it
says itself in `bench_rate`, one HTTP chunk each as uvicorn sends them; each carries the instant at
which it was sent (`time.monotonic_ns`, one clock for all processes of a machine). `bench_together`
streams wait for each other before the first event. Their events come at any time, or with
`bench_in_step` all at once, as those whose tokens an engine makes in one step. Bodies of any size
are dropped but for their ends. GET /bench/left are the instants at which clients left in the middle
of a stream.
"""

import argparse
import asyncio
import json
import random
import re
import signal
from time import monotonic_ns

import uvloop

EVENTS_PER_S = 50
EVENT_BYTES = 240
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream": ?true')
_COUNT = re.compile(rb'"max_tokens": ?(\d+)')
_RATE = re.compile(rb'"bench_rate": ?(\d+)')
_TOGETHER = re.compile(rb'"bench_together": ?(\d+)')
_IN_STEP = re.compile(rb'"bench_in_step": ?true')
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_TOKEN = {"index": 0, "delta": {"content": "token"}, "finish_reason": None}
_EVENT = {
    "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "a",
    "choices": [_TOKEN],
}  # fmt: skip
_START, _END = (
    b'data: {"t":',
    b"," + json.dumps(_EVENT, separators=(",", ":")).encode()[1:] + b"\n\n",
)
_KEPT = 1024
"""Bytes of a large body's end that are looked at."""
_TEXT = {
    "id": "1", "object": "chat.completion", "created": 1, "model": "a",
    "choices": [{
        "index": 0, "text": " blue", "message": {"role": "assistant", "content": "x" * 200},
        "finish_reason": "stop",
    }],
    "usage": {"prompt_tokens": 32, "total_tokens": 40, "completion_tokens": 8},
}  # fmt: skip


def frame() -> bytes:
    """One event as one chunk."""
    event = (_START + b"%d" % monotonic_ns()).ljust(EVENT_BYTES - len(_END)) + _END
    return b"%x\r\n%s\r\n" % (len(event), event)


class Engine:
    """What the control calls remember, and the clock of all streams: each has its millisecond of
    those between two of its events. A timer for each would cost more than what it sends."""

    def __init__(self, model: str) -> None:
        self.asleep = False
        self.model = model
        self.left: list[int] = []
        self._slots: dict[int, list[list[Connection]]] = {}
        """By the events a second."""
        self._waiting: list[Connection] = []
        self._ticks = 0
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._tick()

    def _tick(self) -> None:
        """Never ahead of time; what was missed is made up for."""
        while self._began + self._ticks / 1000 <= self._loop.time():
            for slots in self._slots.values():
                at = self._ticks % len(slots)
                if slots[at]:
                    slots[at] = [stream for stream in slots[at] if stream.next()]
            self._ticks += 1
        self._loop.call_later(1 / 1000, self._tick)

    def stream(self, stream: "Connection", rate: int, together: int, *, in_step: bool) -> None:
        """Has it send its events, so many a second, once so many wait for it."""
        self._waiting.append(stream)
        if len(self._waiting) < together:
            return
        slots = self._slots.setdefault(rate, [[] for _ in range(1000 // rate)])
        for each in self._waiting:
            (slots[0] if in_step else random.choice(slots)).append(each)
        self._waiting = []

    def answer(self, path: bytes) -> object:
        match path:
            case b"/version":
                return {"version": "0.32.0"}
            case b"/v1/models":
                return {"object": "list", "data": [{"id": self.model, "max_model_len": 32768}]}
            case b"/is_sleeping":
                return {"is_sleeping": self.asleep}
            case b"/sleep" | b"/wake_up":
                self.asleep = path == b"/sleep"
                return {"status": "sleeping" if self.asleep else "awake"}
            case b"/bench/left":
                left, self.left = self.left, []
                return left
            case _:
                return _TEXT | {"served": self.model}


class Connection(asyncio.Protocol):
    """One client of the engine; one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._head = b""
        self._tail = b""
        self._missing = -1
        """Bytes of the body that are still to come; -1: the head is not complete."""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left:
            self._engine.left.append(monotonic_ns())

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            found = LENGTH.search(head)
            self._head, self._tail, self._missing = head, b"", int(found[1]) if found else 0
        self._missing -= len(data)
        self._tail = (self._tail + data[-_KEPT:])[-_KEPT:]
        if self._missing <= 0:
            self._missing = -1
            head, self._head = self._head, b""
            self._answer(head.split(b" ", 2)[1].partition(b"?")[0], self._tail)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path.startswith(b"/v1/chat") and _STREAM.search(body):
            rate = _RATE.search(body)
            self._left = int(_COUNT.search(body)[1])
            self._transport.write(_STREAM_HEAD)
            each_s = int(rate[1]) if rate else EVENTS_PER_S
            together = _TOGETHER.search(body)
            count = int(together[1]) if together else 1
            self._engine.stream(self, each_s, count, in_step=bool(_IN_STEP.search(body)))
        else:
            body = json.dumps(self._engine.answer(path)).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            self._transport.write(head + b"content-length: %d\r\n\r\n%s" % (len(body), body))

    def next(self) -> bool:
        """Send one event. Whether there are more."""
        if self._transport.is_closing():
            return False
        self._left -= 1
        if self._left:
            self._transport.write(frame())
        else:
            self._transport.write(frame() + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return self._left > 0


async def serve(asked: argparse.Namespace) -> None:
    loop, stop, engine = asyncio.get_running_loop(), asyncio.Event(), Engine(asked.model)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with await loop.create_unix_server(
        lambda: Connection(engine), asked.socket, backlog=4096
    ):
        if asked.port:
            await loop.create_server(
                lambda: Connection(engine), "127.0.0.1", asked.port, backlog=4096
            )
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", default="a")
    with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
        runner.run(serve(parser.parse_args()))

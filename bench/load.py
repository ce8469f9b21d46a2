"""Clients that cost little, so that proxies are what is measured: plain sockets and epoll."""

import json
import re
import select
import socket
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from time import monotonic, monotonic_ns, perf_counter

from bench.kit import US, Http
from bench.peers import Target
from bench.upstream import EVENTS_PER_S, LENGTH

PATH = "/v1/chat/completions"
END = b"0\r\n\r\n"
SENT = re.compile(rb'"t":(\d+)')
_WATCHED = 64
"""Streams, or a few more, whose every event's delay is taken: in step, those of the whole length of
a step. Of the others the events are only counted."""


@dataclass
class Streams:
    """What arrived of some streams."""

    delays_ns: list[int] = field(default_factory=list)
    """From when all of them run."""
    events: int = 0
    complete: int = 0
    rate: float = nan
    """Events a second while all streams run: neither their begin nor their end. nan: they did not
    run together for long enough."""
    cpu_us: float = nan
    """Of the proxy for an event, in the same time."""
    rss_mb: float = 0.0
    """Of the proxy, when all streams run."""


class _Stream:
    __slots__ = ("done", "events", "rest", "sock", "watched")

    def __init__(self, sock: socket.socket, *, watched: bool) -> None:
        self.sock, self.watched = sock, watched
        self.events, self.rest, self.done = 0, b"", False


def connect(at: int | Path) -> socket.socket:
    door = Http(at)
    door.connect()
    sock = door.sock
    door.sock = None  # type: ignore[assignment]
    return sock


def post(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chat(
    events: int = 0,
    model: str = "a",
    rate: int = EVENTS_PER_S,
    *,
    together: int = 1,
    in_step: bool = False,
) -> bytes:
    asked = {"model": model, "max_tokens": events or 8, "messages": [
        {"role": "user", "content": "Hi" * 50}]}  # fmt: skip
    clock = {"bench_rate": rate, "bench_together": together, "bench_in_step": in_step}
    more = {"stream": True, **clock} if events else {}
    return post(json.dumps({**asked, **more}).encode())


def streams(
    target: Target, count: int, events: int, rate: int = EVENTS_PER_S, *, in_step: bool = False
) -> Streams:
    """`count` streams of `events` at once, `rate` a second each. One that is cut is missing in
    `complete`."""
    request = chat(events, rate=rate, together=count, in_step=in_step)
    found, began, poll, open_ = Streams(), monotonic(), select.epoll(), {}
    watched = max(count // _WATCHED, 1)
    for number in range(count):
        sock = connect(target.at)
        sock.sendall(request)
        sock.setblocking(False)
        open_[sock.fileno()] = _Stream(sock, watched=number % watched == 0)
        poll.register(sock, select.EPOLLIN)
    limit = began + 20 + 3 * events / rate
    silent, all_run, heard, timed = count, (0.0, 0.0, 0), 0, False
    while open_ and monotonic() < limit:
        for number, _ in poll.poll(1.0):
            stream = open_[number]
            try:
                data = stream.sock.recv(65536)
            except OSError:
                data = b""
            before = stream.events
            ended = not data or _heard(stream, data, found)
            heard += stream.events - before
            if not before and stream.events:
                silent -= 1
                if not silent:
                    found.rss_mb = target.rss_mb()
                    found.delays_ns.clear()  # of the begin, which costs more than an event
                    all_run = monotonic(), target.cpu_s(), heard
            if ended and not silent and not timed:
                timed = True
                between = heard - all_run[2]
                if between > count * events / 5:  # else they hardly ran together
                    found.rate = between / (monotonic() - all_run[0])
                    found.cpu_us = (target.cpu_s() - all_run[1]) * US / between
            if ended:
                found.complete += bool(data)
                found.events += stream.events
                stream.sock.close()
                del open_[number]
    for stream in open_.values():
        found.events += stream.events
        stream.sock.close()
    poll.close()
    return found


def _heard(stream: _Stream, data: bytes, found: Streams) -> bool:
    """Whether the stream has ended as it should."""
    lines, _, rest = (stream.rest + data).rpartition(b"\n")
    stream.events += lines.count(b'"token"')  # LiteLLM passes on nothing else
    if stream.watched:
        now = monotonic_ns()
        found.delays_ns += [now - int(sent) for sent in SENT.findall(lines)]
    stream.rest = rest
    stream.done = stream.done or b"[DONE]" in lines[-64:]
    return not rest and stream.done and (lines + b"\n").endswith(END)


def small(target: Target, count: int) -> list[float]:
    """Seconds of each request over one kept connection."""
    request, took = chat(), []
    with connect(target.at) as sock:
        for at in range(count + 20):
            began = perf_counter()
            exchange(sock, request)
            if at >= 20:
                took.append(perf_counter() - began)
    return took


def big(target: Target, mb: int, model: str = "a") -> tuple[float, str]:
    """Seconds for a body with an image of that size and the model's name last; who answered."""
    image = b"data:image/png;base64," + b"QUJD" * (mb * 250_000)
    body = b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"%s"}}]}'
    body = body % image + b'],"max_tokens":8,"model":"%s"}' % model.encode()
    request = post(body)
    with connect(target.at) as sock:
        began = perf_counter()
        answer = exchange(sock, request)
        return perf_counter() - began, json.loads(answer).get("served", "")


def hang_up(target: Target) -> int:
    """Open a stream, read its begin, leave. The instant of leaving, in ns."""
    with connect(target.at) as sock:
        sock.sendall(chat(10_000))
        while b'"t":' not in sock.recv(65536):
            pass
        return monotonic_ns()


def exchange(sock: socket.socket, request: bytes) -> bytes:
    """One request in one write, and the body of its answer. http.client would take longer than
    nginx."""
    sock.sendall(request)
    said = b""
    while True:
        head, end, body = said.partition(b"\r\n\r\n")
        if end and (found := LENGTH.search(head)) and len(body) >= int(found[1]):
            break
        if end and b"chunked" in head.lower() and body.endswith(END):
            body = body.partition(b"\r\n")[2]
            break
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("the answer was cut")
        said += more
    if b" 200 " not in head[:15]:
        raise ConnectionError(said[:500].decode(errors="replace"))
    return body

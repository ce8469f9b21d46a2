"""The hot path: an engine's answer goes to the client as the bytes that came.

The engine's connection hands its bytes to `Answer`, which writes them to the client's transport in
the same turn of the event loop (plain events in the midst of a stream it writes there by itself:
`Connection.straight`); who asked is only told of the end. Nothing is parsed: the
relay looks for a few words that no string inside JSON can contain unescaped (and reads the event
in which one stands), and holds back

* the head, until the first event or (up to 1 MiB) the whole of an unstreamed JSON answer is there:
  until then the request can be sent again to another incarnation of the engine;
* in a stream the piece of a chunk, until the chunk is whole, so that an error frame can follow
  whatever was passed on.

It leaves out one thing: the event with a stream's usage, where the client did not ask for it.

An answer that vLLM cut itself (`finish_reason: "abort"`, a bare `[DONE]`) is never passed on as a
complete one. After the first byte every error is a frame of the client's protocol and a closed
connection; where the protocol has no frames, a connection closed before the announced end.

Where the client has an early head already, the engine's is dropped, and what is no stream becomes
an error of the one that was begun. Everything else about silence is `Early`'s.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial

from homegptd.core.model import ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.runtime.lease import Lease

from . import errors
from .accounts import Record
from .ask import CLOSED, KEPT, Ask, Broken, Limits, Relayed
from .cuts import ERROR_EVENT, cut_at, going_on, reads_more
from .early import Early
from .errors import Problem
from .heads import HOP_BY_HOP, Head
from .outlet import Outlet
from .pool import Pool, Upstream
from .upstream import EVENT_END, Connection
from .usage import MARK, without

_HOLD_CHUNK = 64 * 1024
_HOLD_ANSWER = 1 << 20
_EVENT_ENDS = (EVENT_END, b"\n\n")
_DEATH = re.compile(rb"EngineCore encountered|EngineDeadError|new futures after shutdown")
"""What a vLLM with a dead or stopping engine core says (seen on 0.32)."""


async def relay(
    outlet: Outlet,
    ask: Ask,
    *,
    lease: Lease,
    upstream: Upstream,
    limits: Limits,
    record: Record,
    early: Early | None = None,
) -> Relayed:
    """Ask the engine and relay what it answers. Raises: Broken.

    `early` speaks where the engine says nothing; the answer continues what it began.
    """
    old = not outlet.modern
    connection = None if old or not ask.replayable else upstream.take()
    while True:
        if connection is None:
            connection = await connect(upstream, lease.model, unchunked=old)
        answer = Answer(outlet, ask, connection, lease, limits, record, upstream.pool, early)
        ended: asyncio.Future[None] = upstream.pool.loop.create_future()
        try:
            answer.begin(partial(_wake, ended))
            await ended
        finally:
            answer.leave()
        if answer.problem is not None:
            raise answer.problem
        if not answer.stale:
            return KEPT if answer.keep_alive else CLOSED
        connection = None


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():  # cancelled, perhaps
        ended.set_result(None)


async def connect(upstream: Upstream, model: ModelId, *, unchunked: bool = False) -> Connection:
    """A new connection to the engine. Raises: Broken."""
    try:
        return await upstream.connect(unchunked=unchunked)
    except (OSError, TimeoutError) as error:
        raise Broken(fault(model, f"cannot be reached ({error})"), again=True, sent=False) from None


def fault(model: ModelId, what: str) -> Refusal:
    """Why there is no answer, or only a part of one."""
    return Refusal(Reason.ENGINE_FAULT, f'the engine of "{model}" {what}')


class Answer:
    """One answer on its way from an engine to a client: `begin`, and `leave` once it is over."""

    __slots__ = (
        "_ask", "_begun", "_chunked", "_clean", "_client", "_connection", "_early", "_full",
        "_head", "_held", "_hold", "_idle_s", "_lease", "_limits", "_loop", "_outlet", "_over",
        "_plain", "_record", "_spoiled", "_sse", "_status", "_tell", "_tick_s",
        "_ticks", "_torn", "keep_alive", "problem", "stale",
    )  # fmt: skip

    def __init__(
        self, outlet: Outlet, ask: Ask, connection: Connection, lease: Lease,
        limits: Limits, record: Record, pool: Pool, early: Early | None,
    ) -> None:  # fmt: skip
        self._outlet, self._ask, self._connection, self._early = outlet, ask, connection, early
        self._lease, self._limits, self._record = lease, limits, record
        self._loop, self._ticks = pool.loop, pool.ticks
        self._client = outlet.transport
        self.keep_alive = outlet.keep_alive
        self.stale = False
        """Over before it began, because the connection was: nothing has been asked yet."""
        self.problem: Broken | None = None
        """How it ended, if not well."""
        self._head = b""
        self._status = 0
        self._sse = self._chunked = False
        self._held: bytes | bytearray = b""
        self._hold = _HOLD_ANSWER
        self._begun = self._over = self._plain = self._spoiled = self._torn = self._clean = False
        self._full = False
        self._tick_s = limits.tick_s
        self._idle_s = -self._tick_s  # the first tick may come at once

    def begin(self, tell: Callable[[], None]) -> None:
        """Ask. `tell` is called once, when the answer has ended one way or the other."""
        self.take_over(tell)
        self._connection.send(self, self._ask.head(), self._ask.body)

    def take_over(self, tell: Callable[[], None], waited_s: float = 0.0) -> None:
        """`begin` for what has been asked so long ago, and has not been answered."""
        self._tell = tell
        self._idle_s += waited_s
        protocol = self._outlet.protocol
        protocol.flow = self
        if protocol.writing_paused:
            self.on_full()
        self._lease.cut.add_done_callback(self._on_cut)
        self._ticks.join(self, self._tick_s)

    def leave(self) -> None:
        """Let go of everything, at the end or before: then the engine hears that nobody waits."""
        self._lease.cut.remove_done_callback(self._on_cut)
        self._ticks.leave(self, self._tick_s)
        self._connection.leave()
        self._outlet.protocol.flow = None
        if self._begun and not self._over:
            self._client.abort()  # cancelled, or a defect: nothing may follow what is out
        self._over = True

    # ------------------------------------------------------------ the engine speaks

    def on_head(self, head: Head) -> None:
        kind = head.kind
        endless = head.length is None and not head.chunked and head.status not in (204, 304)
        if head.status < 200 or endless:
            self._lost("sent an answer without a length")
            return
        self._status = head.status
        self._chunked = head.chunked and self._outlet.modern
        self._sse = head.chunked and kind.startswith(b"text/event-stream")
        if self._sse:
            self._hold = _HOLD_CHUNK
        elif not kind.startswith(b"application/json"):
            self._hold = 0
        if head.chunked and not self._chunked:
            self.keep_alive = False  # only the end of the connection can end this body
        self._head = self._client_head(head)
        if self._early is not None and not self._sse:
            self._early.disarm()
            if self._early.given:
                self._hold = _HOLD_ANSWER

    def _client_head(self, head: Head) -> bytes:
        version = b"1.1" if self._outlet.modern else b"1.0"
        lines = [b"HTTP/%s %d %s" % (version, head.status, head.reason)]
        lines += [b"%s: %s" % each for each in head.headers if each[0].lower() not in HOP_BY_HOP]
        more = self._outlet.client.headers
        lines += [b"%s: %s" % (name.encode(), text.encode()) for name, text in more]
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked")
        if not self.keep_alive:
            lines.append(b"Connection: close")
        elif version == b"1.0":
            lines.append(b"Connection: keep-alive")
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_body(self, data: bytes) -> None:
        connection = self._connection
        whole = connection.complete or (self._sse and connection.between)
        if self._held or not whole:
            held = self._held if isinstance(self._held, bytearray) else bytearray(self._held)
            held += data
            if not whole and len(held) < self._hold:
                self._held = held
                return
            data, self._held = bytes(held), b""
        torn, self._torn = self._torn, not whole
        if data.rfind(MARK) >= 0 or not (whole or self._sse):
            self._record.passed(data, whole=whole or self._sse)
            if self._ask.strip_usage and self._sse:
                data = without(data)
        flaw = self._flaw(data)
        if flaw is not None:
            at, what = flaw
            self._held = data[:at]
            self._torn = self._torn or (torn and self._whole_events() == 0)
            self._lost(what)
        elif self._begun:
            self._pass_on(data)
        elif data:
            self._begin(data)

    def _flaw(self, data: bytes) -> tuple[int, str] | None:
        """Where and why these bytes must not be passed on."""
        whole = self._connection.complete and not self._begun
        if (at := cut_at(self._ask.path, data, sse=self._sse, whole=whole)) >= 0:
            return at, "cut its answer"
        if data.rfind(ERROR_EVENT) >= 0:
            self._spoiled, self._plain = True, False
        if (self._spoiled or self._status >= 500) and (match := _DEATH.search(data)):
            return match.start(), "died over its answer"
        if self._sse and not self._begun and b"data: {" not in data and (
            self._connection.complete or b"data: [DONE]" in data
        ):  # fmt: skip
            return 0, "gave up before it answered"
        return None

    def _begin(self, data: bytes) -> None:
        """The first bytes: from here on the request cannot be sent again."""
        if self._early is not None:
            self._early.disarm()
            if self._early.given:
                if not self._sse:
                    self._no_stream(data)
                    return
                self._head = self._early.last_words("answers")
        self._begun = True
        self._ask.forget()
        if self._ask.learn is not None and self._status < 300:
            self._ask.learn(data)
        if self._sse:
            self._plain = self._status < 500 and not (self._spoiled or reads_more(self._ask.path))
            self._record.began()
        else:
            self._hold = 0
        self._pass_on(self._head + data)

    def _no_stream(self, data: bytes) -> None:
        """The client has status 200 and a stream already; what came is neither."""
        self._end(fault(self._lease.model, "answered without a stream"), again=False)
        if self.problem is not None and self._status >= 400:
            self.problem.problem = errors.said(self._status, data)
            if self._status < 500:
                self._lease.served()

    def on_end(self) -> None:
        if not self._over and not self._begun:
            self._begin(b"")
        if self._over:
            return
        self._over = True
        if self._status < 500 and not self._spoiled and not self._client.is_closing():
            self._lease.served()
        self._tell()

    def on_lost(self, why: str) -> None:
        connection = self._connection
        if connection.used and connection.silent and not self._over:
            self.stale = self._over = True
            self._tell()
        else:
            self._lost(f"{why} in the middle of an answer" if self._begun else why)

    # ------------------------------------------------------------ the client reads

    def _pass_on(self, data: bytes) -> None:
        """And what comes next goes straight on, if it ends as this event of many does."""
        connection = self._connection
        self._clean = data.endswith(_EVENT_ENDS)
        if self._early is not None:
            data = self._early.last_words("goes on") + data
        if self._plain and self._clean and self._chunked and connection.between:
            connection.go_straight(self._client, going_on(data))
        self._write(data)

    def _write(self, data: bytes) -> None:
        if data and not self._client.is_closing():  # uvloop raises where asyncio only warns
            self._client.write(data)

    def on_full(self) -> None:
        if not self._over:
            self._full = True
            self._connection.pause()

    def on_drained(self) -> None:
        self._full = False
        if not self._over:
            self._idle_s = 0.0
            self._connection.resume()

    # ------------------------------------------------------------ ends before the end

    def _on_cut(self, cut: asyncio.Future[Refusal]) -> None:
        """What has not begun goes back into the queue where waiting again makes sense."""
        if not cut.cancelled():
            refusal = cut.result()
            makes_sense = refusal.reason is Reason.CUT and refusal.retry_after_s is not None
            self._end(refusal, again=makes_sense)

    def tick(self) -> None:
        """Count silence in steps: time spent frozen does not count, whenever it began."""
        if self._over:
            return  # nobody has left it yet
        if self._early is not None and not self._full:
            self._show_life(self._early)
        spoke, self._connection.spoke = self._connection.spoke, False
        if spoke:
            self._connection.heard()
        if spoke or (self._lease.frozen and not self._full):
            self._idle_s = 0.0
            return
        self._idle_s += self._tick_s
        limits = self._limits
        if self._full:
            if self._idle_s >= limits.client_s:
                self._client.abort()  # which cancels this request
        elif self._idle_s >= (
            limits.between_bytes_s if self._head or self._begun else limits.first_byte_s
        ):
            if self._connection.engine_silent_s() >= self._idle_s:
                self._lease.silent(self._idle_s)
            self._lost(f"said nothing for {self._idle_s:g} s", again=False)

    def _show_life(self, early: Early) -> None:
        """Before the answer, and between two events of a stream that has fallen silent."""
        if self._connection.spoke or not early.due():
            return
        if not self._begun:
            if self._sse or not self._head:
                early.speak()
        elif self._sse and self._clean and not self._torn:
            early.speak(answering=True)
            self._connection.straight = None  # a status line may have to end first

    def _lost(self, what: str, *, again: bool = True) -> None:
        self._end(fault(self._lease.model, what), again=again)

    def _end(self, refusal: Refusal, *, again: bool) -> None:
        if self._over:
            return
        self._over = True
        self._connection.discard()
        again = again and not self._begun and self._ask.replayable
        self.problem = Broken(refusal, begun=self._begun, again=again)
        self.problem.problem = told = self._outlet.told(self.problem.problem)
        if self._begun:
            self._end_honestly(told)
        self._tell()  # last: who hears it may begin the next request over this connection

    def _end_honestly(self, problem: Problem) -> None:
        client = self._client
        if client.is_closing():
            return
        if self._sse and not self._torn:
            if self._early is not None:
                self._write(self._early.last_words("failed"))
            self._write(bytes(self._held[: self._whole_events()]))
            event = errors.frame(problem, self._ask.shape)
            chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
            client.write(chunk if self._chunked else event)
            if self._chunked and not self._full and self.keep_alive and self.problem is not None:
                self.problem.kept = True  # a whole message: the next request is welcome
                return
        client.close()
        self._loop.call_later(self._limits.linger_s, client.abort)

    def _whole_events(self) -> int:
        """How many of the bytes that are held belong to them."""
        end = EVENT_END if self._chunked else b"\n\n"
        kept = self._held.rfind(end)
        return kept + len(end) if kept >= 0 else 0

"""JSON-RPC 2.0 on a Unix socket: one message a line, calls side by side.

Limits, each answered in words where words can still arrive: a message's size, entries of a batch,
calls at once per connection (further ones wait unread), connections (the one that has been quiet
longest makes room), and the time a peer may leave its answers unread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pwd
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from homegptd.wire import codes, rpc
from homegptd.wire.control import Notice
from homegptd.wire.schema import word

from .methods import METHODS, Caller, Control, Entry, Refused, Request, Table, arguments, unknown

log = logging.getLogger(__name__)

Follow: TypeAlias = Callable[[], Awaitable[None]]
_turns = itertools.count()  # who was heard last; uvloop's clock has ties
_CREDENTIALS = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may take. Bytes and seconds."""

    message_bytes: int = 1 << 20
    batch: int = 100
    calls: int = 64  # at once, per connection
    connections: int = 400
    unread_s: float = 10.0  # answers that nobody reads for so long end the connection


class ControlServer:
    """Serves one `Control` on listening sockets; `serve` is its life."""

    def __init__(
        self, control: Control, *, table: Table = METHODS, limits: Limits | None = None
    ) -> None:
        self._control = control
        self._table = table
        self._limits = limits or Limits()
        self._connections: set[_Connection] = set()

    @property
    def connections(self) -> int:
        """How many callers are connected."""
        return len(self._connections)

    async def serve(self, sock: socket.socket) -> None:
        """Accept and serve until cancelled; then tell every caller and close. `sock` stays open.

        The socket may be ours (`listening`) or one that systemd keeps; its file is not touched.
        """
        sock.setblocking(False)
        async with asyncio.TaskGroup() as group:
            while True:
                connection = await self._accept(sock)
                if connection is not None:
                    self._connections.add(connection)
                    group.create_task(self._serve_one(connection), name="control connection")

    async def _accept(self, sock: socket.socket) -> _Connection | None:
        accepted = await _accept(sock)
        try:
            connection = await _Connection.open(accepted, self._control, self._table, self._limits)
        except OSError:  # gone before it began
            accepted.close()
            return None
        if self._room():
            return connection
        connection.say_closing("busy", f"{len(self._connections)} connections, and all at work")
        connection.close()
        return None

    async def _serve_one(self, connection: _Connection) -> None:
        try:
            await connection.run()
        except asyncio.CancelledError:
            connection.say_closing("shutting-down", "homegptd is stopping")
            raise
        except Exception:
            log.exception("control connection of %s broke", connection.caller)
        finally:
            self._connections.discard(connection)
            connection.close()

    def _room(self) -> bool:
        """Whether one more may stay; the one that has been quiet longest makes room."""
        if len(self._connections) < self._limits.connections:
            return True
        idle = [connection for connection in self._connections if not connection.busy]
        if not idle:
            return False
        quietest = min(idle, key=lambda connection: connection.last_heard)
        quietest.say_closing("busy", "too many connections; yours was quiet longest")
        self._connections.discard(quietest)
        quietest.close()
        return True


async def _accept(sock: socket.socket) -> socket.socket:
    loop = asyncio.get_running_loop()
    while True:
        try:
            accepted, _ = await loop.sock_accept(sock)
        except ConnectionAbortedError:
            continue
        except OSError as exc:
            # out of descriptors (EMFILE, ENFILE): no event tells when there is one again
            log.warning("cannot accept on the control socket: %s", exc)
            await asyncio.sleep(0.2)
            continue
        return accepted


class _Gone(Exception):
    """The peer does not read, or is not there any more."""


@dataclass(slots=True, eq=False)
class _Connection:
    """One caller: its lines, its calls under way, its answers."""

    caller: Caller
    control: Control
    table: Table
    limits: Limits
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    last_heard: int  # of `_turns`
    _running: int = 0
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _follows: dict[str, Follow] = field(default_factory=dict)
    _followed: set[str] = field(default_factory=set)

    @classmethod
    async def open(
        cls, accepted: socket.socket, control: Control, table: Table, limits: Limits
    ) -> _Connection:
        """A connection over an accepted socket. Raises: OSError if the peer has left."""
        caller = _caller(accepted)
        accepted.setblocking(False)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=limits.message_bytes, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted)
        transport.set_write_buffer_limits(0)  # `drain` means: it is out
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return cls(caller, control, table, limits, reader, writer, next(_turns))

    @property
    def busy(self) -> bool:
        """Whether a call is under way or something was subscribed to."""
        return self._running > 0 or bool(self._followed)

    async def run(self) -> None:
        """Serve until the peer has left and its calls have been answered, or until cancelled."""
        try:
            async with asyncio.TaskGroup() as calls:
                await self._read_all(calls)
                self._check_half_open()
        except* (_Gone, ConnectionError):
            self.abort()

    def say_closing(self, reason: str, message: str) -> None:
        """Tell the peer that this is the end; what does not fit the buffers is lost."""
        notice = rpc.Notification(Notice.CLOSING, {"reason": reason, "message": message})
        self._write_now(rpc.encode(notice))

    def close(self) -> None:
        """Close once what is buffered is out, or in a second."""
        self.writer.close()
        asyncio.get_running_loop().call_later(1.0, self.abort)

    def abort(self) -> None:
        """Close at once."""
        self.writer.transport.abort()

    # what handlers use (methods.Session)

    async def notify(self, notice: str, params: Mapping[str, object]) -> None:
        """Send a notification. Raises: _Gone."""
        await self._send(rpc.encode(rpc.Notification(str(notice), dict(params))))

    def after_reply(self, name: str, follow: Follow) -> None:
        if name not in self._followed:
            self._followed.add(name)
            self._follows[name] = follow

    # reading

    async def _read_all(self, calls: asyncio.TaskGroup) -> None:
        slots = asyncio.Semaphore(self.limits.calls)
        while True:
            try:
                line = await _read_line(self.reader)
            except asyncio.LimitOverrunError:
                await self._send(rpc.encode(self._too_large()))
                continue
            if line is None:
                return
            self.last_heard = next(_turns)
            if not line.strip():
                continue
            await slots.acquire()
            calls.create_task(self._answer_line(line, calls, slots), name="control call")

    def _too_large(self) -> rpc.Failure:
        text = f"a message may have {self.limits.message_bytes} bytes"
        return _failure(None, Refused("too-large", text))

    def _check_half_open(self) -> None:
        """Raises: _Gone if the peer closed wholly; `nc -N` closes its half and still listens."""
        sock = self.writer.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            raise _Gone
        poll = select.poll()
        poll.register(sock.fileno(), 0)  # POLLHUP comes unasked
        if any(event & select.POLLHUP for _, event in poll.poll(0)):
            raise _Gone

    # answering

    async def _answer_line(
        self, line: bytes, calls: asyncio.TaskGroup, slots: asyncio.Semaphore
    ) -> None:
        self._running += 1
        try:
            reply = await self._reply_to(line)
            if reply:
                await self._send(reply)
        finally:
            self._running -= 1
            slots.release()
        while self._follows:
            name, follow = self._follows.popitem()
            calls.create_task(_run(follow), name=f"control {name}")

    async def _reply_to(self, line: bytes) -> bytes | None:
        try:
            message = rpc.parse(line)
            if isinstance(message, tuple):
                return await self._batch(message)
            answer = await self._answer(message)
        except rpc.BadMessage as bad:
            answer = bad.failure
        return _encoded(answer) if answer else None

    async def _batch(self, batch: rpc.Batch) -> bytes | None:
        if len(batch) > self.limits.batch:
            text = f"Invalid Request: a batch may have {self.limits.batch} entries"
            raise rpc.BadMessage(rpc.Code.INVALID_REQUEST, text)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._answer(item), name="batched") for item in batch]
        answers = [answer for task in tasks if (answer := task.result())]
        if not answers:
            return None
        return b"[" + b",".join(_encoded(answer).rstrip() for answer in answers) + b"]\n"

    async def _answer(self, item: rpc.Item | rpc.BadMessage) -> rpc.Reply | rpc.Failure | None:
        match item:
            case rpc.BadMessage():
                return item.failure
            case rpc.Call(call_id, method, params):
                return await self._call(Request(self, call_id), method, params)
            case rpc.Notification(method, params):
                await self._call(Request(self, None, silent=True), method, params)
                return None
            case rpc.Reply() | rpc.Failure():
                text = "Invalid Request: nothing was asked of you"
                return rpc.Failure(None, int(rpc.Code.INVALID_REQUEST), text)

    async def _call(self, call: Request, method: str, params: object) -> rpc.Reply | rpc.Failure:
        """Carry out one call; whatever goes wrong becomes its answer."""
        entry = self.table.get(method)
        if entry is None:
            message, hint = unknown(self.table, method)
            data = {"reason": "bad-request", "hint": hint}
            return rpc.Failure(call.id, int(rpc.Code.METHOD_NOT_FOUND), message, data)
        try:
            given = arguments(entry, params)
            self._note(entry, given)
            return rpc.Reply(call.id, await entry.run(call, given))
        except Refused as refused:
            return _failure(call.id, refused)
        except asyncio.CancelledError:
            if not call.silent:
                self._say_stopping(call.id)
            raise
        except (_Gone, ConnectionError):
            raise _Gone from None
        except Exception as exc:
            log.exception("control method %s failed", entry.name)
            return _failure(call.id, Refused("internal", f"{entry.name} broke: {exc!r}"))

    def _note(self, entry: Entry[object], given: object) -> None:
        if entry.changes:
            who = self.caller
            text = "control: %s %s by=%s uid=%d pid=%d"
            log.info(text, entry.name, _told(given), who.name, who.uid, who.pid)

    def _say_stopping(self, call_id: rpc.Id) -> None:
        refused = Refused(
            "shutting-down", "homegptd is stopping; the operation goes on without you"
        )
        self._write_now(rpc.encode(_failure(call_id, refused)))

    # writing

    async def _send(self, line: bytes) -> None:
        """Write a line; raises _Gone if the peer leaves its answers unread for too long."""
        async with self._writing:
            if self.writer.is_closing():
                raise _Gone
            self.writer.write(line)
            try:
                async with asyncio.timeout(self.limits.unread_s):
                    await self.writer.drain()
            except TimeoutError:
                log.info("control: %s does not read its answers, closing", self.caller)
                self.abort()
                raise _Gone from None
            except ConnectionError:
                raise _Gone from None

    def _write_now(self, line: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(line)


async def _run(follow: Follow) -> None:
    await follow()


async def _read_line(reader: asyncio.StreamReader) -> bytes | None:
    """The next line, None at the end.

    Raises: LimitOverrunError when a line was too long; it has been read over, the next one is next.
    """
    overrun: asyncio.LimitOverrunError | None = None
    while True:
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as exc:
            overrun = exc
            await reader.readexactly(exc.consumed)
            continue
        except asyncio.IncompleteReadError as exc:
            line = exc.partial  # a last line may lack its end
        if overrun is not None:
            raise overrun
        return line or None


def _encoded(answer: rpc.Reply | rpc.Failure) -> bytes:
    """A result that JSON cannot say is a bug of ours; the caller still gets an answer."""
    try:
        return rpc.encode(answer)
    except (TypeError, ValueError) as exc:
        log.exception("a result is not JSON")
        return rpc.encode(
            _failure(answer.id, Refused("internal", f"the result is not JSON: {exc}"))
        )


def _failure(call_id: rpc.Id, refused: Refused) -> rpc.Failure:
    data = {"reason": refused.reason, "hint": refused.hint}
    return rpc.Failure(call_id, codes.row(refused.reason).rpc, refused.message, data)


def _told(given: object) -> str:
    pairs = given.items() if isinstance(given, dict) else ()
    return " ".join(f"{key}={word(value)}" for key, value in pairs if key != "wait")


def _caller(accepted: socket.socket) -> Caller:
    raw = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Caller(pid, uid, gid, _user_name(uid))


@lru_cache(maxsize=64)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"

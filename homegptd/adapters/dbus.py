"""A D-Bus connection for asyncio on jeepney's messages: no tasks and no threads of its own.

jeepney's own asyncio part reads in a task that nobody owns, and drops signals when a queue is full.
Here bytes become calls of the future or the callback that waits for them, in the loop's read event.
See the D-Bus specification 0.43 for the wire, dbus-daemon(1) for the bus.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from jeepney import DBusAddress, HeaderFields, Message, MessageType, Parser, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.bus import find_system_bus, get_bus

log = logging.getLogger(__name__)

CONNECT_S = 10.0
CALL_S = 25.0
"""As libdbus: systemd may be busy with a reload of all its units."""

_DAEMON = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")


class BusError(Exception):
    """A call was answered with an error; `name` is the D-Bus name of it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{message} ({name})" if message else name)
        self.name = name
        self.message = message


class BusLost(Exception):
    """The bus cannot be reached, or the connection ended before the answer came."""


@dataclass(frozen=True, slots=True)
class Signal:
    """`sender` is the unique name (`:1.3`), never the well-known one that a match rule names."""

    sender: str
    path: str
    interface: str
    member: str
    body: tuple[Any, ...]


class Bus:
    """One connection. Make it with `connect`; once `lost` it stays so."""

    def __init__(
        self,
        protocol: "_Protocol",
        on_signal: Callable[[Signal], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        protocol.on_signal = on_signal
        protocol.on_lost = on_lost

    @classmethod
    async def connect(
        cls,
        address: str | None,
        *,
        on_signal: Callable[[Signal], None],
        on_lost: Callable[[], None],
    ) -> "Bus":
        """To the system bus, or to an address like `unix:path=/run/x`.

        Callbacks run in the loop's read event: they must be quick and must not raise. Raises
        `BusLost` if nobody answers, lets us in and gives us a name within 10 s.
        """
        path = find_system_bus() if address is None else get_bus(address)
        protocol = _Protocol()
        bus = cls(protocol, on_signal, on_lost=_nothing)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_unix_connection(lambda: protocol, path)
                await protocol.authenticated
                await bus.call(_DAEMON, "Hello")
        except (OSError, TimeoutError, BusError, BusLost) as error:
            bus.close()
            raise BusLost(f"{path}: {_words(error)}") from error
        except BaseException:  # cancelled
            bus.close()
            raise
        protocol.on_lost = on_lost
        return bus

    @property
    def lost(self) -> bool:
        return self._protocol.lost

    async def call(
        self, at: DBusAddress, method: str, signature: str = "", *args: Any, call_s: float = CALL_S
    ) -> tuple[Any, ...]:
        """Send and wait for the answer. Raises BusError, BusLost; TimeoutError after `call_s`."""
        async with asyncio.timeout(call_s):
            return await self.send(at, method, signature, *args)

    def send(
        self, at: DBusAddress, method: str, signature: str = "", *args: Any
    ) -> "asyncio.Future[tuple[Any, ...]]":
        """The answer as a future: several calls on their way cost one round trip."""
        return self._protocol.send(new_method_call(at, method, signature or None, args))

    async def match(self, rule: str) -> None:
        """Ask the bus for signals; see "Match Rules" in the specification."""
        await self.call(_DAEMON, "AddMatch", "s", rule)

    def close(self) -> None:
        """At once and without a word to `on_lost`; who waits for an answer gets BusLost."""
        self._protocol.on_lost = _nothing
        self._protocol.end(None)


class _Protocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.authenticated: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_signal: Callable[[Signal], None] = _nobody
        self.on_lost: Callable[[], None] = _nothing
        self.lost = False
        self._auth: Authenticator | None = Authenticator()
        self._parser = Parser()
        self._serials = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Any, ...]]] = {}
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, whatever they can do
        self._transport = cast("asyncio.WriteTransport", transport)
        self._authenticate(b"")

    def data_received(self, data: bytes) -> None:
        if self._auth is not None:
            self._authenticate(data)
            return
        try:
            messages: list[Message] = self._parser.feed(data)
        except Exception as error:  # whatever a parser meets in nonsense: the stream is lost
            log.exception("cannot read what the bus sent")
            self.end(error)
            return
        for message in messages:
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(exc)

    def send(self, message: Message) -> "asyncio.Future[tuple[Any, ...]]":
        answer: asyncio.Future[tuple[Any, ...]] = asyncio.get_running_loop().create_future()
        if self.lost or self._transport is None:
            answer.set_exception(BusLost("the connection to the bus is lost"))
            return answer
        serial = next(self._serials)
        self._waiting[serial] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(serial, None))
        self._transport.write(message.serialise(serial))
        return answer

    def _authenticate(self, data: bytes) -> None:
        auth, transport = self._auth, self._transport
        if auth is None or transport is None:
            return
        try:
            if data:
                auth.feed(data)
            for words in iter(auth.data_to_send, None):
                if not words:
                    return
                transport.write(words)
        except AuthenticationError as error:
            self.end(error)
            return
        transport.write(BEGIN)
        self._auth = None
        self.authenticated.set_result(None)

    def _take(self, message: Message) -> None:
        fields = message.header.fields
        match message.header.message_type:
            case MessageType.signal:
                self.on_signal(_signal(message))
            case MessageType.method_return | MessageType.error:
                answer = self._waiting.pop(fields.get(HeaderFields.reply_serial), None)
                if answer is None or answer.done():
                    return
                if message.header.message_type is MessageType.error:
                    answer.set_exception(_error(message))
                else:
                    answer.set_result(tuple(message.body))
            case _:  # nobody has a reason to call us
                pass

    def end(self, error: Exception | None) -> None:
        if self.lost:
            return
        self.lost = True
        if self._transport is not None:
            self._transport.abort()
        gone = BusLost(_words(error) if error else "the bus hung up")
        waiting = list(self._waiting.values())
        if not self.authenticated.done():
            self.authenticated.set_exception(gone)
            self.authenticated.exception()  # taken note of: perhaps nobody waits for it
        for answer in waiting:
            if not answer.done():
                answer.set_exception(gone)
                answer.exception()
        self.on_lost()


def _signal(message: Message) -> Signal:
    fields = message.header.fields
    return Signal(
        fields.get(HeaderFields.sender, ""),
        fields[HeaderFields.path],
        fields[HeaderFields.interface],
        fields[HeaderFields.member],
        tuple(message.body),
    )


def _error(message: Message) -> BusError:
    name = message.header.fields.get(HeaderFields.error_name, "")
    text = message.body[0] if message.body and isinstance(message.body[0], str) else ""
    return BusError(name, text)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_S:.0f} s"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)


def _nobody(signal: Signal) -> None:
    pass


def _nothing() -> None:
    pass

"""Responses in the background (`"background": true`): made after their request was answered.

vLLM (0.32) answers such a request at once, and no connection says when its response has ended. So
the lease of the request is held until the engine says so, asked now and then, or until the response
must end; then it is cancelled at the engine. Whoever asks for it meanwhile is answered under that
lease, whatever the engine's phase: the server before its core answers from memory. How it ended is
kept here, since the engine may sleep or be gone when somebody asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
import msgspec

from homegptd.core.invariants import held as tickets_in
from homegptd.core.model import ModelId
from homegptd.core.refusals import Reason, Refusal
from homegptd.core.words import span
from homegptd.runtime.lease import Lease
from homegptd.runtime.scheduler import Scheduler

from .accounts import Accounts, End, Record
from .ask import Limits
from .clients import asking
from .pool import Address
from .stored import Stored

log = logging.getLogger(__name__)

_OFTEN_S, _SELDOM_S, _SHARE = 0.5, 5.0, 0.1
"""Between two looks: a share of the time it has taken so far, within these bounds, in seconds."""
_LOOK_S = 2.0
"""For one call to an engine. Two of them are less than `core.drains.CUT_GRACE_S`."""
_ON_ITS_WAY = frozenset({"queued", "in_progress"})
_UNKNOWN = "unknown"
"""To its engine. Then the request was an ordinary one for vLLM, and has its answer."""
_ENDS = {
    "completed": End.ANSWERED, "incomplete": End.ANSWERED, _UNKNOWN: End.ANSWERED,
    "cancelled": End.ABORTED,
}  # fmt: skip


class Begun:
    """A request for one; the relay's first bytes say under which id it began."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = lambda ident: None


@dataclass(slots=True)
class _Held:
    lease: Lease
    ident: str
    record: Record
    address: Address
    """As it was then: the model may have left the configuration since."""
    secret: str | None
    relayed: asyncio.Event
    """Its own request is over: of a stream that is when the client has all of it, or is gone."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    seen: bytes = b""
    """What the engine said of it last."""
    over: bool = False
    counts: ExitStack = field(default_factory=ExitStack)
    """It counts for the key of its client from the end of its request on, until it is over."""


class _Status(msgspec.Struct):
    status: str = ""


class Background:
    """Holds engines awake for what they make in the background."""

    def __init__(
        self,
        scheduler: Scheduler,
        stored: Stored,
        accounts: Accounts,
        *,
        addresses: Callable[[ModelId], Address],
        engine_keys: Callable[[ModelId], str | None],
        limits: Callable[[ModelId], Limits],
    ) -> None:
        self._scheduler, self._stored, self._accounts = scheduler, stored, accounts
        self._addresses, self._engine_keys, self._limits = addresses, engine_keys, limits

    @asynccontextmanager
    async def beyond(self, lease: Lease, begun: Begun, record: Record) -> AsyncIterator[None]:
        """The lease for the block, and beyond it where a response began. Raises: Refused."""
        client, model, relayed = asking(), lease.model, asyncio.Event()
        held: _Held | None = None

        def began(ident: str) -> None:
            nonlocal held
            held = _Held(lease, ident, record, at, secret, relayed)
            record.goes_on = True
            self._stored.running[model, ident] = lease
            work = self._hold(held, stack.pop_all())
            self._scheduler.beside(work, f"response {ident}")

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(lease)
            at, secret = self._addresses(model), self._engine_keys(model)
            begun.tell = began
            try:
                yield
            finally:
                relayed.set()
                if held is not None and not held.over:
                    held.counts.enter_context(client.goes_on())

    async def _hold(self, held: _Held, stack: AsyncExitStack) -> None:
        try:
            async with stack:
                end = await self._ended(held)
                await held.relayed.wait()
                held.record.end = end
        except Exception:
            log.exception('the response %s of "%s"', held.ident, held.lease.model)
        finally:
            held.over = True
            held.counts.close()
            self._forget(held)
            held.record.goes_on = False
            self._accounts.close(held.record)

    def _forget(self, held: _Held) -> None:
        running, key = self._stored.running, (held.lease.model, held.ident)
        if running.get(key) is held.lease:  # else its id was given anew
            del running[key]

    # ------------------------------------------------------------ until it ends

    async def _ended(self, held: _Held) -> End:
        lease, took_s = held.lease, 0.0
        lease.cut.add_done_callback(lambda cut: held.news.set())
        longest_s = self._longest_s(lease.model)
        with self._scheduler.watched(lambda lines: held.news.set()):
            while True:
                pause_s = min(max(took_s * _SHARE, _OFTEN_S), _SELDOM_S)
                await self._rest(held, pause_s)
                if lease.cut.done():
                    return await self._give_up(held, lease.cut.result().message)
                if self._is_lost(lease):
                    return self._over(held, "failed", f'the engine of "{lease.model}" was lost')
                status = await self._look(held)
                if status is not None and status not in _ON_ITS_WAY:
                    return self._over(held, status)
                took_s += 0.0 if lease.frozen else pause_s
                if took_s >= longest_s:
                    return await self._give_up(held, f"it took more than {span(longest_s)}")

    def _longest_s(self, model: ModelId) -> float:
        """vLLM forgets some that fail: they are "queued" for ever (0.32)."""
        longest_s = self._scheduler.state.policy.max_answer_s
        return max(longest_s, self._limits(model).first_byte_s)

    async def _rest(self, held: _Held, seconds: float) -> None:
        """Until it is time to look, or there is nothing to wait for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (held.lease.cut.done() or self._is_lost(held.lease)):
                    held.news.clear()
                    await held.news.wait()

    def _is_lost(self, lease: Lease) -> bool:
        engine = self._scheduler.state.engines.get(lease.model)
        return engine is None or lease.ticket.id not in tickets_in(engine)

    async def _give_up(self, held: _Held, why: str) -> End:
        """Unless it has ended by itself meanwhile."""
        await self._ask(held, "POST", "/cancel")
        status = await self._look(held)
        if status in _ENDS and status != "cancelled":
            return self._over(held, status)
        return self._over(held, "cancelled", why)

    def _over(self, held: _Held, status: str, why: str = "") -> End:
        """`why`: it is not the engine that says so."""
        lease, ident = held.lease, held.ident
        self._forget(held)
        held.record.passed(held.seen, whole=True)
        owner = self._stored.owner(ident, self._scheduler.state.engines)
        if held.seen and status != _UNKNOWN and owner in (None, lease.model):
            self._stored.keep(ident, lease.model, _told(held.seen, status, why))
        if why:
            log.warning('the response %s of "%s" is %s: %s', ident, lease.model, status, why)
        end = End.FAILED if why else _ENDS.get(status, End.FAILED)
        if end is not End.ANSWERED and not lease.cut.done():  # vLLM never ends its stream (0.32)
            lease.cut.set_result(Refusal(Reason.CUT, why or f"the response {ident} is {status}"))
        return end

    # ------------------------------------------------------------ the engine

    async def _look(self, held: _Held) -> str | None:
        """Its status; None where the engine does not say."""
        answer = await self._ask(held, "GET")
        if answer is None or answer[0] != 200:
            return _UNKNOWN if answer is not None and answer[0] == 404 else None
        try:
            status = msgspec.json.decode(answer[1], type=_Status).status
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        held.seen = answer[1]
        return status

    async def _ask(self, held: _Held, method: str, more: str = "") -> tuple[int, bytes] | None:
        at, secret = held.address, held.secret
        unix = isinstance(at, str)
        connector = aiohttp.UnixConnector(at) if isinstance(at, str) else aiohttp.TCPConnector()
        url = "http://engine" if unix else "http://{}:{}".format(*at)
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        try:
            async with (
                asyncio.timeout(_LOOK_S),
                aiohttp.ClientSession(connector=connector, headers=headers) as http,
                http.request(method, f"{url}/v1/responses/{held.ident}{more}") as reply,
            ):
                return reply.status, await reply.read()
        except (OSError, TimeoutError, aiohttp.ClientError):
            return None  # whether it lives is for others to find out


def _told(seen: bytes, status: str, why: str) -> bytes:
    """What the engine said last, and what came of it."""
    if not why:
        return seen
    error = {"code": "server_error", "message": why}
    return msgspec.json.encode({**msgspec.json.decode(seen), "status": status, "error": error})

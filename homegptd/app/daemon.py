"""One life of the daemon: wire everything, observe, serve, and leave in good order."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from homegptd.adapters.card_file import CardFile
from homegptd.adapters.meter import CardSource, Meter
from homegptd.adapters.notify import Notifier, watchdog_interval_s
from homegptd.adapters.nvml import Nvml
from homegptd.adapters.sockets import parse_listen, spelled
from homegptd.adapters.store import Store
from homegptd.config.keys import Key
from homegptd.config.parse import ConfigError, load
from homegptd.config.schema import CONTAINER_GATEWAY, Config
from homegptd.core.events import ConfigChanged, ShutdownAsked
from homegptd.core.model import ModelId
from homegptd.core.refusals import Fault
from homegptd.core.story import Line, summary
from homegptd.core.words import count
from homegptd.faces import http
from homegptd.faces.accounts import Accounts
from homegptd.faces.ask import Limits
from homegptd.faces.clients import Keyring
from homegptd.faces.control import ControlServer
from homegptd.faces.desk import Desk
from homegptd.faces.guard import Guard
from homegptd.faces.methods import Refused
from homegptd.faces.pool import Address
from homegptd.faces.router import Settings as RouterSettings
from homegptd.faces.stored import Stored
from homegptd.runtime.bootstrap import observe
from homegptd.runtime.heartbeat import Heartbeat
from homegptd.runtime.keeper import Keeper, Pins
from homegptd.runtime.measuring import watch
from homegptd.runtime.orders import Orders
from homegptd.runtime.race import first
from homegptd.runtime.scheduler import Scheduler
from homegptd.wire.control import LogsView
from homegptd.wire.paths import socket_to_ask

from .access import engine_keys, guard, keyring
from .backend import choose
from .doors import CannotServe, Doors, open_doors
from .parts import address, clients, difference, first_state, only_one, router_settings
from .setup import Cards, Places, set_up

log = logging.getLogger(__name__)

CUT_S = 1.0
"""How long answers that were cut at the stop may take to tell their clients so, in seconds."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line decided."""

    config: Path
    socket: str
    state_dir: Path
    listen: tuple[str, ...]
    may_leave_engines: bool = True
    """Whether a defect leaves the engines running, for the next daemon to adopt."""
    card_file: Path | None = None
    """A simulated box to measure instead of the driver's cards."""
    stop_s: float = 20.0
    """How long running answers may take to end at a stop."""

    @property
    def places(self) -> Places:
        at = Path(self.socket)
        sockets = at.parent / "engines" if at.name == "control.sock" else Path(f"{at}.engines")
        return Places(sockets=sockets, logs=self.state_dir / "logs")


class _Given(TypedDict):
    """What all HTTP doors share."""

    scheduler: Scheduler
    desk: Desk
    addresses: Callable[[ModelId], Address]
    engine_keys: Callable[[ModelId], str | None]
    settings: RouterSettings
    guard: Guard
    stored: Stored
    accounts: Accounts


class Daemon:
    """Everything of one life. `serve` returns when it was asked to stop."""

    @classmethod
    async def prepared(cls, config: Config, options: Options) -> "Daemon":
        """With the cards looked at. Raises: ConfigError where the API keys cannot be read."""
        source: CardSource = CardFile(options.card_file) if options.card_file else Nvml()
        reading = await source.read()
        return cls(config, options, source, reading.cards if reading else {})

    def __init__(self, config: Config, options: Options, source: CardSource, cards: Cards) -> None:
        self.options = options
        self.cards = cards
        self.setup = set_up(config, options.places, cards)
        self.loop = asyncio.get_running_loop()
        self.store = Store(options.state_dir / "state.sqlite")
        self.backend = choose(config, self.setup, options.places, options.state_dir)
        self.engines = clients(self.setup)
        self.meter = Meter(source, self.backend.units, lambda: self.scheduler.state.engines)
        self.orders = Orders(
            self.backend.units,
            self.engines,
            self.store,
            start_limit_s=self._start_limit_s,
            meter=self.meter,
        )
        self.scheduler = Scheduler(
            first_state(self.setup, self.store), self.orders, max_wait_s=config.router.max_wait_s
        )
        self.keeper = Keeper(self.store, self.scheduler.state)
        self.orders.connect(self.scheduler.post, lambda: self.scheduler.state)
        self._engine_keys = engine_keys(config)
        given = keyring(config)
        self._keys = None if given is None else Keyring(given)
        self.accounts = Accounts()
        self._http_doors: list[http.Door] = []
        self.desk = Desk(
            self.scheduler,
            self.setup.names,
            kinds=self.setup.kinds,
            adjustments=self.setup.adjustments,
            by_id_only=self.setup.by_id_only,
            logs=self._logs,
            reload=self._reload,
            accounts=self.accounts,
            meter=self.meter,
        )
        self.notifier = Notifier()
        self.stop_asked = asyncio.Event()
        self._on_ready: Callable[[], None] | None = None
        self._patience: asyncio.Timeout | None = None

    async def serve(self) -> None:
        """From the first socket to the last engine.

        Raises: CannotServe; Fault if an engine could not be ended; ExceptionGroup of a defect, and
        then the engines are left running.
        """
        with ExitStack() as stack:
            stack.callback(self.notifier.close)
            stack.callback(self.store.close)
            stack.enter_context(only_one(self.options.state_dir))
            doors = stack.enter_context(
                open_doors(
                    self.options.socket,
                    (*self.options.listen, *self._listen_for_containers()),
                    self.setup.doors,
                    group=self.setup.config.control.group,
                    keeper=self.notifier if self.backend.keeps_sockets else None,
                )
            )
            stack.enter_context(self._signals())
            try:
                await self._live(doors)
            except BaseException:
                if not self.options.may_leave_engines:
                    await self.backend.leave()
                raise
            await self.backend.leave()

    def _listen_for_containers(self) -> tuple[str, ...]:
        """Open WebUI in its container knows the box by the gateway of its bridge alone."""
        host, port = parse_listen(self.options.listen[0], 9000)
        if not (self.setup.config.webui.enabled and self.backend.keeps_sockets):
            return ()
        at = f"{CONTAINER_GATEWAY}:{port}"
        everywhere = host in {"", "::", "0.0.0.0"}  # noqa: S104 - only compared
        return () if everywhere or at in self.options.listen else (at,)

    async def _live(self, doors: Doors) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.scheduler.running())
            stack.enter_context(self.desk.open())
            stack.enter_context(self.scheduler.watched(self._tell))
            await stack.enter_async_context(self._heart())
            await stack.enter_async_context(self._memory_watched())
            control = self._control(ControlServer(self.desk), doors.control)
            await stack.enter_async_context(control)
            await stack.enter_async_context(self._http(doors))
            await first(self._begin(), self.stop_asked.wait())
            await self.stop_asked.wait()
            self.notifier.stopping("stopping")
            log.info("stopping: no new requests, running answers end")
            await self._last_answers()

    async def _begin(self) -> None:
        try:
            found = await observe(
                self.backend.units,
                self.engines,
                self.orders.identify,
                self.meter,
                Pins(self.store).has_pinned,
            )
        except Fault as fault:
            raise CannotServe(fault.message, fault.hint) from fault
        self.scheduler.post(found)

    async def _last_answers(self) -> None:
        self.scheduler.post(ShutdownAsked(self.options.stop_s))
        try:
            async with asyncio.timeout(self.options.stop_s) as self._patience:
                await self.scheduler.idle()
            self._patience = None  # nothing is left to lose it over
        except TimeoutError:
            left = self.scheduler.cut_all("homeGPT is stopping")
            log.warning("%s cut: no end in time", count(left, "answer"))
            with suppress(TimeoutError):
                async with asyncio.timeout(CUT_S):
                    await self.scheduler.idle()

    # ------------------------------------------------------------ for the demo

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call once, when the bootstrap is over."""
        self._on_ready = call

    @property
    def address(self) -> str:
        """Where HTTP is served, as a URL's host and port."""
        host, port = parse_listen(self.options.listen[0], 9000)
        return spelled(host or "127.0.0.1", port)

    @property
    def default_socket(self) -> bool:
        """Whether callers find the control socket without being told."""
        return self.options.socket == socket_to_ask()

    @property
    def _stops(self) -> bool:
        return self.stop_asked.is_set()

    def _tell(self, lines: tuple[Line, ...]) -> None:
        self.keeper.tell(self.scheduler.state, lines)
        if self._on_ready is not None and self.scheduler.state.booted and not self._stops:
            call, self._on_ready = self._on_ready, None
            call()

    # ------------------------------------------------------------ parts

    @asynccontextmanager
    async def _control(self, server: ControlServer, sock: socket.socket) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(server.serve(sock), name="control socket")
            yield
            task.cancel()

    @asynccontextmanager
    async def _http(self, doors: Doors) -> AsyncIterator[None]:
        given: _Given = {
            "scheduler": self.scheduler,
            "desk": self.desk,
            "addresses": self._engine_address,
            "engine_keys": self._engine_key,
            "settings": router_settings(self.setup.config, self.options.state_dir, self._limits),
            "guard": self._guard(),
            "stored": Stored(),
            "accounts": self.accounts,
        }
        async with AsyncExitStack() as stack:
            await self._serve(stack, http.build(**given), doors.http)
            for model, sockets in doors.models.items():
                await self._serve(stack, http.build_model_door(model, **given), sockets)
            yield

    async def _serve(
        self, stack: AsyncExitStack, door: http.Door, sockets: Sequence[socket.socket]
    ) -> None:
        self._http_doors.append(door)
        stack.callback(door.close)
        runner = await http.serve(door, sockets, shutdown_s=1.0)
        stack.push_async_callback(runner.cleanup)

    def _guard(self) -> Guard:
        return guard(self.setup.config, self._keys, containers=bool(self._listen_for_containers()))

    def _limits(self, model: ModelId) -> Limits:
        return self.setup.limits.get(model) or Limits()

    def _engine_address(self, model: ModelId) -> Address:
        return address(self.setup.addresses[model])

    def _engine_key(self, model: ModelId) -> str | None:
        return self._engine_keys.get(model)

    @asynccontextmanager
    async def _heart(self) -> AsyncIterator[None]:
        heart = Heartbeat(self.notifier, lambda: self.scheduler.state, summary)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(heart.beat(watchdog_interval_s(os.environ)), name="heartbeat")
            with self.scheduler.watched(heart.tell):
                yield
            task.cancel()

    @asynccontextmanager
    async def _memory_watched(self) -> AsyncIterator[None]:
        looks = watch(self.meter, lambda: self.scheduler.state, self.scheduler.post)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(looks, name="memory")
            yield
            task.cancel()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop, a second one at once; SIGHUP reloads."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._asked_to_stop)
        self.loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self.loop.remove_signal_handler(number)

    def _asked_to_stop(self) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(self.loop.time())
        self.stop_asked.set()

    def _hang_up(self) -> None:
        try:
            self.reload()
        except ConfigError as error:
            log.error("nothing reloaded: %s", "; ".join(str(p) for p in error.problems))  # noqa: TRY400

    # ------------------------------------------------------------ reload

    async def _reload(self) -> str:
        try:
            return self.reload()
        except ConfigError as error:
            lines = "\n".join(str(problem) for problem in error.problems)
            raise Refused("bad-config", f"nothing was reloaded:\n{lines}") from error

    def reload(self) -> str:
        """Parse first, refuse a bad file whole; then apply the difference. Raises: ConfigError."""
        booted = self.scheduler.state.booted
        if booted:
            self.notifier.reloading()
        try:
            config = load(self.options.config)
            keys, self._engine_keys = keyring(config), engine_keys(config)
            before, after = self.setup, set_up(config, self.options.places, self.cards)
            self.setup = after
            self.backend.replace(after)
            self.engines.update(clients(after, self.engines, before))
            self.desk.names, self.desk.kinds = after.names, after.kinds
            self.desk.adjustments, self.desk.by_id_only = after.adjustments, after.by_id_only
            self._take_keys(keys)
            self.scheduler.post(
                ConfigChanged(after.specs, after.policy, after.gpus, after.host_mib)
            )
        finally:
            if booted:
                self.notifier.ready(summary(self.scheduler.state))
        text = difference(before, after)
        log.info("configuration reloaded: %s", text)
        return text

    def _take_keys(self, keys: Sequence[Key] | None) -> None:
        """From the next request on. Requests under way still count for their key."""
        if keys is None:
            self._keys = None
        elif self._keys is None:
            self._keys = Keyring(keys)
        else:
            self._keys.keys = tuple(keys)
        for door in self._http_doors:
            door.guard = self._guard()

    # ------------------------------------------------------------ small answers

    def _start_limit_s(self, model: ModelId) -> float:
        found = self.setup.config.model(model)
        return found.start_limit_s if found else 600.0

    async def _logs(self, model: ModelId, lines: int) -> LogsView:
        found = list(await self.backend.units.log_tail(model, lines))
        return {"lines": found, "follow": self.backend.follow(model)}

"""Engines as the daemon's own children: for the demo, development and machines without systemd.

Every engine leads a session of its own and writes straight into its log file, so it survives a
`kill -9` of the daemon; the next daemon adopts it by pid and start time. What ends is seen through
pidfds (`pidfd_open(2)`), for children and adopted engines alike: nothing here polls or sleeps.
"""

import asyncio
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from homegptd.core.model import Exit, ModelId, Running
from homegptd.core.refusals import Fault

from . import host_memory
from .engine_log import LOG_CAP_BYTES, LOOK_EVERY_S, cap_log, last_words, open_log, tail
from .sessions import Record, Run, boot_id, emptied, leftover, members_of, remove, signal_session
from .spawning import cannot_start, is_lasting, spawn_fault, words

log = logging.getLogger(__name__)

UNIX_PATH_MAX = 107
"""sun_path of unix(7) without its final zero."""

_PASSED = frozenset({"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
                     "VIRTUAL_ENV", "XDG_CACHE_HOME", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY",
                     "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"})  # fmt: skip
_PASSED_PREFIXES = ("CUDA_", "HF_", "VLLM_", "NVIDIA_", "NCCL_", "LC_", "OMP_", "TORCH", "TRITON_")


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine is started. Secrets belong into `env`: everybody on the box can read `argv`."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the clean environment of `clean_environ`."""
    socket: Path | None
    """Where it will listen; its directory is made, a stale socket there removed."""
    log: Path
    """Takes stdout and stderr; the start before is kept beside it with `.1` at the end."""

    def fingerprint(self) -> str:
        """Tells whether an engine found running was started as it would be now."""
        told = [self.argv, sorted(self.env.items()), str(self.socket)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What an engine may inherit: no NOTIFY_SOCKET, LISTEN_*, credentials or keys of the daemon."""
    return {k: v for k, v in environ.items() if k in _PASSED or k.startswith(_PASSED_PREFIXES)}


class Processes:
    """Fits `UnitsPort`. One loop, one owner of `state_dir`; call `close` at the daemon's end.

    Stopping is SIGTERM, after `term_again_s` SIGTERM again (a starting vLLM swallows the first one,
    0.22 to 0.33: `zmq_socket_ctx` catches the KeyboardInterrupt), after `kill_after_s` more
    SIGKILL, and a `Fault` if something still lives `give_up_after_s` later; always to the whole
    session, so that GPU workers whose parent died go too.

    `directory_mode` is that of the directories engines put their sockets into. With group rights
    (0o2770) engines run under umask 0007, which makes their sockets 0770.
    """

    def __init__(
        self,
        launches: Mapping[ModelId, Launch],
        state_dir: Path,
        *,
        directory_mode: int = 0o700,
        term_again_s: float = 2.0,
        kill_after_s: float = 8.0,
        give_up_after_s: float = 10.0,
        log_cap_bytes: int = LOG_CAP_BYTES,
    ) -> None:
        self._launches = dict(launches)
        self._records = state_dir / "engines"
        self._directory_mode = directory_mode
        self._escalation = (
            (signal.SIGTERM, term_again_s),
            (signal.SIGTERM, kill_after_s),
            (signal.SIGKILL, give_up_after_s),
        )
        self._log_cap_bytes = log_cap_bytes
        self._engines: dict[ModelId, Run] = {}
        self._locks: defaultdict[ModelId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._adopting = asyncio.Lock()
        self._adopted = False
        self._next_look: asyncio.TimerHandle | None = None

    def replace(self, launches: Mapping[ModelId, Launch]) -> None:
        """A reload: from the next start on. Running engines stay as they are."""
        self._launches = dict(launches)

    async def observe(self) -> Mapping[ModelId, Running]:
        """Engines that run now. The first call adopts what an earlier daemon left behind.

        That one may take as long as a stop: what cannot be adopted (started with another command,
        or its leader is dead) is ended first.
        """
        await self._adopt_once()
        return {
            model: Running(engine.record.pid, engine.record.started_at)
            for model, engine in self._engines.items()
            if not engine.ended.is_set()
        }

    async def start(self, model: ModelId) -> None:
        """Spawn; a no-op while it runs. Takes a few milliseconds of the loop (fork and exec).

        Raises `Fault`: lasting where the command, a path or a permission is wrong.
        """
        await self._adopt_once()
        async with self._locks[model]:
            before = self._engines.get(model)
            if before is not None and not before.ended.is_set():
                return
            if before is not None and (left := await self._sweep(model, before)):
                raise Fault(f'cannot start "{model}": {left} of its last run')
            self._spawn(model)

    async def stop(self, model: ModelId) -> None:
        """End the engine's session and wait until it is empty. Raises `Fault` if it never is."""
        await self._adopt_once()
        async with self._locks[model]:
            engine = self._engines.get(model)
            if engine is not None:
                await self._end(model, engine)

    async def gone(self, model: ModelId) -> Exit:
        """Return when the engine has ended and its orphans too; at once if none runs."""
        await self._adopt_once()
        engine = self._engines.get(model)
        if engine is None:
            return Exit(None, "was not running")
        await engine.ended.wait()
        left = await self._sweep(model, engine)
        detail = engine.how_it_ended()
        if engine.code != 0 and engine.log is not None and (said := last_words(engine.log)):
            detail = f"{detail}: {said}"
        return Exit(engine.code, f"{detail}; {left}" if left else detail)

    def image(self, model: ModelId) -> str:
        """A plain process comes from none."""
        return ""

    async def log_tail(self, model: ModelId, lines: int) -> Sequence[str]:
        """The newest lines, oldest first; reads at most 256 KiB from the file's end."""
        launch = self._launches.get(model)
        return () if launch is None else tail(launch.log, lines)

    async def pids(self, model: ModelId) -> frozenset[int]:
        """Everybody in its session, GPU workers too; empty where none runs."""
        engine = self._engines.get(model)
        return frozenset(proc.pid for proc in members_of(engine.record)) if engine else frozenset()

    async def host_mib(self, model: ModelId) -> int | None:
        """RAM of its session's own; None where nobody knows."""
        return await asyncio.to_thread(host_memory.of_processes, await self.pids(model))

    async def stop_all(self) -> None:
        """Stop every engine, all at the same time. Raises the `Fault` of one that survived."""
        await self._adopt_once()
        faults: list[Fault] = []

        async def stop(model: ModelId) -> None:
            try:
                await self.stop(model)
            except Fault as fault:
                log.exception("engine survives")
                faults.append(fault)

        async with asyncio.TaskGroup() as group:
            for model in list(self._engines):
                group.create_task(stop(model), name=f"stop {model}")
        if faults:
            raise faults[0]

    async def close(self) -> None:
        """The daemon's end: no engine of ours outlives it."""
        try:
            await self.stop_all()
        finally:
            if self._next_look is not None:
                self._next_look.cancel()

    # Starting

    def _spawn(self, model: ModelId) -> None:
        launch = self._launches.get(model)
        if launch is None or not launch.argv:
            raise Fault(
                f'cannot start "{model}": it has no command',
                hint="give it an engine: block in the configuration, or use --backend systemd",
                lasting=True,
            )
        self._prepare(model, launch)
        child = self._popen(model, launch)
        try:
            record = Record.of(model, child.pid, launch.fingerprint())
            engine = Run(record, os.pidfd_open(child.pid), launch.log, child)
        except OSError as error:  # no descriptors left: nobody could watch it
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise cannot_start(model, words(error), lasting=is_lasting(error)) from error
        self._engines[model] = engine
        self._write(engine)
        self._look_later()

    def _prepare(self, model: ModelId, launch: Launch) -> None:
        path = launch.socket
        if path is None:
            return
        if len(os.fsencode(path)) > UNIX_PATH_MAX:
            raise cannot_start(
                model, f"socket path is longer than {UNIX_PATH_MAX} bytes: {path}", lasting=True
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_IMODE(path.parent.stat().st_mode) != self._directory_mode:
                path.parent.chmod(self._directory_mode)
            if path.is_socket():
                path.unlink()
        except OSError as error:
            raise cannot_start(
                model, f"{path.parent}: {words(error)}", lasting=is_lasting(error)
            ) from error
        if path.exists():
            raise cannot_start(model, f"{path} exists and is not a socket", lasting=True)

    def _popen(self, model: ModelId, launch: Launch) -> subprocess.Popen[bytes]:
        env = {**clean_environ(os.environ), **launch.env}
        try:
            output = open_log(launch.log)
        except OSError as error:
            raise cannot_start(model, words(error), lasting=is_lasting(error)) from error
        try:
            return subprocess.Popen(  # noqa: S603  # the operator's own command, no shell
                launch.argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o007 if self._directory_mode & 0o070 else -1,
            )
        except (OSError, ValueError) as error:
            raise spawn_fault(model, launch.argv[0], env, error) from error
        finally:
            os.close(output)

    # Ending

    async def _end(self, model: ModelId, engine: Run) -> None:
        engine.stopping = True  # until here orphans are killed at once, now they get their time
        try:
            for number, patience_s in self._escalation:
                signal_session(engine.record, number)
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await emptied(engine.record)
                        await engine.ended.wait()
                    self._forget(model, engine)
                    return
        finally:
            engine.stopping = False
        raise Fault(
            f'cannot stop "{model}": {leftover(engine.record)} after SIGKILL',
            hint=f"ps -o pid,stat,wchan,args -s {engine.record.pid}",
        )

    async def _sweep(self, model: ModelId, engine: Run) -> str:
        """After the leader's end: end what it left in its session. Returns what survived."""
        if not engine.stopping:
            signal_session(engine.record, signal.SIGKILL)
        try:
            async with asyncio.timeout(sum(patience_s for _, patience_s in self._escalation)):
                await emptied(engine.record)
        except TimeoutError:
            return leftover(engine.record)
        self._forget(model, engine)
        return ""

    def _forget(self, model: ModelId, engine: Run) -> None:
        """Nothing can be adopted any more. A dead engine stays known for `gone`, by its code."""
        if self._engines.get(model) is engine:
            remove(self._path(model))

    # Adopting

    async def _adopt_once(self) -> None:
        async with self._adopting:
            if self._adopted:
                return
            async with asyncio.TaskGroup() as group:
                for path in sorted(self._records.glob("*.json")):
                    group.create_task(self._take_over(path), name=f"take over {path.stem}")
            self._adopted = True

    async def _take_over(self, path: Path) -> None:
        record = Record.read(path)
        if record is None or record.boot != boot_id() or not members_of(record):
            remove(path)
            return
        model = ModelId(record.model)
        launch = self._launches.get(model)
        engine = Run.adopted(record, None if launch is None else launch.log)
        if engine is None:
            engine = Run(record, None, None)
        elif launch is not None and launch.fingerprint() == record.fingerprint:
            log.info("adopted %s", model, extra={"fields": {"MODEL_ID": model, "PID": record.pid}})
            self._engines[model] = engine
            self._look_later()
            return
        log.warning("ending %s: found running, but it cannot be adopted", model)
        try:
            await self._end(model, engine)
        except Fault:
            log.exception("an earlier engine survives")
            self._engines[model] = engine
            return
        remove(path)

    def _path(self, model: str) -> Path:
        return self._records / f"{quote(model, safe='')}.json"

    def _write(self, engine: Run) -> None:
        record = engine.record
        path = self._path(record.model)
        first_try, engine.unwritten = not engine.unwritten, False
        try:
            record.write(path)
        except OSError as error:
            engine.unwritten = True
            if first_try:
                log.warning(
                    'engine "%s" runs, but could not be adopted after a crash of this daemon,'
                    " until there is room for %s: %s", record.model, path, words(error),
                )  # fmt: skip

    # Logs stay small, and records get written: by a timer, because neither a file that grew nor a
    # disk that has room again tells anybody

    def _look_later(self) -> None:
        if self._next_look is None:
            loop = asyncio.get_running_loop()
            self._next_look = loop.call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._next_look = None
        running = [engine for engine in self._engines.values() if not engine.ended.is_set()]
        for engine in running:
            if engine.log is not None:
                cap_log(engine.log, self._log_cap_bytes)
            if engine.unwritten:
                self._write(engine)
        if running:
            self._look_later()

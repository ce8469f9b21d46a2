"""Whatever the simulated engine does wrong ends in a clear fault, within the deadline."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import process_time

import pytest

from homegptd.adapters.faults import (
    Broken,
    EngineFault,
    Garbled,
    Hung,
    Lied,
    Unreachable,
    Unsafe,
)
from homegptd.adapters.vllm import Deadlines, VllmEngine
from homegptd.adapters.vllm_canary import Kind
from homegptd.core.model import ModelId, Proof, SleepLevel, SleepMode
from homegptd.sim.faults import parse
from homegptd.sim.options import Options
from homegptd.sim.server import SimServer

ONE, TWO = SleepLevel.ONE, SleepLevel.TWO
WAIT, KEEP, ABORT = SleepMode.WAIT, SleepMode.KEEP, SleepMode.ABORT
SHORT = Deadlines(
    check_s=0.3,
    sleep_s=0.3,
    settle_s=0.4,
    idle_s=0.3,
    wake_s=0.3,
    reload_s=0.3,
    canary_s=0.3,
)
LONGEST_S = 2.0
"""What the short deadlines of one transaction can add up to, and some."""
FAST = Options(weights_gb=4, kv_gb=2, speed=400, tokens_per_s=1.5, max_model_len=2048)
"""600 tokens a second; a wake takes 1 ms."""


@pytest.mark.parametrize(("gib", "seconds"), [(0, 180), (16, 180), (90, 180), (250, 500)])
def test_a_big_engine_gets_the_time_to_pin_what_it_holds(gib: int, seconds: int) -> None:
    """At half of the slowest that was seen, 1 GiB/s. A proof may hold the first sleep."""
    deadlines = Deadlines.for_size(gib << 10)
    assert (deadlines.sleep_s, deadlines.prove_s) == (seconds, seconds + 120)
    assert replace(deadlines, sleep_s=180, prove_s=300) == Deadlines()


class Box:
    """One simulated server with its adapter."""

    def __init__(self, server: SimServer, uds: Path, **more: object) -> None:
        self.server = server
        self.engine = VllmEngine(
            ModelId("coder"),
            uds,
            deadlines=SHORT,
            **more,
        )

    def used_mib(self) -> dict[int, int]:
        memory = self.server.engine.memory
        with self.server.engine.card.locked() as box:
            return {gpu: box.held_mib(memory.owner, gpu) for gpu in memory.footprint.gpus}

    def order(self, *faults: str) -> None:
        self.server.faults.ordered += [parse(fault) for fault in faults]

    def lift(self) -> None:
        self.server.faults.ordered = []
        self.server.engine.notify()


@asynccontextmanager
async def box(tmp_path: Path, **more: object) -> AsyncIterator[Box]:
    uds, kind = tmp_path / "s", more.pop("adapter_kind", None)
    async with SimServer(replace(FAST, model="coder", **more)).running(uds=uds) as server:
        yield Box(server, uds, kind=kind)


@pytest.fixture
async def awake(tmp_path: Path) -> AsyncIterator[Box]:
    async with box(tmp_path) as made:
        await made.engine.identify()
        yield made


async def fault_of(act) -> EngineFault:
    """The fault in which it ends, in time."""
    clock = asyncio.get_running_loop().time
    began, worked = clock(), process_time()
    with pytest.raises(EngineFault) as caught:
        await act
    assert clock() - began < LONGEST_S
    assert process_time() - worked < LONGEST_S
    message = caught.value.message
    assert "\n" not in message
    assert not message.endswith(".")
    return caught.value


# --- putting to sleep


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("hang@sleep", Hung, "did not answer /sleep within"),
        ("hang", Hung, "did not answer /sleep within"),
        ("slow=1000@sleep", Hung, "did not answer /sleep within"),
        ("500@sleep", Broken, "vLLM answered 500 to /sleep after 0."),
        ("reset@sleep", Broken, "vLLM hung up on /sleep"),
        ("lie@sleep", Lied, "vLLM answered 200 to /sleep and is awake"),
        ("hang@is_sleeping", Hung, "did not answer /is_sleeping within 0.3 s"),
    ],
)
async def test_a_sleep_that_goes_wrong_is_a_fault(awake: Box, fault: str, kind: type, words: str):
    awake.order(fault)
    caught = await fault_of(awake.engine.sleep(ONE, WAIT))
    assert type(caught) is kind
    assert caught.message.startswith('cannot put "coder" to sleep: ')
    assert words in caught.message
    awake.lift()


async def test_a_hang_in_the_other_modes_is_waited_out_first(awake: Box):
    awake.order("hang@sleep")
    caught = await fault_of(awake.engine.sleep(ONE, ABORT))
    assert type(caught) is Hung
    assert "did not answer /sleep within 0.3 s, and is still not asleep" in caught.message
    awake.lift()


async def test_an_engine_that_dies_while_it_falls_asleep_is_a_zombie(awake: Box):
    awake.order("zombie@sleep")
    caught = await fault_of(awake.engine.sleep(ONE, WAIT))
    assert isinstance(caught, Hung | Unreachable)
    caught = await fault_of(awake.engine.check())
    assert isinstance(caught, Hung | Unreachable)


@pytest.mark.parametrize("mode", [WAIT, ABORT])
async def test_a_sleep_whose_answer_comes_late_has_worked(awake: Box, mode: SleepMode):
    awake.order("late=160@sleep*1")  # 0.4 s here, after a deadline of 0.3 s
    await awake.engine.sleep(ONE, mode)
    assert await awake.engine.is_sleeping()


# --- waking


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("hang@wake", Hung, "did not answer /wake_up within 0.3 s, and is still not awake"),
        ("hang", Hung, "did not answer /wake_up within 0.3 s, and is still not awake"),
        ("500@wake", Broken, "vLLM answered 500 to /wake_up after 0."),
        ("oom@wake", Broken, "out of memory"),
        ("reset@wake", Broken, "vLLM hung up on /wake_up"),
        ("lie@wake", Lied, "vLLM answered 200 to /wake_up and still sleeps"),
        ("half@wake", Lied, "vLLM answered /wake_up with 'sleeping' instead of 'awake'"),
        ("garbage@chat", Garbled, "and that was no near tie"),
        ("hang@chat", Hung, "did not answer /v1/completions within 0.3 s"),
        ("500@chat", Broken, "vLLM answered 500 to /v1/completions"),
        ("reset@chat", Broken, "/v1/completions"),
        ("die@chat", Broken, "vLLM answered 500 to /v1/completions"),
    ],
)
async def test_a_wake_that_goes_wrong_is_a_fault(awake: Box, fault: str, kind: type, words: str):
    await awake.engine.sleep(ONE, WAIT)
    awake.order(fault)
    caught = await fault_of(awake.engine.wake(ONE, frozen=False))
    assert type(caught) is kind
    assert caught.message.startswith('cannot wake "coder": ')
    assert words in caught.message
    awake.lift()


async def test_an_engine_that_dies_while_it_wakes_is_a_zombie(awake: Box):
    await awake.engine.sleep(ONE, WAIT)
    awake.order("zombie@wake")
    caught = await fault_of(awake.engine.wake(ONE, frozen=False))
    assert isinstance(caught, Hung | Unreachable)


@pytest.mark.parametrize("fault", ["500@wake*1", "oom@wake*1", "late=160@wake*1"])
async def test_a_wake_gets_one_more_chance(awake: Box, fault: str):
    await awake.engine.sleep(ONE, WAIT)
    awake.order(fault)
    await awake.engine.wake(ONE, frozen=False)
    assert not await awake.engine.is_sleeping()


async def test_before_0_29_a_failed_wake_is_not_repeated(tmp_path: Path):
    async with box(tmp_path, version="0.28.0") as made:
        await made.engine.identify()
        await made.engine.sleep(ONE, WAIT)
        made.order("500@wake*1")
        assert "answered 500" in (await fault_of(made.engine.wake(ONE, frozen=False))).message


async def test_weights_that_were_not_reloaded_are_noticed(awake: Box):
    await awake.engine.sleep(TWO, WAIT)
    caught = await fault_of(awake.engine.wake(ONE, frozen=False))  # forgets the reload
    assert isinstance(caught, Garbled)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang@reload", "did not answer /collective_rpc within 0.3 s"),
        ("500@reload", "the weights were not reloaded: vLLM answered 500 to /collective_rpc"),
    ],
)
async def test_a_reload_that_goes_wrong_is_a_fault(awake: Box, fault: str, words: str):
    await awake.engine.sleep(TWO, WAIT)
    awake.order(fault)
    assert words in (await fault_of(awake.engine.wake(TWO, frozen=False))).message
    awake.lift()


# --- proofs


async def test_both_proofs_hold_on_a_healthy_engine(awake: Box):
    assert "equal to the unfrozen one" in await awake.engine.prove(Proof.FREEZE)
    assert "equal to before" in await awake.engine.prove(Proof.RELOAD)


async def test_an_answer_that_goes_on_wrong_after_a_freeze_disproves_freezing(awake: Box):
    awake.order("garbage-after-freeze")
    caught = await fault_of(awake.engine.prove(Proof.FREEZE))
    assert isinstance(caught, Garbled)
    assert caught.message.startswith('cannot freeze answers of "coder": an answer frozen after')
    assert "nats off the likeliest" in caught.message


async def test_an_answer_that_never_goes_on_disproves_freezing(awake: Box):
    awake.engine.deadlines = replace(SHORT, prove_s=1)
    awake.order("hang@wake")
    assert isinstance(await fault_of(awake.engine.prove(Proof.FREEZE)), Hung)
    awake.lift()


async def test_a_reload_that_does_not_restore_the_model_disproves_it(awake: Box):
    asked = awake.engine.prove(Proof.RELOAD)
    awake.server.engine.reload = nothing  # answers 200 and reads nothing
    caught = await fault_of(asked)
    assert isinstance(caught, Garbled)
    assert caught.message.startswith('cannot rely on reloading "coder": ')


async def nothing() -> None:
    """Reload nothing."""


# --- other kinds, other versions


@pytest.mark.parametrize(
    ("kind", "streams"), [("embed", False), ("score", False), ("generate", True)]
)
async def test_only_answers_that_stream_can_be_kept(tmp_path: Path, kind: str, *, streams: bool):
    async with box(tmp_path, kind=kind) as made:
        assert (await made.engine.identify()).can_keep is streams


@pytest.mark.parametrize("kind", ["embed", "score", "generate"])
async def test_each_kind_of_model_is_recognised_and_has_its_canary(tmp_path: Path, kind: str):
    async with box(tmp_path, kind=kind) as made:
        traits = await made.engine.identify()
        assert (traits.levels, traits.why_no_sleep) == (frozenset(SleepLevel), None)
        reference = made.engine.canary_reference
        assert isinstance(reference, str) is (kind == "generate")
        for level in SleepLevel:
            await made.engine.sleep(level, WAIT)
            await made.engine.wake(level, frozen=False)
        assert "equal to before" in await made.engine.prove(Proof.RELOAD)
        made.order("garbage")
        await made.engine.sleep(ONE, WAIT)
        assert isinstance(await fault_of(made.engine.wake(ONE, frozen=False)), Garbled)


async def test_only_answers_that_stream_can_be_frozen(tmp_path: Path):
    async with box(tmp_path, kind="embed") as made:
        await made.engine.identify()
        assert (await fault_of(made.engine.prove(Proof.FREEZE))).lasting


async def test_a_model_without_a_canary_sleeps_at_level_1_only(tmp_path: Path):
    async with box(tmp_path, adapter_kind=Kind.OTHER) as made:
        traits = await made.engine.identify()
        assert traits.levels == {ONE}
        assert not traits.can_keep
        assert "level 2 needs a canary" in (traits.why_no_sleep or "")
        await made.engine.sleep(ONE, WAIT)
        await made.engine.wake(ONE, frozen=False)
        assert "level 2 needs a canary" in (await fault_of(made.engine.sleep(TWO, WAIT))).message


@pytest.mark.parametrize("version", ["0.11.0", "0.16.0", "0.17.1", "0.24.0", "0.29.0", "0.33.0"])
@pytest.mark.parametrize("level", list(SleepLevel))
async def test_every_version_sleeps_and_wakes(tmp_path: Path, version: str, level: SleepLevel):
    async with box(tmp_path, version=version) as made:
        traits = await made.engine.identify()
        assert traits.version == version
        assert traits.can_keep is (version >= "0.17")
        await made.engine.sleep(level, WAIT)
        await made.engine.wake(level, frozen=False)
        await made.engine.check()


async def test_before_0_17_an_engine_under_load_is_not_put_to_sleep(tmp_path: Path):
    async with box(tmp_path, version="0.16.0") as made, asyncio.TaskGroup() as group:
        await made.engine.identify()
        canary = await made.engine._met()
        running = group.create_task(canary.sing(deadline_s=60, tokens=2000))
        async with asyncio.timeout(2):
            while not made.server.engine.running:  # noqa: ASYNC110 -- another's state
                await asyncio.sleep(0.01)
        caught = await fault_of(made.engine.sleep(ONE, WAIT))
        assert isinstance(caught, Unsafe)
        assert "before vLLM 0.17 sleep under load kills the engine" in caught.message
        assert caught.hint == "use an image with vLLM 0.29 or later"
        running.cancel()


async def test_before_0_17_nothing_can_be_frozen(tmp_path: Path):
    async with box(tmp_path, version="0.16.0") as made:
        await made.engine.identify()
        caught = await fault_of(made.engine.sleep(ONE, KEEP))
        assert caught.lasting
        assert "answers cannot be frozen before vLLM 0.17" in caught.message


async def test_answers_are_frozen_at_level_1_only(awake: Box):
    assert "level 1 only" in (await fault_of(awake.engine.sleep(TWO, KEEP))).message


# --- nobody there


async def test_an_absent_server_is_not_ready_and_nothing_else(tmp_path: Path):
    engine = VllmEngine(ModelId("coder"), tmp_path / "none", deadlines=SHORT)
    assert not await engine.ready()
    caught = await fault_of(engine.identify())
    assert isinstance(caught, Unreachable)
    assert caught.message.startswith('cannot identify "coder": nobody listens at ')


async def test_a_server_that_takes_connections_and_says_nothing_is_hung(tmp_path: Path):
    async with odd_server(tmp_path / "mute", answer=None):
        engine = VllmEngine(
            ModelId("coder"), tmp_path / "mute", deadlines=replace(SHORT, ready_s=0.2)
        )
        assert not await engine.ready()
        assert isinstance(await fault_of(engine.check()), Hung)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"is_sleeping": 1}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"",
    ],
)
async def test_nonsense_is_a_fault_and_not_a_crash(tmp_path: Path, answer: bytes):
    async with odd_server(tmp_path / "odd", answer):
        engine = VllmEngine(ModelId("coder"), tmp_path / "odd", deadlines=SHORT)
        assert isinstance(await fault_of(engine.is_sleeping()), Broken)


@asynccontextmanager
async def odd_server(path: Path, answer: bytes | None) -> AsyncIterator[None]:
    """Gives every request this answer, or none; ends when its connections have."""
    open_connections: set[asyncio.StreamWriter] = set()
    closed = asyncio.Condition()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_connections.add(writer)
        with contextlib.suppress(ConnectionError):
            if answer is None:
                await reader.read()
            else:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
            writer.close()
            await writer.wait_closed()
        async with closed:
            open_connections.discard(writer)
            closed.notify_all()

    async with await asyncio.start_unix_server(serve, path):
        yield
        async with closed:
            await closed.wait_for(lambda: not open_connections)


async def test_a_model_that_is_asked_for_a_word_says_one_or_is_at_fault(tmp_path: Path) -> None:
    async with box(tmp_path) as b:
        await b.engine.identify()
        await b.engine.speak()
        b.order("hang@chat")
        await b.engine.check()  # every other question is answered
        with pytest.raises(Hung, match='cannot get a word out of "coder"'):
            await b.engine.speak()


# --- weights that wake alone


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
@pytest.mark.parametrize("level", list(SleepLevel))
async def test_weights_wake_alone_and_go_again(tmp_path: Path, version: str, level: SleepLevel):
    async with box(tmp_path, version=version) as made:
        assert (await made.engine.identify()).can_rouse
        awake = made.used_mib()
        await made.engine.sleep(level, WAIT)
        asleep = made.used_mib()
        await made.engine.rouse(level)
        assert await made.engine.is_sleeping()
        share = 4 * 1024
        assert made.used_mib() == {gpu: mib + share for gpu, mib in asleep.items()}
        await made.engine.sleep(level, WAIT)
        assert made.used_mib() == asleep
        await made.engine.wake(level, frozen=False)
        await made.engine.sleep(level, WAIT)
        await made.engine.rouse(level)
        await made.engine.wake(level, frozen=False, roused=True)
        assert made.used_mib() == awake


async def test_before_0_31_nothing_takes_them_back(tmp_path: Path):
    async with box(tmp_path, version="0.30.0") as made:
        assert not (await made.engine.identify()).can_rouse


@pytest.mark.parametrize("level", list(SleepLevel))
async def test_who_died_between_two_halves_of_a_wake_leaves_nothing_on_the_card(
    tmp_path: Path, level: SleepLevel
):
    async with box(tmp_path, version="0.32.0") as made:
        await made.engine.identify()
        await made.engine.sleep(level, WAIT)
        asleep = made.used_mib()
        await made.engine.rouse(level)
        adopted = VllmEngine(ModelId("coder"), tmp_path / "s", deadlines=SHORT)
        traits = await adopted.identify()
        assert (traits.asleep, traits.asleep_level) == (True, level)
        assert made.used_mib() == asleep
        await adopted.wake(level, frozen=False)


async def test_also_where_nothing_tells_how_it_slept(tmp_path: Path):
    async with box(tmp_path, version="0.32.0") as made:
        await made.engine.identify()
        await made.engine.sleep(ONE, WAIT)
        asleep = made.used_mib()
        await made.engine.rouse(ONE)
        made.server.metrics.sleep_state = None  # as with --disable-log-stats
        traits = await made.engine.identify()
        assert (traits.asleep, traits.asleep_level) == (True, None)
        assert made.used_mib() == asleep
        await made.engine.wake(SleepLevel.TWO, frozen=False)


async def test_an_engine_that_wakes_wholly_instead_has_lied(tmp_path: Path):
    async with box(tmp_path, version="0.31.0") as made:
        await made.engine.identify()
        await made.engine.sleep(ONE, WAIT)
        whole = made.server.engine.wake
        made.server.engine.wake = lambda tags: whole(None)
        assert isinstance(await fault_of(made.engine.rouse(ONE)), Lied)

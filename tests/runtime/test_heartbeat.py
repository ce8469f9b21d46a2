"""What systemd is told, and when."""

import asyncio
import itertools

import pytest

from homegptd.core.story import summary
from homegptd.runtime.heartbeat import EXTEND_BY_S, EXTEND_EVERY_S, Heartbeat
from tests.runtime.jumping import jumping
from tests.runtime.small import Small


class Systemd:
    """Fits NotifyPort and keeps what it hears, with the time."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, str]] = []

    def _hear(self, text: str) -> None:
        self.heard.append((asyncio.get_running_loop().time(), text))

    def ready(self, status: str) -> None:
        self._hear(f"READY {status}")

    def status(self, text: str) -> None:
        self._hear(f"STATUS {text}")

    def extend(self, seconds: float) -> None:
        self._hear(f"EXTEND {seconds:g}")

    def watchdog(self) -> None:
        self._hear("WATCHDOG")

    def reloading(self) -> None:
        self._hear("RELOADING")

    def stopping(self, status: str) -> None:
        self._hear(f"STOPPING {status}")

    def times(self, word: str) -> list[float]:
        return [at for at, text in self.heard if text.startswith(word)]


async def hours(small: Small, systemd: Systemd, watchdog_s: float | None, seconds: float) -> None:
    heart = Heartbeat(systemd, lambda: small.scheduler.state, summary)
    async with small.running():
        with small.scheduler.watched(heart.tell):
            async with asyncio.TaskGroup() as group:
                task = group.create_task(heart.beat(watchdog_s))
                await asyncio.sleep(seconds)
                task.cancel()


@jumping
async def test_ready_is_said_once_when_the_bootstrap_is_over() -> None:
    small, systemd = Small(), Systemd()
    await hours(small, systemd, None, 200.0)
    (ready,) = [text for _, text in systemd.heard if text.startswith("READY")]
    assert ready == "READY ready: a awake, 1 asleep; 0 running, 0 waiting"
    assert systemd.times("STATUS bootstrap")[-1] < systemd.times("READY")[0]


@jumping
async def test_more_time_is_asked_for_while_booting_and_not_after() -> None:
    small, systemd = Small(), Systemd()
    await hours(small, systemd, None, 200.0)
    (ready_at,) = systemd.times("READY")
    asked = systemd.times("EXTEND")
    assert asked[0] == pytest.approx(0.0, abs=1.0)
    assert all(later - at <= EXTEND_BY_S for at, later in itertools.pairwise(asked))
    assert ready_at - EXTEND_EVERY_S <= asked[-1] <= ready_at


@pytest.mark.parametrize(("watchdog_s", "every_s"), [(2.0, 2.0), (30.0, EXTEND_EVERY_S)])
def test_the_watchdog_is_pinged_in_time(watchdog_s: float, every_s: float) -> None:
    @jumping
    async def main() -> None:
        small, systemd = Small(), Systemd()
        await hours(small, systemd, watchdog_s, 100.0)
        pings = systemd.times("WATCHDOG")
        gaps = [later - at for at, later in itertools.pairwise(pings)]
        assert gaps == pytest.approx([every_s] * len(gaps))
        assert len(gaps) >= 100.0 / every_s - 2

    main()


@jumping
async def test_without_a_watchdog_nobody_pings() -> None:
    small, systemd = Small(), Systemd()
    await hours(small, systemd, None, 100.0)
    assert systemd.times("WATCHDOG") == []

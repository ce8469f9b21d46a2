"""Transcripts: a file of commands with what the machine said and did, after etcd raft's datadriven.

A block is one command, `----`, and its result up to an empty line:

    +3 request 1 coder
    ----
    coder is waking from level 1
    > wake coder

Commands that only describe the box (`box`, `model`, `policy`, `forget`) have no result. `+3` lets
three seconds pass first; alarms that ring on the way are reported on lines of their own.
Lines with `>` are orders and answers, the others are the log as `journalctl` would show it.
"""

import shlex
from collections.abc import Iterator

from msgspec.structs import replace

from homegptd.core.commands import (
    Command,
    Cut,
    Finish,
    Grant,
    Probe,
    Prove,
    Refuse,
    Rouse,
    Sleep,
    Start,
    Stop,
    Wake,
    Watch,
)
from homegptd.core.events import (
    CancelAsked,
    ConfigChanged,
    EngineDied,
    Event,
    Found,
    Observed,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    RouseEnded,
    ShutdownAsked,
    SleepEnded,
    StartEnded,
    StopEnded,
    TicketClosed,
    TimePassed,
    WakeEnded,
)
from homegptd.core.invariants import violations
from homegptd.core.machine import initial, step
from homegptd.core.model import (
    Act,
    EngineSpec,
    Failure,
    Gpu,
    ModelId,
    OnDeadline,
    Operation,
    OperationId,
    Policy,
    Proof,
    SleepLevel,
    Startup,
    State,
    Ticket,
    TicketId,
    Traits,
)
from homegptd.core.story import summary, tell

GB = 1024


class Story:
    """The machine, told what happens by words."""

    def __init__(self) -> None:
        self.now = 0.0
        self.policy = Policy()
        self.specs: list[EngineSpec] = []
        self.traits: dict[ModelId, Traits] = {}
        self.gpus = {Gpu(0): 80 * GB}
        self.host = 256 * GB
        self.state: State | None = None
        self.wake_at: float | None = None
        self.orders: dict[str, Command] = {}
        self.operations = 0

    def run(self, text: str) -> str:
        words = shlex.split(text)
        pause = float(words.pop(0)[1:]) if words[0].startswith("+") else 0.0
        lines = list(self.wait(pause))
        if words:
            lines += self.do(words[0], *_split(words[1:]))
        return "\n".join(lines) or "(nothing)"

    # ------------------------------------------------------------ time

    def wait(self, seconds: float) -> Iterator[str]:
        end = self.now + seconds
        while self.wake_at is not None and self.wake_at <= end:
            self.now = self.wake_at
            said = list(self.feed(TimePassed()))
            if said:
                yield f"at {self.now:g}:"
                yield from said
        self.now = end

    # ------------------------------------------------------------ words

    def do(self, verb: str, names: list[str], given: dict[str, str]) -> Iterator[str]:
        match verb, names:
            case "box", _:
                self.box(given)
            case "model", [name]:
                self.model(ModelId(name), given)
            case "policy", _:
                self.policy = Policy(**{k: _policy(k, v) for k, v in given.items()})
            case "boot", found:
                yield from self.boot(found)
            case "reload", _:
                yield from self.feed(
                    ConfigChanged(tuple(self.specs), self.policy, self.gpus, self.host)
                )
            case "forget", [name]:
                self.specs = [spec for spec in self.specs if spec.model != name]
            case "request", [number, model]:
                yield from self.request(int(number), ModelId(model), given)
            case "close", [number]:
                yield from self.feed(TicketClosed(TicketId(int(number)), served=True))
            case "hangs-up", [number]:
                yield from self.feed(TicketClosed(TicketId(int(number))))
            case "done" | "fails", [name, *_] if name not in self.orders:
                raise AssertionError(f"{self.now:g}: no order for {name}; {summary(self.state)}")
            case "done", [name]:
                yield from self.feed(self.result(name, None))
            case "fails", [name, why]:
                failure = Failure(why, lasting="lasting" in given)
                yield from self.feed(self.result(name, failure))
            case "dies", [name, why]:
                model = ModelId(name)
                incarnation = self.state.engines[model].incarnation
                yield from self.feed(EngineDied(model, incarnation, Failure(why)))
            case "cancel", [number]:
                yield from self.feed(CancelAsked(OperationId(int(number))))
            case "shutdown", _:
                yield from self.feed(ShutdownAsked())
            case "status", _:
                yield summary(self.state)
            case _ if verb in {act.value for act in Act}:
                yield from self.ask(Act(verb), ModelId(names[0] if names else ""), given)
            case _:
                raise ValueError(f"no such command: {verb} {names}")

    def box(self, given: dict[str, str]) -> None:
        sizes = given.get("gpus", "80").split(",")
        self.gpus = {Gpu(n): int(float(size) * GB) for n, size in enumerate(sizes)}
        self.host = int(float(given.get("ram", "256")) * GB)

    def model(self, name: ModelId, given: dict[str, str]) -> None:
        level = given.get("level")
        spec = EngineSpec(
            model=name,
            gpus=tuple(Gpu(int(n)) for n in given.get("gpus", "0").split(",")),
            awake_mib=int(float(given.get("awake", "60")) * GB),
            residue_mib=int(float(given.get("residue", "2")) * GB),
            pinned_mib=int(float(given.get("weights", "20")) * GB),
            host_mib=4 * GB,
            startup=Startup(given.get("startup", "sleep")),
            level=SleepLevel(int(level)) if level else None,
            pinned="pinned" in given,
            sleep_after_s=float(given["sleep_after"]) if "sleep_after" in given else None,
            stop_after_s=float(given["stop_after"]) if "stop_after" in given else None,
            fingerprint=given.get("image", ""),
        )
        self.specs = [*(s for s in self.specs if s.model != name), spec]
        levels = frozenset(SleepLevel(int(n)) for n in given.get("can", "1,2").split(",") if n)
        proofs = {Proof(word): True for word in given.get("proved", "").split(",") if word}
        rouses = "rouses" in given
        self.traits[name] = Traits("0.32.0", levels, None, True, rouses, proofs=proofs)

    def boot(self, found: list[str]) -> Iterator[str]:
        self.state = initial(tuple(self.specs), self.policy, self.gpus, self.host)
        adopted = {}
        for word in found:
            name, how = word.split(":")
            asleep = how == "asleep"
            level = SleepLevel.ONE if asleep else None
            known = self.traits[ModelId(name)]
            traits = replace(known, proofs={}, asleep=asleep, asleep_level=level)
            adopted[ModelId(name)] = Found(None if how == "mute" else traits)
        return self.feed(Observed(adopted))

    def request(self, number: int, model: ModelId, given: dict[str, str]) -> Iterator[str]:
        until = self.now + self.policy.max_wait_s
        stream = "whole" not in given
        return self.feed(
            RequestArrived(Ticket(TicketId(number), model, self.now, until, freezable=stream))
        )

    def ask(self, act: Act, model: ModelId, given: dict[str, str]) -> Iterator[str]:
        self.operations += 1
        level = SleepLevel(int(given["level"])) if "level" in given else None
        asked = Operation(
            OperationId(self.operations),
            act,
            model,
            "root",
            self.now,
            cut="--now" in given,
            force="--force" in given,
            level=level,
            gpus=tuple(Gpu(int(n)) for n in given.get("gpu", "").split(",") if n),
        )
        return self.feed(OperationAsked(asked))

    def result(self, name: str, failure: Failure | None) -> Event:
        model = ModelId(name)
        match self.orders.pop(name):
            case Start(order=order):
                return StartEnded(model, order, None if failure else self.traits[model], failure)
            case Rouse(order=order):
                return RouseEnded(model, order, failure)
            case Wake(order=order):
                return WakeEnded(model, order, failure)
            case Sleep(order=order):
                return SleepEnded(model, order, failure=failure)
            case Prove(order=order, proof=proof):
                return ProveEnded(model, order, proof, holds=failure is None, failure=failure)
            case Stop(order=order):
                return StopEnded(model, order, failure)
            case other:
                raise ValueError(other)

    # ------------------------------------------------------------ telling

    def feed(self, event: Event) -> Iterator[str]:
        before = self.state
        outcome = step(before, event, self.now)
        self.state, self.wake_at = outcome.state, outcome.wake_at
        assert not violations(self.state, before)
        for line in tell(before, event, outcome, self.now):
            yield line.text if line.level == "info" else f"{line.level}: {line.text}"
        for command in outcome.commands:
            yield from self.order(command)

    def order(self, command: Command) -> Iterator[str]:
        match command:
            case Start(model) | Rouse(model) | Wake(model) | Prove(model) | Stop(model):
                self.orders[model] = command
                yield f"> {type(command).__name__.lower()} {model}"
            case Sleep(model, _, level, mode):
                self.orders[model] = command
                yield f"> sleep {model} level={level} mode={mode.value}"
            case Grant(ticket):
                yield f"> grant {ticket}"
            case Refuse(ticket, refusal):
                again = refusal.retry_after_s
                after = "" if again is None else f", retry after {again:.0f} s"
                yield f"> refuse {ticket}: {refusal.reason.value}{after}"
            case Cut(ticket):
                yield f"> cut {ticket}"
            case Finish() | Watch() | Probe():
                pass


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names first; then `key=value`, and bare flags with `--` or after the names."""
    flags = {"whole", "lasting", "pinned", "rouses"}
    names = [w for w in words if "=" not in w and not w.startswith("--") and w not in flags]
    pairs = [w.partition("=") for w in words if w not in names]
    return names, {key: value for key, _, value in pairs}


def _policy(key: str, value: str) -> object:
    if key == "on_deadline":
        return OnDeadline(value)
    if key == "default":
        return ModelId(value)
    if key in ("max_waiting", "max_failures"):
        return int(value)
    return float(value)

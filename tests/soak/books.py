"""Who asked what, what became of it, and which trouble excuses it: the books of a soak.

A client may be told to come again, or be cut off honestly, only if a trouble of the right kind
happened while it asked. Everything else is a breach.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from homegptd.sim.text import Speech, chat_prompt


class Breach(Exception):
    """A promise was broken. `wish` is the request it was broken to, if there is one."""

    def __init__(self, what: str, wish: "Wish | None" = None) -> None:
        super().__init__(what)
        self.wish = wish


class Kind(Enum):
    """What the soak does to the box."""

    SWITCH = "switch"
    NOW = "switch --now"
    SLEEP = "sleep"
    RELOAD = "reload"
    STALL = "engine stalled"
    KILL = "engine killed"
    STOP = "daemon stopped"
    CRASH = "daemon killed"


DAEMON_GONE = (Kind.STOP, Kind.CRASH)


@dataclass
class Trouble:
    """Something that was done to the box; it has not ended while `until` is None."""

    kind: Kind
    model: str | None
    since: float
    until: float | None = None

    def __str__(self) -> str:
        return f"{self.kind.value} {self.model or ''}".strip()


@dataclass
class Wish:
    """One request and its story. It keeps its number, and hence its right answer, when retried."""

    number: int
    protocol: str
    model: str
    name: str | None
    """What the client calls the model: its id, an alias, or nothing for the default."""
    tokens: int
    stream: bool
    leaves: str | None = None
    """When the client hangs up; None: it stays."""
    seed: int = 0
    tries: int = 0
    outcome: str = "open"
    story: list[tuple[float, str]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def prompt(self) -> str:
        return f"request {self.seed}.{self.number}: say something"

    @property
    def right_answer(self) -> str:
        """What the simulated model must say to exactly this request, word for word."""
        chat = chat_prompt([{"role": "user", "content": self.prompt}])
        prompt = self.prompt if self.protocol == "completions" else chat
        speech, said = Speech.after(self.model, prompt), []
        for _ in range(self.tokens):
            said.append(speech.next())
            speech.hear(said[-1])
        text = "".join(said)
        return text if self.protocol == "completions" else text.lstrip()

    def tell(self, what: str) -> None:
        self.story.append((time.monotonic(), what))

    def __str__(self) -> str:
        how = "stream of" if self.stream else "answer of"
        leaves = f", leaves {self.leaves}" if self.leaves else ""
        named = f"{self.model} as {self.name!r}"
        return f"request {self.number}: {self.protocol}, {how} {self.tokens} from {named}{leaves}"


class Books:
    """Every request and every trouble of one soak."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.wishes: list[Wish] = []
        self.troubles: list[Trouble] = []
        self.excuses: Counter[str] = Counter()
        self.waits: list[float] = []

    def trouble(self, kind: Kind, model: str | None = None) -> Trouble:
        self.troubles.append(Trouble(kind, model, time.monotonic()))
        return self.troubles[-1]

    def happened(
        self, kinds: tuple[Kind, ...], since: float, *, model: str | None = None, grace_s: float = 0
    ) -> list[Trouble]:
        """Troubles of these kinds that were under way, or over at most `grace_s` ago, at `since`
        or later; of one model, or of the whole box."""
        return [
            t for t in self.troubles
            if t.kind in kinds and model in (None, t.model, None if t.model is None else model)
            and (t.model in (None, model) or model is None)
            and (t.until is None or t.until + grace_s >= since)
        ]  # fmt: skip

    def excuse(self, wish: Wish, what: str, troubles: list[Trouble], *, needs: int = 1) -> None:
        """Raises: Breach where fewer troubles than it takes explain this."""
        wish.tell(what)
        if len(troubles) < needs:
            raise Breach(f"{what}, and nothing that was done to the box excuses it", wish)
        self.excuses[f"{what} ({troubles[-1].kind.value})"] += 1

    def at(self, moment: float) -> str:
        return f"{moment - self.began:9.3f}"

    def story(self, wish: Wish) -> str:
        """What happened to a request, with what was done to the box meanwhile."""
        lines = [(wish.began, str(wish)), *wish.story]
        since = wish.began - 10.0
        for trouble in self.troubles:
            if trouble.since >= since or (trouble.until or time.monotonic()) >= since:
                lines.append((trouble.since, f"    ({trouble})"))
                if trouble.until is not None:
                    lines.append((trouble.until, f"    ({trouble}: over)"))
        return "\n".join(f"{self.at(moment)}  {text}" for moment, text in sorted(lines))

    def table(self) -> str:
        outcomes = Counter(wish.outcome for wish in self.wishes)
        ways = Counter(
            f"{wish.protocol}{', stream' if wish.stream else ''}" for wish in self.wishes
        )
        done = Counter(trouble.kind.value for trouble in self.troubles)
        waits = sorted(self.waits) or [0.0]
        rows = [
            ("requests", len(self.wishes)),
            *((f"  {how}", n) for how, n in sorted(ways.items())),
            *((how, n) for how, n in sorted(outcomes.items())),
            ("tries", sum(wish.tries for wish in self.wishes)),
            ("longest, p99, median", " ".join(
                f"{waits[int(share * (len(waits) - 1))]:.2f} s" for share in (1, 0.99, 0.5)
            )),
            *((how, n) for how, n in sorted(done.items())),
            *((f"  excused: {what}", n) for what, n in sorted(self.excuses.items())),
        ]  # fmt: skip
        return "\n".join(f"{name:<58}{value:>20}" for name, value in rows)

"""The verbs that change something: begin an operation, follow it to its end, tell its outcome."""

from __future__ import annotations

import sys
from time import monotonic, sleep

from .absent import ABSENT
from .asked import Stop, usage
from .client import Client, Lost, Refusal, result_of
from .models import with_near_model
from .progress import Progress
from .render import clean_lines, complain, err, out, print_json, seconds_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from homegptd.wire.control import OperationView

    from .asked import Asked

INTERRUPTED = 130
RECONNECT_S = 15.0  # a daemon that restarts is back within this, or something is wrong with it
_REDRAW_S = 0.2
_LOOK_S = 1.0  # how often to ask why it takes so long


def run(asked: Asked) -> int:
    """Carry out one verb. Raises: Stop."""
    params = _params(asked)
    following = _Following(asked)
    try:
        view = following.ended(asked.verb, params)
    except KeyboardInterrupt:
        return _detached(following)
    except Refusal as refusal:
        raise with_near_model(asked, refusal) from None
    finally:
        following.close()
    return _tell(asked, view)


def _params(asked: Asked) -> dict[str, object]:
    if asked.verb == "cancel":
        return {"id": _number(asked.words[0])}
    params: dict[str, object] = {"wait": asked.wait}
    if asked.verb == "operation":
        params["id"] = _number(asked.words[0])
    elif asked.words:
        params["model"] = asked.words[0]
    if "now" in asked.options:
        params["now"] = True
    if "force" in asked.options:
        params["force"] = True
    if "gpu" in asked.options:
        if not asked.options["gpu"].isdecimal():
            usage(f"--gpu must be the index of a GPU, not {asked.options['gpu']}")
        params["gpu"] = int(asked.options["gpu"])
    if "level" in asked.options:
        if asked.options["level"] not in ("1", "2"):
            usage(f"--level must be 1 or 2, not {asked.options['level']}")
        params["level"] = int(asked.options["level"])
    return params


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        usage(f'an operation has a number, not "{word}"', "homegptctl status shows those that run")
    return int(word)


class _Following:
    """One call and the operation that it waits for, over restarts of the daemon."""

    def __init__(self, asked: Asked) -> None:
        """Raises: Stop."""
        self.number: int | None = None
        self._path = asked.socket
        self._style = err()
        cuts = "now" in asked.options
        self._progress = None if asked.json else Progress(sys.stderr, self._style, cuts=cuts)
        self._looking: int | None = None
        self._looked_at = monotonic()
        self._client = Client(asked.socket)

    def ended(self, method: str, params: dict[str, object]) -> OperationView:
        """The final view, or the first if nobody waits. Raises: Refusal, Stop."""
        try:
            while True:
                try:
                    return self._answer(method, params)
                except Lost:
                    method, params = self._again()
                    self._client = self._reconnected()
        finally:
            if self._progress:
                self._progress.end()

    def close(self) -> None:
        self._client.close()

    def _answer(self, method: str, params: dict[str, object]) -> OperationView:
        """Raises: Lost when the daemon goes while the operation lives; Refusal."""
        wanted = self._client.begin(method, params)
        # an answer to a call that does not wait comes at once, or never
        limit_s = None
        if self._progress:
            limit_s = _REDRAW_S if self._style.tty else _LOOK_S
        until = None if params.get("wait") else monotonic() + self._client.limit_s
        self._looking = None
        while True:
            if until is None:
                self._ask_why()
            message = self._client.next(limit_s if until is None else self._client.limit_s)
            if message is None:
                self._tick(until)
            elif message.get("method") == "progress":
                self._update(message["params"]["operation"])
            elif "method" not in message and message.get("id") == wanted:
                return self._result(message)
            elif "result" in message and message.get("id") == self._looking:
                self._looking = None
                if self._progress:
                    self._progress.look(message["result"])

    def _ask_why(self) -> None:
        """Ask for the status now and then, which says what waits for what. Raises: Lost."""
        now = monotonic()
        if self._progress and self._looking is None and now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._looking = self._client.begin("status")

    def _result(self, message: Any) -> OperationView:
        try:
            view: OperationView = result_of(message)
        except Refusal as refusal:
            if refusal.reason == "shutting-down" and self.number is not None:
                raise Lost from None
            raise
        if self._progress and self.number is not None:
            self._progress.update(view)  # the last step ends with the operation
        return view

    def _tick(self, until: float | None) -> None:
        if until is not None and monotonic() > until:
            from .absent import absent, log_hint

            raise absent(self._path, "it does not answer", log_hint())
        if self._progress:
            self._progress.tick()

    def _update(self, view: OperationView) -> None:
        self.number = view["id"]
        if self._progress:
            self._progress.update(view)

    def _again(self) -> tuple[str, dict[str, object]]:
        """What to ask after a restart. Never the verb itself: it could be carried out twice."""
        if self.number is None:
            message = "homegptd closed the connection before it said what it would do"
            raise Stop(message, code=ABSENT, hint="homegptctl status", reason="absent")
        if self._progress:
            self._progress.end()
            print("homegptd went away; waiting for it to come back", file=sys.stderr)
        return "operation", {"id": self.number, "wait": True}

    def _reconnected(self) -> Client:
        self._client.close()
        until = monotonic() + RECONNECT_S
        while True:
            try:
                return Client(self._path)
            except Stop:
                if monotonic() > until:
                    raise
            sleep(0.1)  # nothing tells a client that a socket has come


def _detached(following: _Following) -> int:
    if following.number is None:
        print("homegptctl: interrupted", file=sys.stderr)
    else:
        text = f"homegptctl: detached; operation {following.number} goes on"
        print(f"{text}\nhint: homegptctl operation {following.number}", file=sys.stderr)
    return INTERRUPTED


def _tell(asked: Asked, view: OperationView) -> int:
    """Print how it ended; the exit code is its reason's."""
    if asked.json:
        print_json(view)
    error = view["error"]
    if view["state"] == "failed" or (view["state"] == "cancelled" and asked.verb != "cancel"):
        return _tell_failure(asked, view, error or {})
    if not asked.json:
        _tell_success(view)
    return 0


def _tell_failure(asked: Asked, view: OperationView, error: Any) -> int:
    from homegptd.wire.codes import row

    reason = error.get("reason") or ("cancelled" if view["state"] == "cancelled" else "internal")
    if not asked.json:
        what = error.get("message") or view["outcome"] or view["state"]
        complain(what, error.get("hint"))
    return row(reason).exit


def _tell_success(view: OperationView) -> None:
    style = out()
    if view["state"] == "running":
        from .operations import operation_lines

        print("\n".join(operation_lines(view, style)))
        return
    name = " ".join(filter(None, (view["kind"], view["model"])))
    took = f" after {seconds_text(view['elapsed_s'])}" if view["elapsed_s"] else ""
    outcome = view["outcome"] or f"{name}: {view['state']}"
    print(f"{clean_lines(outcome)}{took}")

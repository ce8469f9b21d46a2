"""`homegptctl status`: one row per model, then queue, operations and memory."""

from __future__ import annotations

from .client import ask
from .render import MOVING, bar, clean, cut, gib, left, out, print_json, short, wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import GpuView, ModelView, StatusView

    from .asked import Asked
    from .render import Style

_HEADER = ("  MODEL", "STATE", "SINCE", "MEMORY", "REQS")
_LOOKS = {  # glyph, glyph without Unicode, colour
    "awake": ("●", "*", "green"),
    "asleep": ("○", "o", "blue"),
    "moving": ("◐", "~", "yellow"),
    "failed": ("✗", "!", "red"),
    "down": ("·", ".", "dim"),
}
_LEAST_WHY = 14  # a narrower column than this is no help; the words go below their row
_LEAST_NAME = 8
_DROPS = (2, 3, 4)  # SINCE, MEMORY, REQS: the order in which columns go when there is no room


def run(asked: Asked) -> int:
    """Print the status."""
    view: StatusView = ask(asked.socket, "status")
    if asked.json:
        print_json(view)
    else:
        print("\n".join(lines(view, out())))
    return 0


def lines(view: StatusView, style: Style) -> list[str]:
    """The whole picture, line by line."""
    shown = _heading(view, style)
    if view["models"]:
        shown += ["", *_table(view, style)]
    queue, operations = view["queue"], view["operations"]
    if queue or operations:
        shown.append("")
    for entry in queue:
        text = _waiting(entry["model"], entry["waiting"], view["now"] - entry["since"])
        shown += wrapped(text, style, indent="  ")
    if operations:
        from .operations import operation_lines

        for operation in operations:
            shown += operation_lines(operation, style)
    if view["gpus"]:
        shown.append("")
        for gpu in view["gpus"]:
            shown += _gpu(gpu, view["models"], style)
        shown += _host(view, style)
    return shown


def state_of(model: ModelView) -> tuple[str, str]:
    """The word in the STATE column, and which look it has."""
    phase = model["phase"]
    if model["status"] == "error":
        return "failed", "failed"
    if phase == "asleep":
        return f"asleep L{model['level']}" if model["level"] else "asleep", "asleep"
    if phase in MOVING:
        return phase.replace("-", " "), "moving"
    if phase == "awake":
        return "awake", "awake"
    return ("disabled" if model["status"] == "disabled" else "stopped"), "down"


def _heading(view: StatusView, style: Style) -> list[str]:
    """The summary begins with the daemon's phase, which is what the colour is for."""
    phase = view["phase_of_daemon"]
    colour = {"ready": "green", "degraded": "red"}.get(phase, "yellow")
    up = f"homegptd {clean(view['version'])}, up {short(view['now'] - view['started_at'])};"
    shown = wrapped(f"{up} {clean(view['summary'])}", style, indent="  ")
    if clean(view["summary"]).startswith(phase):  # painted last: escapes would count as width
        shown = [line.replace(f" {phase}", f" {style.paint(phase, colour)}", 1) if not at else line
                 for at, line in enumerate(shown)]  # fmt: skip
    return shown


# ---------------------------------------------------------------- the table


def _table(view: StatusView, style: Style) -> list[str]:
    """Rows that fit the terminal, whatever has to be left out of them."""
    models, now = view["models"], view["now"]
    rows = [_cells(model, now, style) for model in models]
    columns = _columns([_widest(rows, at) for at in range(5)], style.width)
    widths = {at: _widest(rows, at) for at in columns}
    used = sum(widths.values()) + 2 * (len(widths) - 1)
    if style.width:
        widths[0] = max(_LEAST_NAME, widths[0] - max(0, used - style.width))
        used = min(used, style.width)
    whys = [_why(model, now) for model in models]
    room = style.width - used - 2 if style.width else 0
    place = "beside" if not style.width or room >= _LEAST_WHY else "below"
    if len(columns) < len(_HEADER):
        place = "nowhere"
        whys = [why if model["error"] else "" for why, model in zip(whys, models, strict=True)]
    title = "UNTIL / WHY" if any(_left(model, now) for model in models) else "WHY"
    heading = _row(_HEADER, widths, style) + (f"  {title}" if place == "beside" else "")
    shown = [style.paint(heading.rstrip(), "bold")]
    for model, cells, why in zip(models, rows, whys, strict=True):
        row = _painted(_row(cells, widths, style), cells[1], _LOOKS[state_of(model)[1]][2], style)
        fits = place == "beside" and (not room or len(why) <= room)
        shown.append(f"{row}  {why}".rstrip() if fits else row.rstrip())
        if why and not fits:
            shown.append(cut(f"    {why}", style.width, style))
    return shown


def _columns(widths: list[int], width: int) -> list[int]:
    """Which of the columns there is room for."""
    columns = [0, 1, 2, 3, 4]
    for dropped in _DROPS:
        if not width or sum(widths[at] for at in columns) + 2 * (len(columns) - 1) <= width:
            break
        columns.remove(dropped)
    return columns


def _widest(rows: list[tuple[str, ...]], at: int) -> int:
    return max(len(_HEADER[at]), *(len(row[at]) for row in rows))


def _row(cells: tuple[str, ...], widths: dict[int, int], style: Style) -> str:
    return "  ".join(cut(cells[at], width, style).ljust(width) for at, width in widths.items())


def _painted(row: str, state: str, colour: str, style: Style) -> str:
    """The row with its state in colour, painted last: escapes would count as width."""
    head, _, tail = row.rpartition(state)
    return f"{head}{style.paint(state, colour)}{tail}"


def _cells(model: ModelView, now: float, style: Style) -> tuple[str, ...]:
    word, look = state_of(model)
    glyph, plain, _ = _LOOKS[look]
    return (
        f"{'*' if model['default'] else ' '} {clean(model['id'])}",
        f"{glyph if style.unicode else plain} {word}",
        short(now - model["since"]) if model["since"] is not None else "-",
        _memory(model["memory_mib"]["gpu"], model["memory_mib"]["host"]),
        _requests(model),
    )


def _memory(gpu: int, host: int) -> str:
    """GiB on the GPU, and what a sleeper keeps in RAM."""
    if not gpu and not host:
        return "-"
    return f"{gib(gpu)}+{gib(host)}R" if host else f"{gib(gpu)}"


def _requests(model: ModelView) -> str:
    """Running, +waiting, *frozen."""
    counts = model["requests"]
    if not any((counts["running"], counts["waiting"], counts["frozen"])):
        return "-"
    waiting = f"+{counts['waiting']}" if counts["waiting"] else ""
    frozen = f"*{counts['frozen']}" if counts["frozen"] else ""
    return f"{counts['running']}{waiting}{frozen}"


def _why(model: ModelView, now: float) -> str:
    error = model["error"]
    why = clean(error["message"] if error else model["why"])
    pinned = "pinned" if model["pinned"] and why != "pinned" else ""
    return " ".join(filter(None, (_left(model, now), pinned, why)))


def _left(model: ModelView, now: float) -> str:
    """The time until the state changes by itself; what is over says nothing any more."""
    until = model["until"]
    return left(until - now) if until is not None and until - now >= 1.0 else ""


# ---------------------------------------------------------------- queue and memory


def _waiting(model: str, waiting: int, waited_s: float) -> str:
    noun = "request waits" if waiting == 1 else "requests wait"
    return f"queue: {waiting} {noun} for {clean(model)}, the oldest for {short(waited_s)}"


def _gpu(gpu: GpuView, models: list[ModelView], style: Style) -> list[str]:
    picture = bar(style, gpu["used_mib"], gpu["reserved_mib"], gpu["total_mib"])
    reserved = ""
    if gpu["reserved_mib"]:
        names = [clean(model["id"]) for model in models
                 if gpu["index"] in model["gpus"] and _holds(model)]  # fmt: skip
        by = f" by {', '.join(names)}" if names else ""
        reserved = f", {gib(gpu['reserved_mib'])} reserved{by}"
    if others := gpu.get("foreign_mib", 0):
        reserved += f", {gib(others)} held by others"
    used = f"{gib(gpu['used_mib'])} of {gib(gpu['total_mib'])} GiB{reserved}"
    lender = gpu.get("freed_by")
    lent = f"; freed by {clean(lender)} (homegptctl reclaim)" if lender else ""
    name = "" if gpu["name"] == f"gpu{gpu['index']}" else f"  {clean(gpu['name'])}"
    text = f"{used}, {gib(gpu['free_mib'])} free{name}{lent}"
    return _with_picture(f"GPU {gpu['index']}", picture, text, style)


def _holds(model: ModelView) -> bool:
    """Whether an order for it holds memory: a drain holds what it had."""
    return model["phase"] in MOVING and model["phase"] != "draining"


def _host(view: StatusView, style: Style) -> list[str]:
    host = view["host"]
    picture = bar(style, host["used_mib"], 0, host["total_mib"])
    used = f"{gib(host['used_mib'])} of {gib(host['total_mib'])} GiB"
    return _with_picture("RAM  ", picture, used, style)


def _with_picture(label: str, picture: str, text: str, style: Style) -> list[str]:
    """The figures matter more than the picture."""
    line = f"{label} {picture} {text}"
    if not style.width or len(line) <= style.width:
        return [line]
    return wrapped(f"{label} {text}", style, indent="      ")

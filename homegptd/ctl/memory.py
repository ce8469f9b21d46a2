"""`homegptctl memory [MODEL]`: figures with their source, the sums, and the pressure on RAM."""

from __future__ import annotations

from .client import Refusal, ask
from .models import with_near_model
from .render import clean, gib, out, print_json, short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from homegptd.wire.control import FigureView, MemoryModelView, MemoryReport, PlaceView

    from .asked import Asked

_HEADER = ("MODEL", "WHAT", "WHERE", "GIB", "MARGIN", "SOURCE", "AGE", "HOLDS NOW")
_WORDS = {
    "awake": "awake",
    "residue": "asleep",
    "roused": "roused",
    "pinned": "pinned",
    "host": "processes",
}
_NUMBERS = (3, 4)


def run(asked: Asked) -> int:
    """Print the report. Raises: Stop."""
    params = {"model": asked.words[0]} if asked.words else {}
    try:
        view: MemoryReport = ask(asked.socket, "memory", params)
    except Refusal as refusal:
        raise with_near_model(asked, refusal) from None
    if asked.json:
        print_json(view)
    else:
        style = out()
        table, *rest = lines(view)
        print(style.paint(table, "bold"))
        print("\n".join(rest))
    return 0


def lines(view: MemoryReport) -> list[str]:
    """The table, the sums, and what measures."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for model in view["models"]:
        rows += _rows(model, view["now"])
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADER))]
    shown = ["  ".join(_cells(row, widths)).rstrip() for row in rows]
    return [*shown, "", *(_sum(place) for place in view["places"]), *_rest(view)]


def _cells(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.rjust(width) if at in _NUMBERS else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _rows(model: MemoryModelView, now: float) -> list[tuple[str, ...]]:
    name = clean(model["id"])
    rows: list[tuple[str, ...]] = []
    for at, figure in enumerate(model["figures"]):
        age = short(now - figure["at"]) if figure["at"] is not None else "-"
        where = "RAM" if figure["gpu"] is None else f"gpu{figure['gpu']}"
        margin = f"+{gib(figure['margin_mib'])}" if figure["margin_mib"] else "-"
        rows.append(
            (name if not at else "", _WORDS[figure["kind"]], where, gib(figure["mib"]), margin,
             figure["source"], age, _holds(model, figure))
        )  # fmt: skip
    return rows


def _holds(model: MemoryModelView, figure: FigureView) -> str:
    """Beside the figure that it is to be compared with: of its phase, and once for the RAM."""
    asleep = model["phase"] == "asleep"
    if figure["kind"] == ("residue" if asleep else "awake"):
        held = (model["holds_gpu_mib"] or {}).get(str(figure["gpu"]))
        grown = f", {gib(model['grown_mib'])} more than at first" if model["grown_mib"] > 51 else ""
        return "" if held is None else f"{gib(held)}{grown if asleep else ''}"
    if figure["kind"] == "host" and model["holds_host_mib"] is not None:
        return f"{gib(model['holds_host_mib'])} with what is pinned"
    return ""


def _sum(place: PlaceView) -> str:
    where = "RAM " if place["gpu"] is None else f"gpu{place['gpu']}"
    others = ""
    if place["foreign_mib"]:
        others = f" - {gib(place['foreign_mib'])} {clean(place['foreign']) or 'held by others'}"
    text = f"{where}  {gib(place['total_mib'])} total - {gib(place['booked_mib'])} booked{others}"
    free = "" if place["free_mib"] is None else f"; {gib(place['free_mib'])} really free"
    return f"{text} = {gib(place['left_mib'])} left{free}"


def _rest(view: MemoryReport) -> list[str]:
    if not view["measures"]:
        return ["nothing measures here: no driver answers, so the figures are as configured"]
    waited = f"{view['pressure']:.0f} % of the last 10 s some task waited for host memory"
    return [waited if view["pressure"] >= 0.5 else "no task waits for host memory"]

"""Numbers and lengths of time as people say them."""


def count(number: int, noun: str) -> str:
    """`1 answer`, `2 answers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def span(seconds: float) -> str:
    """`0.2 s`, `30 s`, `29 min`: as exact as it matters."""
    if seconds >= 120.0:
        return f"{seconds / 60.0:.0f} min"
    return f"{round(seconds, 1 if seconds < 10.0 else None):g} s"


def gb(mib: int) -> str:
    """`4.0` for 4096 MiB; GiB, as vLLM and nvidia-smi count."""
    return f"{mib / 1024:.1f}"

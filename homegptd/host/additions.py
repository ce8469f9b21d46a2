"""A new model for the configuration, with figures found or guessed; and a whole new file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from homegptd.config.parse import parse
from homegptd.config.schema import Config, ModelConfig

from .box import Card, caches, cards, ram_mib
from .commands import HostFault
from .edit import Value, added, scalar
from .places import Places
from .weights import Estimate, cached, estimate

_STAND_IN_GB = 0.01
"""Memory of a model while the rest of its entry is read to find out the real figure."""
_EXAMPLE = "Qwen/Qwen3-8B"
_RAM_FOR_THE_BOX_GB = 8


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person who adds a model has said."""

    model: str
    id: str | None = None
    gpus: tuple[int, ...] = ()
    gpu_memory_gb: float | None = None
    args: tuple[str, ...] = ()
    """`flag=value` or `flag`, with or without dashes."""
    mode: str = "sleep"


@dataclass(frozen=True, slots=True)
class Addition:
    """The new text, and why the figures are what they are."""

    id: str
    text: str
    reasons: tuple[str, ...] = field(default=())


def addition(wish: Wish, text: str, places: Places) -> Addition:
    """Raises: HostFault; ConfigError when the result would not be a sound configuration."""
    ident = wish.id or name_for(wish.model)
    entry: dict[str, Value] = {"id": ident, "gpu_memory_gb": _STAND_IN_GB}
    if wish.gpus:
        entry["gpus"] = list(wish.gpus)
    entry["startup_mode"] = wish.mode
    args = _flags(wish)
    entry["engine"] = {"model": wish.model, **({"args": args} if args else {})}
    config = parse(added(text, entry), str(places.config))
    model = config.models[-1]
    flags = model.engine.args if model.engine else ()
    found = estimate(wish.model, caches=caches(places), args=flags, gpus=len(model.gpus))
    memory, reasons = _memory(wish, model, config, found)
    if found is not None and found.longest and _value(flags, "max-model-len", found.longest):
        args["max-model-len"] = found.longest
        reasons.append(f"max-model-len {found.longest}: all that the model was made for")
    done: dict[str, Value] = {"id": ident, "gpu_memory_gb": memory}
    if found is not None:
        done["weights_gb"] = round(min(found.weights_gib, memory), 1)
    done |= {key: value for key, value in entry.items() if key not in done}
    done["engine"] = {"model": wish.model, **({"args": args} if args else {})}
    final = added(text, done)
    parse(final, str(places.config))
    return Addition(ident, final, tuple(reasons))


def name_for(model: str) -> str:
    """An id from `Org/Name` or a path: lower case, safe in a unit's name."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._") or "model"


def _flags(wish: Wish) -> dict[str, Value]:
    args: dict[str, Value] = {}
    for given in wish.args:
        name, equals, value = given.lstrip("-").partition("=")
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise HostFault(f'--arg wants flag=value or flag, not "{given}"')
        args[name] = _read(value) if equals else True
    if len(wish.gpus) > 1:
        args.setdefault("tensor-parallel-size", len(wish.gpus))
    return args


def _read(value: str) -> Value:
    """Numbers as numbers: YAML shall show them as a person would write them."""
    if re.fullmatch(r"0|[1-9]\d{0,11}", value):
        return int(value)
    return value


def _memory(
    wish: Wish, model: ModelConfig, config: Config, found: Estimate | None
) -> tuple[float, list[str]]:
    """GiB awake over all its GPUs: as said, as vLLM's share comes to, or as estimated."""
    reasons = [str(found)] if found else []
    if wish.gpu_memory_gb is not None:
        return wish.gpu_memory_gb, reasons
    flags = model.engine.args if model.engine else ()
    share = next((f for f in _pairs(flags) if f[0] == "gpu-memory-utilization"), None)
    sizes = [card.memory_mib for card in config.gpus if card.index in model.gpus]
    if share and sizes and all(sizes) and re.fullmatch(r"0?\.\d+", share[1]):
        total = float(share[1]) * sum(filter(None, sizes)) / 1024
        reasons.append(f"gpu-memory-utilization {share[1]} of {len(sizes)} GPUs = {total:.1f} GB")
        if found and found.weights_gib > total:
            raise HostFault(f"{wish.model} does not fit: {found}, and vLLM may take {total:.1f} GB")
        return round(total, 1), reasons
    if found is None:
        raise HostFault(
            f"cannot tell how much memory {wish.model} needs: it is in no cache here",
            f"homegptctl add {wish.model} --gpu-memory-gb N",
        )
    return round(found.total_gib, 1), reasons


def _pairs(flags: Sequence[str]) -> list[tuple[str, str]]:
    pairs = zip(flags, (*flags[1:], ""), strict=False)
    return [(flag.lstrip("-"), value) for flag, value in pairs if flag.startswith("--")]


def _value(flags: Sequence[str], name: str, most: int) -> bool:
    """Whether the flag, from the file's common ones, is more than the model can do."""
    given = next((value for flag, value in _pairs(flags) if flag == name), "")
    return given.isdecimal() and int(given) > most


# ------------------------------------------------------------ a whole file


def proposal(places: Places) -> str:
    """A configuration for this box: its cards, its RAM, the models in its caches."""
    there = cards()
    names = list(dict.fromkeys(name for cache in caches(places) for name in cached(cache)))
    rows = [
        "# homeGPT: proposed by homegptctl init from what this box has. See homegpt.yaml(5).",
        *_gpu_rows(there),
        "switching:",
        f"  available_ram_gb: {max(ram_mib() // 1024 - _RAM_FOR_THE_BOX_GB, 1)}",
        "engine:",
        "  args: {enable-sleep-mode: true}",
        "models:",
        *_model_rows(names, there, places),
        "http:",
        "  listen: 127.0.0.1:9000",
        "webui:",
        "  enabled: true",
    ]
    return "\n".join(rows) + "\n"


def _gpu_rows(there: Sequence[Card]) -> list[str]:
    if not there:
        return ["# no GPU was found: nvidia-smi is missing or shows none", "gpus: []"]
    rows = [f"  - {{index: {c.index}, memory_mib: {c.total_mib}}}  # {c.name}" for c in there]
    return ["gpus:", *rows]


def _model_rows(names: Sequence[str], there: Sequence[Card], places: Places) -> list[str]:
    rows: list[str] = []
    active = False
    for name in names or [_EXAMPLE]:
        count = _cards_for(name, there, places)
        found = estimate(name, caches=caches(places), gpus=count or 1)
        if found is None or count is None:
            rows.append(f"  # {name}: does not fit, or nobody can tell ({found})")
            continue
        mode, active = ("sleep" if active else "active"), True
        rows += _entry_rows(name, found, count, mode)
    if not active:
        rows.append(f"  - {{id: {name_for(_EXAMPLE)}, gpu_memory_gb: 20, engine: "
                    f"{{model: {_EXAMPLE}}}}}")  # fmt: skip
    return rows


def _entry_rows(name: str, found: Estimate, count: int, mode: str) -> list[str]:
    memory, weights = round(found.total_gib, 1), round(found.weights_gib, 1)
    split = [f"      args: {{tensor-parallel-size: {count}}}"] if count > 1 else []
    return [
        f"  # {found}",
        f"  - id: {scalar(name_for(name))}",
        f"    gpu_memory_gb: {memory:g}",
        f"    weights_gb: {weights:g}",
        f"    startup_mode: {mode}",
        "    engine:",
        f"      model: {scalar(name)}",
        *split,
    ]


def _cards_for(name: str, there: Sequence[Card], places: Places) -> int | None:
    """The least number of cards, a power of two as vLLM wants it, that holds the model."""
    if not there:
        return 1
    count = 1
    while count <= len(there):
        found = estimate(name, caches=caches(places), gpus=count)
        room = min(card.total_mib for card in there) / 1024 * 0.92 * count
        if found is not None and found.total_gib <= room:
            return count
        count *= 2
    return None


def missing_gib(config: Config, places: Places) -> float:
    """Weights that still have to be fetched, as far as their names tell, in GiB."""
    total = 0.0
    for model in config.models:
        if model.engine is None or model.engine.model is None:
            continue
        found = estimate(model.engine.model, caches=[places.hf_cache])
        if found is not None and found.source.startswith("guessed"):
            total += found.weights_gib
    return total

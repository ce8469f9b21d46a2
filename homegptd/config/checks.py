"""What only shows when the parts of a file are put side by side."""

from collections.abc import Iterable, Sequence

from .models import Read
from .schema import HOST_PER_ENGINE_GB, Config, GpuConfig
from .table import Table


def check(root: Table, config: Config, read: Sequence[Read]) -> None:
    """Report every contradiction between the parts of `config`, where it stands."""
    _names_are_unique(read)
    _containers_are_unique(read)
    _ports_are_unique(root, config, read)
    _default_can_serve(root, config)
    _gpus_exist_and_suffice(config.gpus, read)
    _models_fit(config.gpus, read)
    _actives_fit_together(config.gpus, read)
    _models_fit_beside_what_never_leaves(config.gpus, read)
    _ram_is_enough(root, config, read)
    _default_may_return(root, config, read)


def _names_are_unique(read: Sequence[Read]) -> None:
    ids: dict[str, int] = {}
    for entry in read:
        ident, table = entry.model.id, entry.table
        if ident in ids:
            table.problem("id", f'"{ident}" is given twice (first on line {ids[ident]})')
        elif ident:
            ids[ident] = table.line("id")
    aliases: dict[str, str] = {}
    for entry in read:
        for alias in entry.model.aliases:
            if alias in ids:
                entry.table.problem("aliases", f'"{alias}" is the id on line {ids[alias]}')
            elif alias in aliases:
                entry.table.problem("aliases", f'"{alias}" is an alias of {aliases[alias]} already')
            aliases.setdefault(alias, entry.model.id)


def _containers_are_unique(read: Sequence[Read]) -> None:
    seen: dict[str, Read] = {}
    ids: set[str] = set()
    for entry in read:
        if entry.model.id in ids:
            continue  # the id was reported, its default container is no news
        ids.add(entry.model.id)
        name = entry.model.container_name
        if name in seen:
            other = seen[name].model.id
            entry.table.problem("container_name", f'"{name}" is the container of {other} already')
        seen.setdefault(name, entry)


def _ports_are_unique(root: Table, config: Config, read: Sequence[Read]) -> None:
    taken: dict[int, str] = {}
    http = root.section("http")
    listens: set[str] = set()
    for listen in config.http.listen:
        port = int(listen.rpartition(":")[2])
        if listen in listens and port:
            http.problem("listen", f'"{listen}" is given twice')
        listens.add(listen)
        taken[port] = "http.listen"
    if config.webui.enabled:
        _take(taken, config.webui.port, root.section("webui"), "port")
    for entry in read:
        if entry.model.host_port is not None:
            _take(taken, entry.model.host_port, entry.table, "host_port")


def _take(taken: dict[int, str], port: int, table: Table, key: str) -> None:
    if port in taken:
        table.problem(key, f"port {port} is taken by {taken[port]}")
    taken.setdefault(port, f"{table.item.path}.{key}")


def _default_can_serve(root: Table, config: Config) -> None:
    if config.default is None:
        return
    model = config.model(config.default)
    if model is None:
        known = ", ".join(m.id for m in config.models if m.id)
        root.problem("default", f'no model is named "{config.default}"; there are {known}')
    elif model.startup_mode == "disabled":
        root.problem("default", f'"{config.default}" has startup_mode disabled')


def _gpus_exist_and_suffice(cards: Sequence[GpuConfig], read: Sequence[Read]) -> None:
    indices = {card.index for card in cards}
    for entry in read:
        given, needed, table = entry.model.gpus, entry.gpus_needed, entry.table
        if len(set(given)) < len(given):
            table.problem("gpus", "names a GPU twice")
        if "gpus" not in table:
            if needed is not None and cards and needed > len(cards):
                table.problem(
                    "engine", f"its parallel sizes need {needed} GPUs, gpus: has {len(cards)}"
                )
            continue
        for index in sorted(set(given) - indices if cards else ()):
            table.problem("gpus", f"there is no GPU {index}; gpus: has {_words(sorted(indices))}")
        if needed is not None and needed != len(given):
            table.problem(
                "gpus", f"names {len(given)} GPUs, but the engine's parallel sizes need {needed}"
            )


def _models_fit(cards: Sequence[GpuConfig], read: Sequence[Read]) -> None:
    for entry in read:
        model = entry.model
        _parts_are_smaller(entry)
        each = model.gpu_memory_mib_each
        for card in _of(cards, model.gpus):
            if card.memory_mib is not None and each > card.memory_mib:
                parts = f" / {len(model.gpus)} GPUs = {_gb(each)}" if len(model.gpus) > 1 else ""
                message = f"{model.gpu_memory_gb:.1f} GB{parts} is more than GPU {card.index} has"
                entry.table.problem("gpu_memory_gb", f"{message}, {_gb(card.memory_mib)}")
                break


def _parts_are_smaller(entry: Read) -> None:
    model = entry.model
    for key, part in (("weights_gb", model.weights_gb), ("residue_gb", model.residue_gb)):
        if part is not None and 0 < model.gpu_memory_gb < part:
            whole = f"gpu_memory_gb, {model.gpu_memory_gb:g}"
            entry.table.problem(key, f"{part:g} is more than {whole}, which it is a part of")


def _actives_fit_together(cards: Sequence[GpuConfig], read: Sequence[Read]) -> None:
    actives = [entry for entry in read if entry.model.startup_mode == "active"]
    for card in cards:
        on_it = [entry for entry in actives if card.index in entry.model.gpus]
        total = sum(entry.model.gpu_memory_mib_each for entry in on_it)
        if len(on_it) < 2 or card.memory_mib is None or total <= card.memory_mib:
            continue
        terms = " + ".join(f"{e.model.id} {_gb(e.model.gpu_memory_mib_each)}" for e in on_it)
        on_it[-1].table.problem(
            "startup_mode",
            f"the active models do not fit together on GPU {card.index}: "
            f"{terms} = {_gb(total)} of {_gb(card.memory_mib)}; let all but one start asleep",
        )
        return


def _models_fit_beside_what_never_leaves(cards: Sequence[GpuConfig], read: Sequence[Read]) -> None:
    """What is pinned and active is awake from the bootstrap on, and makes room for nobody."""
    for entry in read:
        model = entry.model
        for card in _of(cards, model.gpus):
            stay = [e.model for e in _staying(read, entry) if card.index in e.model.gpus]
            left = (card.memory_mib or 0) - sum(m.gpu_memory_mib_each for m in stay)
            each = model.gpu_memory_mib_each
            if card.memory_mib is None or not stay or each > card.memory_mib or each <= left:
                continue
            terms = "".join(f" - {_gib(m.gpu_memory_mib_each)} pinned {m.id}" for m in stay)
            total = _gib(card.memory_mib)
            entry.table.problem(
                "gpu_memory_gb",
                f"can never be awake: needs {_gib(each)} GB on gpu{card.index};"
                f" {total} total{terms} = {_gib(left)}",
            )
            break


def _staying(read: Sequence[Read], beside: Read) -> list[Read]:
    """Models that are awake for good; of several actives each other sum has been shown already."""
    active = beside.model.startup_mode == "active"
    return [
        entry
        for entry in read
        if entry is not beside
        and entry.model.pinned
        and entry.model.startup_mode == "active"
        and not active
    ]


def _ram_is_enough(root: Table, config: Config, read: Sequence[Read]) -> None:
    """Each engine has processes of its own, and those of what is awake for good stay."""
    ram = config.available_ram_gb
    if ram is None:
        return
    stay = [e.model for e in read if e.model.pinned and e.model.startup_mode == "active"]
    others = [e for e in read if e.model not in stay]
    engines = len(stay) + (1 if others else 0)
    if engines and ram < engines * HOST_PER_ENGINE_GB:
        name = others[0].model.id if others else stay[-1].id
        before = [m.id for m in stay if m.id != name]
        terms = "".join(f" - {HOST_PER_ENGINE_GB:.1f} process of {each}" for each in before)
        left = ram - len(before) * HOST_PER_ENGINE_GB
        root.section("switching").problem(
            "available_ram_gb",
            f"{name} can never run: needs {HOST_PER_ENGINE_GB:.1f} GB of host RAM;"
            f" {ram:.1f} total{terms} = {left:.1f}",
        )


def _default_may_return(root: Table, config: Config, read: Sequence[Read]) -> None:
    back_s, model = config.router.return_to_default_s, config.default_model
    if back_s is None:
        return
    if model is None:
        text = "there is no default model to return to; give default, or start one active"
        root.section("router").problem("return_to_default_s", text)
        return
    entry = next((e for e in read if e.model is model), None)
    if entry is not None and model.idle is not None:
        rests = (model.idle.sleep_after_s, model.idle.stop_after_s)
        if any(rest is not None for rest in rests):
            text = "router.return_to_default_s wakes this model when nobody wants anything;"
            entry.table.problem("idle", f"{text} it cannot rest for idleness too")


def _of(cards: Sequence[GpuConfig], indices: Iterable[int]) -> list[GpuConfig]:
    wanted = set(indices)
    return [card for card in cards if card.index in wanted]


def _gb(mib: int) -> str:
    return f"{mib / 1024:.1f} GB"


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f}"


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))

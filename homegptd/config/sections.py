"""The sections of the file beside `models`."""

import re
from ipaddress import ip_address

from .schema import (
    BackendName,
    BackgroundTasks,
    ControlConfig,
    DeadlinePolicy,
    GpuConfig,
    HttpConfig,
    RouterConfig,
    SecretsConfig,
    SwitchingConfig,
    Trust,
    WebuiConfig,
)
from .table import Table
from .values import (
    Bad,
    Item,
    Reader,
    choice,
    flag,
    listing,
    matching,
    number,
    one_or_more,
    text,
    whole,
)

_MONTH_S = 30 * 86400
_MOST_MIB = 2**24
_LISTEN = 'must be addr:port, such as "127.0.0.1:9000" or "[::1]:9000"'
_HOST = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")

_HOST_NAME = matching(_HOST.pattern, "a host name, such as gpu.example.org")
_ORIGIN = matching(
    r"\*|[a-z][a-z0-9+.-]*://[A-Za-z0-9.\[\]:_-]+",
    'an origin, such as "https://chat.example.org" or "http://localhost:5173", or "*"',
)

SECONDS = number(least=0, most=_MONTH_S)
SECONDS_ABOVE_0 = number(above=0, most=_MONTH_S)
PORT = whole(1, 65535)
IMAGE = matching(r"[A-Za-z0-9]\S*", "a container image, such as docker.io/vllm/vllm-openai:v0.32.0")
PATH = matching(r"/.*", "an absolute path")
DEADLINE: Reader[DeadlinePolicy] = choice(
    {"auto": "auto", "freeze": "freeze", "wait": "wait", "cut": "cut"}
)
TASKS: Reader[BackgroundTasks] = choice({"wait": "wait", "switch": "switch"})
TRUST: Reader[Trust] = choice({"measured": "measured", "configured": "configured"})
BACKEND: Reader[BackendName] = choice({"process": "process", "systemd": "systemd"})


def gpus(root: Table) -> tuple[GpuConfig, ...]:
    """The cards of the box; empty where the file leaves that to the driver."""
    cards: list[GpuConfig] = []
    lines: dict[int, int] = {}
    for place, table in enumerate(root.get("gpus", listing(Table, most=64), ())):
        index = table.get("index", whole(0, 63), place)
        memory_mib = table.get("memory_mib", whole(256, _MOST_MIB), None)
        if index in lines:
            table.problem("index", f"GPU {index} is given twice (first on line {lines[index]})")
        lines.setdefault(index, table.line("index"))
        table.finish()
        cards.append(GpuConfig(index=index, memory_mib=memory_mib))
    return tuple(cards)


def switching(root: Table) -> SwitchingConfig:
    table, default = root.section("switching"), SwitchingConfig()
    interval = "health_check_interval_seconds"
    read = SwitchingConfig(
        available_ram_gb=table.get("available_ram_gb", number(above=0, most=2**20), None),
        max_retries=table.get("max_retries", whole(1, 1_000_000), default.max_retries),
        health_check_interval_seconds=table.get(
            interval, number(above=0, most=3600), default.health_check_interval_seconds
        ),
    )
    table.finish()
    return read


def router(root: Table) -> RouterConfig:
    table, default = root.section("router"), RouterConfig()
    mib = whole(1, _MOST_MIB)
    between = default.between_bytes_timeout_s
    read = RouterConfig(
        patience_s=table.get("patience_s", SECONDS, None),
        min_residency_s=table.get("min_residency_s", SECONDS, None),
        switch_share=table.get("switch_share", number(above=0, most=0.9), default.switch_share),
        drain_s=table.get("drain_s", SECONDS, default.drain_s),
        on_deadline=table.get("on_deadline", DEADLINE, default.on_deadline),
        max_answer_s=table.get("max_answer_s", SECONDS_ABOVE_0, default.max_answer_s),
        freeze_max_s=table.get("freeze_max_s", SECONDS_ABOVE_0, default.freeze_max_s),
        rouse=table.get("rouse", flag, default.rouse),
        return_to_default_s=table.get("return_to_default_s", SECONDS_ABOVE_0, None),
        auto_switch=table.get("auto_switch", flag, default.auto_switch),
        background_tasks=table.get("background_tasks", TASKS, default.background_tasks),
        max_waiting=table.get("max_waiting", whole(0, 1_000_000), default.max_waiting),
        max_waiting_mib=table.get("max_waiting_mib", mib, default.max_waiting_mib),
        max_wait_s=table.get("max_wait_s", SECONDS_ABOVE_0, default.max_wait_s),
        max_body_mib=table.get("max_body_mib", mib, default.max_body_mib),
        early_head_s=table.get("early_head_s", SECONDS, default.early_head_s),
        first_byte_timeout_s=table.get(
            "first_byte_timeout_s", SECONDS_ABOVE_0, default.first_byte_timeout_s
        ),
        between_bytes_timeout_s=table.get("between_bytes_timeout_s", SECONDS_ABOVE_0, between),
        realtime_idle_s=table.get("realtime_idle_s", SECONDS_ABOVE_0, default.realtime_idle_s),
    )
    table.finish()
    return read


def http(root: Table) -> HttpConfig:
    table = root.section("http")
    read = HttpConfig(
        listen=table.get("listen", one_or_more(address), HttpConfig().listen),
        keys=table.get("keys", PATH, None),
        hosts=table.get("hosts", one_or_more(_HOST_NAME), ()),
        cors=table.get("cors", one_or_more(_ORIGIN), ()),
    )
    if "*" in read.cors and read.keys is None:
        table.problem("cors", '"*" lets every web page use the models, so it needs http.keys too')
    table.finish()
    return read


def address(item: Item) -> str:
    """`addr:port`, the address an IPv4, an IPv6 in brackets, or a host name; port 0 is any."""
    value = text(item)
    host, colon, port = value.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not _is_host(host):
        raise Bad(f'found "{value[:60]}", {_LISTEN}')
    if int(port) > 65535:
        raise Bad(f"found port {port}, allowed are 0 to 65535")
    return value


def _is_host(host: str) -> bool:
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        return ip_address(host[1:-1] if bracketed else host).version == (6 if bracketed else 4)
    except ValueError:
        return _HOST.fullmatch(host) is not None


def control(root: Table) -> ControlConfig:
    table = root.section("control")
    group = matching(r"[a-z_][a-z0-9_-]{0,31}", "the name of a Unix group")
    # sun_path holds 108 bytes with its end; see unix(7).
    socket = matching(r"/.{1,106}", "an absolute path of at most 107 characters")
    read = ControlConfig(
        socket=table.get("socket", socket, None), group=table.get("group", group, None)
    )
    table.finish()
    return read


def webui(root: Table) -> WebuiConfig:
    table, default = root.section("webui"), WebuiConfig()
    read = WebuiConfig(
        enabled=table.get("enabled", flag, default.enabled),
        port=table.get("port", PORT, default.port),
        image=table.get("image", IMAGE, default.image),
    )
    table.finish()
    return read


def secrets(root: Table) -> SecretsConfig:
    table = root.section("secrets")
    name = matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", "the name of a Podman secret")
    read = SecretsConfig(hf_token=table.get("hf_token", name, None))
    table.finish()
    return read

"""Quadlet units from a configuration: pure, and the same text for the same configuration.

Only keys that podman 4.7 knows, and PodmanArgs= for what came later: an unknown key makes the whole
file void (podman-systemd.unit(5)). Nothing but homegptd starts a model's unit, hence no [Install]
and no restarts; nothing in it may wait for homegpt.service, which waits for it.
"""

import hashlib
import re
from collections.abc import Mapping

from homegptd.config.schema import (
    CONTAINER_GATEWAY,
    CONTAINER_SUBNET,
    Config,
    EngineConfig,
    ModelConfig,
)

from .places import CONFIG, ENGINE_CACHES, GROUP, HF_CACHE, LOGGING, QUADLETS, SOCKETS
from .quote import expanded, lines, word
from .webui import webui

MARK = f"# Rendered from {CONFIG} by homegptctl apply."
"""How a file of ours begins; others in the same folder are left alone."""
RESERVED = {"homegpt", "homegpt-network", "open-webui"}
"""Units of our own, which no model's container may be named after."""

CACHE = "/var/cache/engine"
"""Where the engine's own cache lies inside its container."""
SHM = "8g"
"""Room for NCCL and vLLM's queues between processes; only what is used is charged."""


class CannotRender(Exception):
    """The configuration is sound, but containers cannot do it. `problems` has a line for each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def render(config: Config) -> dict[str, str]:
    """File names and texts, in the order of the configuration. Raises: CannotRender."""
    problems = tuple(filter(None, map(_problem, config.models)))
    if problems:
        raise CannotRender(problems)
    files = {"homegpt.network": f"{_head('homegpt.network')}{_NETWORK}"}
    for model in config.models:
        if model.engine is not None:
            name = file_name(model)
            files[name] = f"{_head(name)}{_container(model, model.engine, config)}"
    if config.webui.enabled:
        files["open-webui.container"] = f"{_head('open-webui.container')}{webui(config)}"
    return files


def file_name(model: ModelConfig) -> str:
    return f"{model.unit.removesuffix('.service')}.container"


def service(name: str) -> str:
    """The unit that podman's generator makes of a file."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.service" if kind == "container" else f"{stem}-{kind}.service"


def engine_args(model: ModelConfig, engine: EngineConfig, config: Config) -> tuple[str, ...]:
    """What follows `vllm serve`: the configured flags, and those without which nothing works."""
    args = [engine.model or "", *engine.args]
    if not _says(engine.args, "enable-sleep-mode"):
        args.append("--enable-sleep-mode")
    share = _memory_share(model, config)
    if share and not _says(engine.args, "gpu-memory-utilization", "kv-cache-memory-bytes"):
        args += ["--gpu-memory-utilization", share]
    socket = f"{SOCKETS}/{model.id}/engine.sock"
    return (*args, "--served-model-name", *model.names, "--uds", socket)


def _problem(model: ModelConfig) -> str | None:
    name = model.unit.removesuffix(".service")
    if name in RESERVED:
        return f'{model.id}: container_name "{name}" is a unit of homeGPT itself'
    if model.engine is None:
        return None
    if model.engine.model is None:
        return f"{model.id}: a container needs engine.model; engine.command is for plain processes"
    if model.engine.over_tcp:
        return f"{model.id}: engine.command asks for a port; containers listen on a socket"
    try:
        lines((model.engine.model, *model.engine.args))
    except ValueError as error:
        return f"{model.id}: engine.args: {error}"
    return None


def _says(args: tuple[str, ...], *names: str) -> bool:
    """Whether the flag, or its `--no-` form, is among the words."""
    given = {a.lstrip("-").partition("=")[0].replace("_", "-") for a in args if a.startswith("-")}
    return any(name in given or f"no-{name}" in given for name in names)


def _memory_share(model: ModelConfig, config: Config) -> str | None:
    """vLLM counts its share of the whole card, whoever else is on it (vLLM 0.11 to 0.33)."""
    sizes = {card.index: card.memory_mib for card in config.gpus}
    found = [sizes.get(index) for index in model.gpus]
    known = [size for size in found if size]
    if len(known) < len(found):
        return None
    share = int(1000 * model.gpu_memory_mib_each / min(known)) / 1000
    return f"{share:.3f}".rstrip("0") if 0 < share < 1 else None


def _head(name: str) -> str:
    local = f"{QUADLETS.rpartition('/')[0]}/{name}.d/90-local.conf"
    return f"{MARK}\n# Do not edit; put what shall differ into\n# {local}\n"


_NETWORK = f"""\
[Unit]
Description=homeGPT: container network

[Network]
NetworkName=homegpt
Subnet={CONTAINER_SUBNET}
Gateway={CONTAINER_GATEWAY}
"""


def _container(model: ModelConfig, engine: EngineConfig, config: Config) -> str:
    return f"{_unit(model)}\n{_box(model, engine, config)}\n{_service(model, engine)}"


def _unit(model: ModelConfig) -> str:
    pull = f"homegpt-pull@{model.id}.service"
    return f"""\
[Unit]
Description=homeGPT: {expanded(model.name or model.id)}
Documentation=man:homegptd(8)
# fetches image and weights if they are missing, without any limit of time
Wants={pull}
After={pull} nvidia-cdi-refresh.service
# homegptd counts the tries; this limit would count those by hand as well
StartLimitIntervalSec=0
"""


def _box(model: ModelConfig, engine: EngineConfig, config: Config) -> str:
    token = config.secrets.hf_token
    rows = [
        f"Image={expanded(engine.image)}",
        f"ContainerName={model.unit.removesuffix('.service')}",
        f"Label=io.homegpt.model={model.id}",
        "Pull=never",
        *(f"AddDevice=nvidia.com/gpu={index}" for index in model.gpus),
        f"Network={'homegpt.network' if engine.network else 'none'}",
        f"ShmSize={SHM}",
        "RunInit=true",
        "DropCapability=all",
        "NoNewPrivileges=true",
        "# SELinux knows no label under which GPUs, weights and the socket are all allowed",
        "SecurityLabelDisable=true",
        "LogDriver=journald",
        *_volumes(model, engine),
        *(f"Environment={word(f'{k}={v}')}" for k, v in environment(engine).items()),
        *([f"Secret={token},type=env,target=HF_TOKEN"] if token and engine.network else []),
        "# the engine's socket: for the group homegpt, which its directory hands down",
        "PodmanArgs=--umask=0007",
        "PodmanArgs=--stop-timeout=30",
        f"Exec={lines(engine_args(model, engine, config))}",
    ]
    return "\n".join(["[Container]", *rows, ""])


def _volumes(model: ModelConfig, engine: EngineConfig) -> list[str]:
    """Ours, unless the configuration puts something else in the same place."""
    hub = "rw" if engine.network else "ro"
    ours = {
        "/root/.cache/huggingface": f"{HF_CACHE}:/root/.cache/huggingface:{hub}",
        CACHE: f"{_cache(model, engine)}:{CACHE}",
        LOGGING: f"{LOGGING}:{LOGGING}:ro",
        f"{SOCKETS}/{model.id}": f"{SOCKETS}/{model.id}:{SOCKETS}/{model.id}",
    }
    taken = {volume.split(":")[1].rstrip("/") for volume in engine.volumes}
    kept = [volume for target, volume in ours.items() if target not in taken]
    return [f"Volume={expanded(volume)}" for volume in (*kept, *engine.volumes)]


def _cache(model: ModelConfig, engine: EngineConfig) -> str:
    """By model, so that no engine runs what another one compiled; by image, because a new one may
    not understand what an old one left."""
    tag = re.sub(r"[^A-Za-z0-9._-]", "-", engine.image.rpartition(":")[2])[-40:].lstrip(".-")
    digest = hashlib.sha256(engine.image.encode()).hexdigest()[:8]
    return f"{ENGINE_CACHES}/{model.id}/{tag or 'image'}-{digest}"


def environment(engine: EngineConfig) -> Mapping[str, str]:
    """What the engine's container is told; what the configuration says wins."""
    alone = {"HF_HUB_OFFLINE": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # else vLLM asks a resolver on the internet which address it has (0.32)
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_CONFIG_PATH": LOGGING,
        "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
        "TRITON_CACHE_DIR": f"{CACHE}/triton",
        "FLASHINFER_WORKSPACE_BASE": f"{CACHE}/flashinfer",
        "CUDA_CACHE_PATH": f"{CACHE}/cuda",
        "HF_MODULES_CACHE": f"{CACHE}/hf-modules",
        **({} if engine.network else alone),
        **engine.env,
    }


def _service(model: ModelConfig, engine: EngineConfig) -> str:
    sockets = f"{SOCKETS}/{model.id}"
    return f"""\
[Service]
Slice=homegpt-models.slice
ExecStartPre=/usr/bin/install -d -m 0755 {HF_CACHE} {_cache(model, engine)}
ExecStartPre=/usr/bin/install -d -m 2750 -g {GROUP} {sockets}
# vLLM leaves its socket behind and then cannot bind there again (0.32)
ExecStartPre=/usr/bin/rm -f {sockets}/engine.sock
# the daemon has to make room before an engine loads, so nobody else restarts it
Restart=no
TimeoutStartSec=5min
TimeoutStopSec=60
LimitMEMLOCK=infinity
"""

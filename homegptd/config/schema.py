"""The settings as frozen values. Names are the keys of the YAML file; units end the names.

`_gb` is GiB (2^30 bytes), as the figures of vLLM and nvidia-smi are; `_mib` is MiB; `_s` seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

StartupMode = Literal["disabled", "sleep", "active"]
SleepChoice = Literal["auto", 1, 2]
DeadlinePolicy = Literal["auto", "freeze", "wait", "cut"]
BackgroundTasks = Literal["wait", "switch"]
BackendName = Literal["process", "systemd"]
Trust = Literal["measured", "configured"]
EngineKind = Literal["generate", "embed", "score", "audio"]

DEFAULT_IMAGE = "docker.io/vllm/vllm-openai:v0.32.0"
DEFAULT_WEBUI_IMAGE = "ghcr.io/open-webui/open-webui:main"

CONTAINER_SUBNET = "10.89.93.0/24"
CONTAINER_GATEWAY = "10.89.93.1"
"""The box as containers on `homegpt.network` see it; homegptd listens there for Open WebUI."""

WEIGHTS_SHARE = 0.6
"""Guessed weights as a share of `gpu_memory_gb`, whose rest is mostly KV cache."""
RESIDUE_PER_GPU_GB = 0.75
"""Guessed GPU memory that a sleeper keeps on each of its GPUs: CUDA context, graphs, NCCL buffers.

Reports run from 0.4 to 2 GiB. The guess is low on purpose, since it only counts until the first
sleep is measured, and one too high would forbid switches that work.
"""

HOST_PER_ENGINE_GB = 4.0
"""RAM of one engine's processes without pinned weights: 3 to 6 GiB were seen (vLLM 0.32)."""


def _nothing() -> Mapping[str, str]:
    return MappingProxyType({})


def _mib(gib: float) -> int:
    return round(gib * 1024)


@dataclass(frozen=True, slots=True)
class GpuConfig:
    """One card of the box."""

    index: int
    """As nvidia-smi counts; default: the place in the list."""
    memory_mib: int | None = None
    """Total memory in MiB, as nvidia-smi shows it; None: ask the card."""


@dataclass(frozen=True, slots=True)
class IdleConfig:
    """What becomes of a model that nobody asks for."""

    sleep_after_s: float | None = None
    """Seconds without a request until an awake model sleeps; None: never for idleness alone."""
    stop_after_s: float | None = None
    """Seconds without a request until its engine is stopped; None: never for idleness alone."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The vLLM server of a model: what its Quadlet, or its child process, is made from."""

    model: str | None = None
    """What vLLM loads: a Hugging Face id or a path; None only where `command` says it all."""
    image: str = DEFAULT_IMAGE
    """Container image; unused by the process backend."""
    args: tuple[str, ...] = ()
    """Flags after the model, in order; the file's top-level `engine.args` are merged in already."""
    env: Mapping[str, str] = field(default_factory=_nothing, hash=False)
    """Environment on top of what homegptd sets; top-level `engine.env` is merged in already."""
    command: tuple[str, ...] | None = None
    """The whole argv for the process backend instead of `vllm serve`; see `command_line`."""
    volumes: tuple[str, ...] = ()
    """`host:container[:options]`, for the container; top-level `engine.volumes` come first."""
    network: bool = False
    """Whether its container has a network; without one weights are fetched beforehand."""
    kind: EngineKind = "generate"
    """What the model does, hence which canary fits it."""
    start_timeout_s: float | None = None
    """Seconds from start (after downloads) to healthy; None: max_retries * interval."""

    @property
    def api_key(self) -> str | None:
        """What vLLM asks for under /v1: `--api-key`, else VLLM_API_KEY; None: nothing."""
        words = iter(self.args)
        for word in words:
            name, _, value = word.partition("=")
            if name == "--api-key":
                return value or next(words, None)
        return self.env.get("VLLM_API_KEY")

    @property
    def over_tcp(self) -> bool:
        """Whether `command` listens on 127.0.0.1:port instead of the engine's Unix socket."""
        text = " ".join(self.command or ())
        return "{port}" in text and "{socket}" not in text


def _no_values() -> Mapping[str, object]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RequestConfig:
    """What the router writes into requests for a model: members of their JSON bodies, and forms'
    fields. Mappings such as `chat_template_kwargs` are merged."""

    defaults: Mapping[str, object] = field(default_factory=_no_values, hash=False)
    """Count where a request says nothing, or null."""
    overrides: Mapping[str, object] = field(default_factory=_no_values, hash=False)
    """Count always; null takes a member out."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. `id` and `gpu_memory_gb` must be given; parsing fills in the other defaults."""

    id: str
    """What clients and operators call it; safe as part of a unit's name."""
    gpu_memory_gb: float
    """Footprint awake, KV cache included, in GiB over all its GPUs together."""
    name: str = ""
    """For people; default: the id."""
    container_name: str = ""
    """Its container, and with `.service` its unit; default: `vllm-<id>`."""
    port: int = 8000
    """Port inside the container (and on 127.0.0.1 for a `command` with `{port}`)."""
    host_port: int | None = None
    """Port of the box on which homegptd opens a door to this model alone; None: no door."""
    startup_mode: StartupMode = "sleep"
    """disabled: not started; sleep: loaded, then put to sleep; active: loaded and ready."""
    aliases: tuple[str, ...] = ()
    """Further names that clients may use."""
    gpus: tuple[int, ...] = (0,)
    """Indices of its GPUs; default: the first ones, as many as its parallel sizes need."""
    weights_gb: float | None = None
    """Weights in GiB, hence host RAM kept when asleep at level 1; default: 0.6 * gpu_memory_gb."""
    residue_gb: float | None = None
    """GPU memory kept asleep, in GiB over all its GPUs; default: 0.75 per GPU."""
    sleep_level: SleepChoice = "auto"
    """1 keeps weights in host RAM, 2 drops them; auto: by available RAM and the ledger."""
    idle: IdleConfig | None = None
    """None: being idle changes nothing."""
    pinned: bool = False
    """Whether nothing but the operator (with --force) displaces it."""
    priority: int = 0
    """Higher goes first where several models wait for the same GPUs."""
    auto_switch: bool = True
    """Whether a request may wake it; False: only the operator does."""
    drain_s: float | None = None
    """Overrides `router.drain_s` for this model."""
    on_deadline: DeadlinePolicy | None = None
    """Overrides `router.on_deadline` for this model."""
    first_byte_timeout_s: float | None = None
    """Overrides `router.first_byte_timeout_s` for this model."""
    between_bytes_timeout_s: float | None = None
    """Overrides `router.between_bytes_timeout_s` for this model."""
    request: RequestConfig = RequestConfig()
    """What is set in requests for it."""
    trust: Trust = "measured"
    """What counts where both are known: measured figures, or gpu_memory_gb, weights_gb, residue_gb
    as given. Default: the file's top-level `trust`."""
    engine: EngineConfig | None = None
    """None: the unit is written by hand and only named here."""
    start_limit_s: float = 600.0
    """Seconds from start (after downloads) to healthy: the engine's start_timeout_s, else
    max_retries * health_check_interval_seconds. Derived, no key of the file."""
    estimated: frozenset[str] = frozenset()
    """Which of gpus, weights_gb, residue_gb are guesses of ours rather than given by the user."""

    @property
    def unit(self) -> str:
        return f"{self.container_name or 'vllm-' + self.id}.service"

    @property
    def names(self) -> tuple[str, ...]:
        """The id, then the aliases: every name a client may use."""
        return (self.id, *self.aliases)

    @property
    def gpu_memory_mib(self) -> int:
        """Awake, over all its GPUs."""
        return _mib(self.gpu_memory_gb)

    @property
    def gpu_memory_mib_each(self) -> int:
        """Awake, on each of its GPUs: tensor parallelism splits evenly. Rounded up."""
        return -(-self.gpu_memory_mib // len(self.gpus))

    @property
    def weights_mib(self) -> int:
        """Host RAM of a level 1 sleeper, given or guessed."""
        guess = WEIGHTS_SHARE * self.gpu_memory_gb
        return _mib(guess if self.weights_gb is None else self.weights_gb)

    @property
    def residue_mib_each(self) -> int:
        """Asleep, on each of its GPUs, given or guessed. Rounded up."""
        if self.residue_gb is None:
            return _mib(RESIDUE_PER_GPU_GB)
        return -(-_mib(self.residue_gb) // len(self.gpus))


@dataclass(frozen=True, slots=True)
class SwitchingConfig:
    """The original manager's section, unchanged."""

    available_ram_gb: float | None = None
    """Host RAM for sleepers in GiB; under 64 the default is level 2. None: ask the host."""
    max_retries: int = 120
    """Health checks until a start counts as failed."""
    health_check_interval_seconds: float = 5.0
    """Seconds a health check stands for; only the product with max_retries counts."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How requests wait, who goes first, and what a switch does to running answers."""

    patience_s: float | None = None
    """Seconds the head of the queue lets others overtake; None: from the forecast of a switch."""
    min_residency_s: float | None = None
    """Seconds a woken model stays unless idle; None: from the forecast of a switch."""
    switch_share: float = 0.2
    """Greatest share of the time (0 to 1, exclusive) that switching may take under contention."""
    drain_s: float = 30.0
    """Seconds that running answers get to end before a switch."""
    on_deadline: DeadlinePolicy = "auto"
    """Answers past drain_s. auto: freeze where this box has proved it, else wait."""
    max_answer_s: float = 1800.0
    """Seconds after which waiting for an answer ends, and a switch cuts it."""
    freeze_max_s: float = 600.0
    """Seconds an answer may stay frozen before its client gets an error."""
    rouse: bool = True
    """Whether a model's weights may come back while others still answer, where both fit
    (vLLM 0.31+)."""
    return_to_default_s: float | None = None
    """Seconds without any request until the default model is awake again; None: never."""
    auto_switch: bool = True
    """Whether requests may cause switches at all."""
    background_tasks: BackgroundTasks = "wait"
    """Titles, tags and follow-up questions of Open WebUI. wait: for a model that comes up anyway, a
    few seconds; switch: like any other request."""
    max_waiting: int = 256
    """Requests that may wait, over all models."""
    max_waiting_mib: int = 256
    """MiB that the bodies of waiting requests may take together."""
    max_wait_s: float = 900.0
    """Seconds a request waits for its model before it is refused."""
    max_body_mib: int = 128
    """MiB of one request's body; images travel inside."""
    early_head_s: float = 1.5
    """Seconds after which a stream that waits begins, with status 200 and signs of life."""
    first_byte_timeout_s: float = 600.0
    """Seconds from sending a request to an awake engine to the first byte of its answer."""
    between_bytes_timeout_s: float = 120.0
    """Seconds of silence inside an answer after which the engine counts as hung."""
    realtime_idle_s: float = 60.0
    """Seconds without a word from either side after which a realtime session is closed."""

    @property
    def max_waiting_bytes(self) -> int:
        return self.max_waiting_mib << 20

    @property
    def max_body_bytes(self) -> int:
        return self.max_body_mib << 20


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """The HTTP door: management, router, dashboard."""

    listen: tuple[str, ...] = ("127.0.0.1:9000",)
    """Addresses as `addr:port`; IPv6 as `[::1]:9000`."""
    keys: str | None = None
    """File of API keys; None: nobody is asked for one."""
    hosts: tuple[str, ...] = ()
    """Further names that the box is called by in clients' URLs."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may use the models from a browser; `*`: all."""


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """The control socket."""

    socket: str | None = None
    """Path; None: /run/homegpt/control.sock, or below $XDG_RUNTIME_DIR for an ordinary user."""
    group: str | None = None
    """Unix group that may use it; None: the daemon's own group."""


@dataclass(frozen=True, slots=True)
class WebuiConfig:
    """Open WebUI, started once the models are ready."""

    enabled: bool = False
    """Whether homegptd starts it."""
    port: int = 3000
    """Port of the box on which it is served."""
    image: str = DEFAULT_WEBUI_IMAGE
    """Container image."""


@dataclass(frozen=True, slots=True)
class SecretsConfig:
    """Names of Podman secrets (`podman secret create NAME FILE`); never what is in them."""

    hf_token: str | None = None
    """Token for Hugging Face, for gated models; None: none is needed."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration file."""

    models: tuple[ModelConfig, ...]
    """In the order of the file, which is also the order of bootstrap."""
    default: str | None = None
    """Id of the model for requests that name none; None: see `default_model`."""
    gpus: tuple[GpuConfig, ...] = ()
    """The cards; empty: not given, so ask the driver (and trust no model's guessed `gpus`)."""
    switching: SwitchingConfig = SwitchingConfig()
    router: RouterConfig = RouterConfig()
    http: HttpConfig = HttpConfig()
    control: ControlConfig = ControlConfig()
    webui: WebuiConfig = WebuiConfig()
    secrets: SecretsConfig = SecretsConfig()
    state_dir: str | None = None
    """Directory for what must survive; None: /var/lib/homegpt, or the user's XDG state home."""
    trust: Trust = "measured"
    """Of every model that does not say so itself."""
    backend: BackendName | None = None
    """Who runs engines; None: systemd where it manages this machine, else process."""

    @property
    def available_ram_gb(self) -> float | None:
        return self.switching.available_ram_gb

    @property
    def default_model(self) -> ModelConfig | None:
        """`default`, else the first active model, else None."""
        if self.default is not None:
            return self.model(self.default)
        return next((m for m in self.models if m.startup_mode == "active"), None)

    def model(self, name: str) -> ModelConfig | None:
        """The model of that id or alias; None if there is none."""
        return next((m for m in self.models if name in m.names), None)


def command_line(model: ModelConfig, *, socket: str | None = None) -> tuple[str, ...] | None:
    """The argv of a child process; None for a model without an engine to make one from.

    Without `socket` as the file has it. With `socket` ready to run: a `command` gets its
    placeholders `{socket}`, `{id}` and `{port}` filled in, and `--uds SOCKET` is added where the
    argv does not say by itself where to listen.
    """
    engine = model.engine
    if engine is None:
        return None
    if engine.command is not None:
        return _filled(engine.command, model, socket)
    if engine.model is None:
        return None
    argv = ("vllm", "serve", engine.model, *engine.args, "--served-model-name", *model.names)
    return argv if socket is None else (*argv, "--uds", socket)


def _filled(command: tuple[str, ...], model: ModelConfig, socket: str | None) -> tuple[str, ...]:
    if socket is None:
        return command
    # One by one: str.format would trip over the braces of JSON in a flag's value.
    values = {"{socket}": socket, "{id}": model.id, "{port}": str(model.port)}
    argv = tuple(_replaced(word, values) for word in command)
    placed = any("{socket}" in word or "{port}" in word for word in command)
    return argv if placed else (*argv, "--uds", socket)


def _replaced(word: str, values: Mapping[str, str]) -> str:
    for placeholder, value in values.items():
        word = word.replace(placeholder, value)
    return word

"""Command line of the simulated engine: vLLM's own flags where they matter, and `--sim-…` flags.

Flags of vLLM that change nothing here are taken and ignored; anything else is an error with exit
code 2, as from vLLM's argparse.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from homegptd.sim.faults import CATALOGUE, Fault, parse
from homegptd.sim.physics import GIB, Footprint, Speeds
from homegptd.sim.versions import Profile, profile

_IGNORED_WITH_VALUE = """
--tokenizer --dtype --quantization --kv-cache-dtype --max-num-batched-tokens
--reasoning-parser --chat-template --seed --swap-space --cpu-offload-gb --load-format --revision
--download-dir --block-size --pipeline-parallel-size --data-parallel-size --limit-mm-per-prompt
--generation-config --hf-overrides --rope-scaling --uvicorn-log-level --root-path --task --runner
--compilation-config --speculative-config --attention-backend --safetensors-load-strategy
--distributed-executor-backend --sleep-mode-backend --override-generation-config
--mm-processor-kwargs --max-logprobs --log-config-file --device --config-format --tokenizer-mode
--logging-config.formatter --disable-access-log-for-endpoints --cudagraph-capture-sizes
--max-cudagraph-capture-size --convert --pooler-config --middleware --default-chat-template-kwargs
--chat-template-content-format --stream-interval --scheduling-policy --tool-parser-plugin
--num-gpu-blocks-override --model-loader-extra-config --api-server-count --response-role
""".split()  # noqa: SIM905 -- a list of flags reads best as words
_IGNORED_SWITCHES = """
--enable-chunked-prefill --no-enable-chunked-prefill --trust-remote-code
--disable-fastapi-docs --enforce-eager --enable-prefix-caching --no-enable-prefix-caching
--enable-log-requests --disable-log-requests --disable-log-stats --enable-expert-parallel
--async-scheduling --no-async-scheduling --disable-custom-all-reduce --enable-reasoning
--sleep-mode-offload-cudagraph --enable-nccl-comm-suspend --disable-uvicorn-access-log
--enable-lora --enable-prompt-tokens-details --language-model-only
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that one simulated server is told at its start."""

    model: str = "sim/model"
    served: tuple[str, ...] = ()
    host: str | None = None
    port: int = 8000
    uds: Path | None = None
    sleep_mode: bool = True
    dev_mode: bool = True
    utilisation: float | None = None
    kv_bytes: int | None = None
    tensor_parallel: int = 1
    max_model_len: int = 32768
    max_num_seqs: int = 256
    api_key: str | None = None
    max_queued: int | None = None
    shutdown_timeout_s: float = 0
    server_load: bool = False
    auto_tools: bool = False
    tool_parser: str | None = None
    keep_alive_on_death: bool = False
    keep_alive_s: float = 5
    card: Path | None = None
    gpus: tuple[int, ...] = (0,)
    weights_gb: float = 16
    kv_gb: float | None = None
    residue_gb: float = 1.2
    buffers_gb: float = 0.02
    version: str = "0.32.0"
    tokens_per_s: float = 60
    speed: float = 1
    speeds: Speeds = field(default_factory=Speeds)
    kind: str = "generate"
    store_responses: bool = False
    faults: tuple[Fault, ...] = ()
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which the model is served; the first is its own."""
        return self.served or (self.model,)

    @property
    def profile(self) -> Profile:
        return profile(self.version)

    @property
    def footprint(self) -> Footprint:
        gpus = self.gpus
        kv = None if self.kv_gb is None else round(self.kv_gb * GIB)
        if self.kv_bytes is not None:  # vLLM's figure is for each GPU
            kv = self.kv_bytes * len(gpus) // (1 << 20)
        used = self.utilisation
        return Footprint(
            gpus=gpus,
            weights_mib=round(self.weights_gb * GIB),
            kv_mib=kv,
            residue_mib=round(self.residue_gb * GIB),
            buffers_mib=round(self.buffers_gb * GIB),
            utilisation=self.profile.utilisation if used is None else used,
            wake_retryable=self.profile.wake_retryable,
        )


def parser(version: str = "0.32.0") -> argparse.ArgumentParser:
    """The parser; flags that a release does not know are left out."""
    known = profile(version)
    p = argparse.ArgumentParser(
        prog="python -m homegptd.sim",
        description="A simulated `vllm serve`: same flags, same endpoints, no GPU. "
        "`python -m homegptd.sim card --help` makes the card that several of them share.",
        allow_abbrev=False,
    )
    p.add_argument("words", nargs="*", metavar="[serve] MODEL", help="the model to serve")
    p.add_argument("--model", help="the model, in the old form")
    p.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME")
    p.add_argument("--host")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--uds", type=Path)
    p.add_argument("--enable-sleep-mode", action="store_true")
    p.add_argument("--gpu-memory-utilization", type=float)
    p.add_argument("--kv-cache-memory-bytes", type=_bytes)
    p.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    p.add_argument("--max-model-len", type=_count, default=32768)
    p.add_argument("--max-num-seqs", type=int, default=256)
    p.add_argument("--api-key")
    p.add_argument("--enable-server-load-tracking", action="store_true")
    p.add_argument("--enable-auto-tool-choice", action="store_true")
    p.add_argument("--tool-call-parser")
    if known.queue_limit_flag:
        p.add_argument("--max-num-queued-reqs", type=int)
    if known.shutdown_timeout_flag:
        p.add_argument("--shutdown-timeout", type=float, default=0)
    for flag in _IGNORED_WITH_VALUE:
        p.add_argument(flag, help=argparse.SUPPRESS)
    for flag in _IGNORED_SWITCHES:
        p.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    _add_sim_flags(p.add_argument_group("simulation"))
    return p


def _add_sim_flags(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--sim-card", type=Path, help="card file shared with other simulators")
    p.add_argument("--sim-gpus", help="GPUs of the card, e.g. 0,1 (default: the first ones)")
    p.add_argument("--sim-weights-gb", type=float, default=16.0, help="GiB, over all GPUs")
    p.add_argument("--sim-kv-gb", type=float, help="GiB over all GPUs (default: profiled)")
    p.add_argument("--sim-residue-gb", type=float, default=1.2, help="GiB for each GPU")
    p.add_argument("--sim-buffers", type=float, default=0.02, help="GiB of model buffers")
    p.add_argument("--sim-version", default="0.32.0", help="0.11.0 to 0.33.0")
    p.add_argument("--sim-tokens-per-s", type=float, default=60.0)
    p.add_argument("--sim-speed", type=float, default=1.0, help="divides every simulated duration")
    p.add_argument("--sim-load-gbps", type=float, default=2.0, help="GiB/s from disk")
    p.add_argument("--sim-pcie-gbps", type=float, default=20.0, help="GiB/s host to GPU and back")
    p.add_argument("--sim-pin-gbps", type=float, default=2.5, help="GiB/s pinned by a first sleep")
    p.add_argument(
        "--sim-imports-s", type=float, default=8.0, help="seconds before the port is bound"
    )
    p.add_argument("--sim-compile-s", type=float, default=12.0, help="seconds after the load")
    p.add_argument(
        "--sim-kind", choices=["generate", "embed", "score", "audio"], default="generate"
    )
    p.add_argument("--sim-seed", type=int, default=0, help="varies the times by up to 10 percent")
    p.add_argument(
        "--sim-fault",
        type=parse,
        action="append",
        default=[],
        metavar="NAME[=VALUE][@OPERATION][*TIMES]",
        help="repeatable: " + "; ".join(f"{n}: {text}" for n, (_, text) in CATALOGUE.items()),
    )


def parse_options(argv: list[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Exits with code 2 on an unknown flag or a bad value, as argparse does."""
    argv = [_dashed(word) for word in argv]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--sim-version", default="0.32.0")
    version = early.parse_known_args(argv)[0].sim_version
    try:
        p = parser(version)
    except ValueError as problem:
        early.error(str(problem))
    args = p.parse_args(argv)
    words = args.words[1:] if args.words[:1] == ["serve"] else args.words
    if len(words) > 1:
        p.error(f"unrecognized arguments: {' '.join(words[1:])}")
    tp = args.tensor_parallel_size
    gpus = args.sim_gpus.split(",") if args.sim_gpus else [str(gpu) for gpu in range(tp)]
    if len(gpus) < tp:
        p.error(f"--tensor-parallel-size {tp} needs {tp} GPUs, --sim-gpus names {len(gpus)}")
    return Options(
        model=words[0] if words else args.model or "Qwen/Qwen3-0.6B",
        served=tuple(args.served_model_name),
        host=args.host,
        port=args.port,
        uds=args.uds,
        sleep_mode=args.enable_sleep_mode,
        dev_mode=environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"),
        utilisation=args.gpu_memory_utilization,
        kv_bytes=args.kv_cache_memory_bytes,
        tensor_parallel=tp,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        api_key=args.api_key or environ.get("VLLM_API_KEY"),
        max_queued=getattr(args, "max_num_queued_reqs", None),
        shutdown_timeout_s=getattr(args, "shutdown_timeout", 0),
        server_load=args.enable_server_load_tracking,
        auto_tools=args.enable_auto_tool_choice,
        tool_parser=args.tool_call_parser,
        keep_alive_on_death=environ.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "0") not in ("", "0"),
        keep_alive_s=float(environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
        card=args.sim_card,
        gpus=tuple(int(gpu) for gpu in gpus[:tp]),
        weights_gb=args.sim_weights_gb,
        kv_gb=args.sim_kv_gb,
        residue_gb=args.sim_residue_gb,
        buffers_gb=args.sim_buffers,
        version=args.sim_version,
        tokens_per_s=args.sim_tokens_per_s,
        speed=args.sim_speed,
        speeds=Speeds(
            args.sim_load_gbps,
            args.sim_pcie_gbps,
            args.sim_pin_gbps,
            args.sim_imports_s,
            args.sim_compile_s,
        ),
        kind=args.sim_kind,
        store_responses=environ.get("VLLM_ENABLE_RESPONSES_API_STORE", "0") not in ("", "0"),
        faults=tuple(args.sim_fault),
        seed=args.sim_seed,
    )


def _dashed(word: str) -> str:
    """vLLM takes --max_model_len for --max-model-len."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _count(text: str) -> int:
    """`32768`, `32k`, `32K`: vLLM's human readable integers."""
    units = {"k": 1000, "m": 10**6, "g": 10**9, "K": 1024, "M": 1 << 20, "G": 1 << 30}
    if text and text[-1] in units:
        return round(float(text[:-1]) * units[text[-1]])
    return int(text)


_bytes = _count

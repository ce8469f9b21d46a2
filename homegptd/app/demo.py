"""`homegptd demo`: the whole daemon with simulated engines on a simulated 80 GB card."""

import shutil
import socket
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from homegptd.config.parse import parse
from homegptd.config.schema import Config
from homegptd.sim.card import create, new_box
from homegptd.wire.paths import socket_to_ask, socket_to_offer

from .daemon import Daemon

CARD_GB, RAM_GB = 80, 192


@dataclass(frozen=True, slots=True)
class _Model:
    id: str
    name: str
    alias: str
    weights_gb: float
    awake_gb: float
    tokens_per_s: float
    startup: str = "sleep"


_MODELS = (
    _Model("qwen3-30b-a3b", "Qwen 3 30B A3B", "qwen3", 18.0, 62.0, 60.0, "active"),
    _Model("gpt-oss-20b", "GPT-OSS 20B", "gpt-oss", 14.0, 58.0, 80.0),
    _Model("gemma-3-27b", "Gemma 3 27B", "gemma3", 28.0, 66.0, 40.0),
    _Model("llama-3.3-70b", "Llama 3.3 70B (4 bit)", "llama3", 40.0, 72.0, 25.0),
    _Model("mistral-small-24b", "Mistral Small 24B", "mistral", 24.0, 64.0, 45.0, "disabled"),
    _Model("phi-4", "Phi 4 14B", "phi", 15.0, 50.0, 70.0),
    _Model("devstral-24b", "Devstral 24B", "devstral", 24.0, 64.0, 45.0, "disabled"),
    _Model("qwen3-coder-30b", "Qwen 3 Coder 30B", "coder", 18.0, 62.0, 60.0, "disabled"),
)


class Demo:
    """A directory with a configuration and a card, gone at the end."""

    MOST: ClassVar[int] = len(_MODELS)

    def __init__(self, models: int, speed: float, *, state_dir: Path | None) -> None:
        self._models = _MODELS[:models]
        self._speed = speed
        self._stack = ExitStack()
        self._given = state_dir

    def __enter__(self) -> "Demo":
        scratch = Path(tempfile.mkdtemp(prefix="homegpt-demo-"))
        self._stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.state_dir = self._given or scratch
        self.path = scratch / "config.yaml"
        self.card = scratch / "card.json"
        create(self.card, new_box(gpu_gb=CARD_GB, ram_gb=RAM_GB))
        self.path.write_text(self._yaml())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def config(self) -> Config:
        return parse(self.path.read_text(), str(self.path))

    def socket(self) -> str:
        """The one that callers find by themselves, unless another daemon is, or may be, there."""
        usual = socket_to_offer()
        if usual == socket_to_ask() and not _answers(usual):
            return usual
        return str(self.path.with_name("control.sock"))

    def follow(self, daemon: Daemon) -> None:
        """Say what to try once the models are up."""
        daemon.when_ready(lambda: self._print_what_to_try(daemon))

    def _yaml(self) -> str:
        head = (
            f"gpus:\n  - {{index: 0, memory_mib: {CARD_GB * 1024}}}\n"
            f"switching: {{available_ram_gb: {RAM_GB}}}\n"
            f"router: {{drain_s: {max(10.0 / self._speed, 2.0):g}}}\n"
            "models:\n"
        )
        return head + "".join(self._block(model) for model in self._models)

    def _block(self, model: _Model) -> str:
        command = [
            sys.executable, "-m", "homegptd.sim", "serve", model.id,
            "--served-model-name", model.id, model.alias,
            "--uds", "{socket}", "--enable-sleep-mode",
            "--gpu-memory-utilization", f"{model.awake_gb / CARD_GB:.3f}",
            "--sim-card", str(self.card),
            "--sim-weights-gb", f"{model.weights_gb:g}",
            "--sim-residue-gb", "1.2",
            "--sim-speed", f"{self._speed:g}",
            "--sim-tokens-per-s", f"{model.tokens_per_s / self._speed:g}",
        ]  # fmt: skip
        words = ", ".join(f"'{word}'" for word in command)
        return (
            f"  - id: {model.id}\n"
            f"    name: {model.name}\n"
            f"    aliases: [{model.alias}]\n"
            f"    gpu_memory_gb: {model.awake_gb + 0.5}\n"
            f"    weights_gb: {model.weights_gb}\n"
            f"    residue_gb: 1.3\n"
            f"    startup_mode: {model.startup}\n"
            f"    engine: {{command: [{words}]}}\n"
        )

    def _print_what_to_try(self, daemon: Daemon) -> None:
        asleep = self._models[min(1, len(self._models) - 1)].id
        ctl = _how_to_call("homegptctl")
        where = f" --socket {daemon.options.socket}" if not daemon.default_socket else ""
        url = f"http://{daemon.address}"
        chat = '{"model": "%s", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
        lines = [
            "",
            f"Ready, and a browser sees it at {url}/",
            "Try, in another terminal:",
            "",
            f"  {ctl}{where} status",
            f"  {ctl}{where} switch {asleep}",
            f"  {ctl}{where} events",
            f"  curl -s {url}/models",
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"       -d '{chat % self._models[0].id}'",
            "",
            "A request for a sleeping model wakes it. Ctrl-C ends the demo.",
            "",
        ]
        print("\n".join(lines), flush=True)  # noqa: T201 - the demo talks to its user


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except OSError:
            return False
        return True


def _how_to_call(command: str) -> str:
    """As the user can type it here: found on the PATH, or beside our own interpreter."""
    if shutil.which(command):
        return command
    beside = Path(sys.executable).with_name(command)
    here = Path.cwd()
    return str(beside.relative_to(here)) if beside.is_relative_to(here) else str(beside)

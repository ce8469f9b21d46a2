"""Other proxies in front of the same engine, each with one worker: what is found is measured.

nginx, HAProxy and the daemon talk to the engine's Unix socket, the others to its TCP port, because
they can nothing else. nginx and HAProxy pass bodies on unread, vllm-router reads them, LiteLLM
rebuilds them. `python -m bench.peers` installs the two that come from PyPI into virtual
environments below .cache/peers; nginx and HAProxy are the distribution's.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from bench.kit import cpu_s, memory_mb
from tests.e2e.harness import free_port

CACHE = Path(__file__).parents[1] / ".cache/peers"
FROM_PYPI = {"vllm-router": "vllm-router==0.1.17", "litellm": "litellm[proxy]==1.106.2"}
"""1.107.0 of LiteLLM was withdrawn as compromised; newer ones want what is not to be had."""

_NO_KEY = "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"
"""Without it LiteLLM 1.106 does not start without a key; here nobody is to be let in but us."""

_NGINX = """
daemon off; master_process off; pid {root}/nginx.pid; error_log {root}/nginx.log error;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {root}; proxy_temp_path {root};
  fastcgi_temp_path {root}; uwsgi_temp_path {root}; scgi_temp_path {root};
  keepalive_requests 1000000; client_max_body_size 0;
  upstream engine {{ server unix:{socket}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""
_HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
listen door
  bind 127.0.0.1:{port} backlog 4096
  http-reuse always
  option http-no-delay
  server engine unix@{socket} pool-max-conn -1
"""
_LITELLM = """
model_list:
  - model_name: {model}
    litellm_params:
      {{model: openai/{model}, api_base: "http://127.0.0.1:{engine}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
"""


@dataclass(frozen=True)
class Target:
    name: str
    at: int | Path
    pid: int | None
    """None: nothing stands between."""
    version: str = ""
    slow: bool = False
    """Gets a fraction of the load, or its rounds would take the most of the time."""

    def cpu_s(self) -> float:
        return cpu_s(self.pid) if self.pid else 0.0

    def rss_mb(self) -> float:
        return memory_mb(self.pid)["Rss"] if self.pid else 0.0


@dataclass(frozen=True)
class Engine:
    """Where the engine listens, twice."""

    socket: Path
    port: int


def program(name: str) -> str | None:
    """In the PATH (/usr/sbin too), or installed by `python -m bench.peers`."""
    path = f"{os.environ['PATH']}:/usr/sbin:{CACHE / name / 'bin'}"
    return shutil.which(name, path=path)


@contextmanager
def nginx(root: Path, engine: Engine) -> Iterator[Target | None]:
    port, conf = free_port(), root / "nginx.conf"
    conf.write_text(_NGINX.format(root=root, socket=engine.socket, port=port))
    with _running("nginx", port, ["-p", root, "-c", conf], ["-v"], root) as target:
        yield target


@contextmanager
def haproxy(root: Path, engine: Engine) -> Iterator[Target | None]:
    port, conf = free_port(), root / "haproxy.cfg"
    conf.write_text(_HAPROXY.format(socket=engine.socket, port=port))
    with _running("haproxy", port, ["-db", "-f", conf], ["-v"], root) as target:
        yield target


@contextmanager
def vllm_router(root: Path, engine: Engine) -> Iterator[Target | None]:
    port, metrics = free_port(), free_port()
    words = [
        "--host", "127.0.0.1", "--port", port, "--worker-urls", f"http://127.0.0.1:{engine.port}",
        "--policy", "round_robin", "--log-level", "error", "--prometheus-port", metrics,
        "--max-payload-size", 1 << 28, "--max-concurrent-requests", 8192,
    ]  # fmt: skip
    with _running("vllm-router", port, words, FROM_PYPI["vllm-router"], root) as target:
        yield target


@contextmanager
def litellm(root: Path, engine: Engine) -> Iterator[Target | None]:
    port, conf = free_port(), root / "litellm.yaml"
    conf.write_text(_LITELLM.format(model="a", engine=engine.port))
    words = ["--config", conf, "--host", "127.0.0.1", "--port", port, "--num_workers", 1]
    with _running("litellm", port, words, FROM_PYPI["litellm"], root, slow=True) as target:
        yield target


ALL = {"nginx": nginx, "haproxy": haproxy, "vllm-router": vllm_router, "litellm": litellm}


@contextmanager
def _running(
    name: str, port: int, words: list[object], version: list[str] | str, root: Path, *,
    slow: bool = False,
) -> Iterator[Target | None]:  # fmt: skip
    path = program(name)
    if path is None:
        yield None
        return
    if isinstance(version, list):
        done = subprocess.run([path, *version], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).partition("\n")[0]
    else:
        said = version
    with (root / f"{name}.log").open("w") as log:
        argv = [path, *map(str, words)]
        env = {**os.environ, "PYTHONPATH": "", "NO_COLOR": "1", _NO_KEY: "true"}
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=env, cwd=root)
        try:
            _listens(process, port, root / f"{name}.log")
            yield Target(name, port, process.pid, said, slow)
        finally:
            process.kill()
            process.wait()


def _listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Raises: RuntimeError where it ends, or does not listen within two minutes."""
    until = monotonic() + 120
    while monotonic() < until and process.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        sleep(0.05)
    raise RuntimeError(f"{log.stem} does not serve: {log.read_text()[-1000:]}")


def install() -> None:
    for name, wanted in FROM_PYPI.items():
        home = CACHE / name
        if not (home / "bin" / name).exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            pip = [home / "bin/pip", "install", "--quiet", "--disable-pip-version-check", wanted]
            subprocess.run(pip, check=True)
        print(f"{wanted} in {home}")


if __name__ == "__main__":
    install()

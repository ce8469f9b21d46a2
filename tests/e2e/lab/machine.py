"""A Debian 13 with a real systemd, booted under systemd-nspawn, and how tests reach into it.

    with booted(BASE) as machine:
        machine.write("/etc/systemd/system/x.service", "…")
        machine.run("systemctl", "daemon-reload")

Outside paths: `machine.path("/run/x")` goes through /proc/LEADER/root, so that tests connect to
the machine's Unix sockets (the D-Bus system bus among them) from their own process.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from . import roots

REPO = Path(__file__).resolve().parents[3]
SOURCE = "/usr/src/homegpt"
"""Where the machine sees the working tree, read-only."""
BOOT_S = 60.0
OFF_S = 20.0

_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
        "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
# no pids controller here; podman would refuse to start anything
_NOT_HERE = ("systemd-modules-load.service", "apt-daily.timer", "apt-daily-upgrade.timer",
             "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer")  # fmt: skip
"""Masked: what fails without a kernel of its own, and what would start amid a test."""
_CONTAINERS = "[containers]\npids_limit=0\n"
# what nvidia-ctk writes, with /dev/null for a card: units keep their AddDevice= unchanged
_CDI = """\
cdiVersion: "0.5.0"
kind: nvidia.com/gpu
devices:
""" + "".join(
    f"""\
  - name: "{name}"
    containerEdits:
      deviceNodes: [{{path: /dev/nvidia0, hostPath: /dev/null}}]
      env: ["NVIDIA_VISIBLE_DEVICES=GPU-lab-{name}"]
"""
    for name in ("all", "0", "1")
)


@dataclass(frozen=True, slots=True)
class Done:
    """What a command inside did."""

    code: int
    out: str
    err: str


class Failed(AssertionError):
    """A command inside exited with something else than 0."""

    def __init__(self, argv: Sequence[object], done: Done) -> None:
        words = " ".join(map(str, argv))
        super().__init__(f"{words}: exit {done.code}\n{done.out[-2000:]}{done.err[-2000:]}")
        self.done = done


class Machine:
    """One booted machine. Paths in calls are those inside."""

    def __init__(self, root: Path, leader: int, nspawn: "subprocess.Popen[bytes]") -> None:
        self.root = root
        self.leader = leader
        self._nspawn = nspawn

    # ------------------------------------------------------------ commands

    def run(
        self,
        *argv: str,
        user: str | None = None,
        service: bool = False,
        online: bool = False,
        check: bool = True,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Done:
        """Run a command inside, as root and about 15 ms; `check`: raise `Failed` unless it exits 0.

        `service`: as a transient unit of the machine's systemd, 0.1 s (whatever starts containers
        needs that); `user` implies it. `online`: with the host's network, for apt.
        """
        words: Sequence[str] = argv
        if service or user is not None:
            words = [*_as_service(user, {**_ENV, **(env or {})}), *argv]
        entered = [*self._enter(net=not online), *_environment({**_ENV, **(env or {})}), *words]
        given = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            entered, input=given, capture_output=True, cwd="/", timeout=timeout, check=False
        )
        result = Done(done.returncode, *(_text(part) for part in (done.stdout, done.stderr)))
        if check and result.code:
            raise Failed(argv, result)
        return result

    def popen(self, *argv: str, user: str | None = None) -> "subprocess.Popen[bytes]":
        """Run a command inside beside the test; stdin, stdout and stderr are pipes."""
        words = [*_as_service(user, _ENV), *argv] if user is not None else argv
        pipe = subprocess.PIPE
        entering = self.entering(*words)
        return subprocess.Popen(entering, stdin=pipe, stdout=pipe, stderr=pipe, cwd="/")

    def entering(self, *argv: str) -> list[str]:
        """The command line that runs `argv` inside, for whoever wants to run it himself."""
        return [*self._enter(net=True), *_environment(_ENV), *argv]

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.run("systemctl", *words, check=check).out

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit, as `systemctl show` spells them."""
        lines = self.systemctl("show", unit, *(f"-p{name}" for name in names)).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def host_pid(self, inner: int) -> int:
        """The pid that the host knows a process inside by: `os.kill` is quicker than `run`."""
        depth = len(_status(self.leader)["NSpid"].split()) - 1
        for proc in Path("/proc").glob("[1-9]*"):
            with suppress(OSError):  # ended meanwhile
                pids = _status(int(proc.name))["NSpid"].split()
                if len(pids) > depth and int(pids[depth]) == inner and self._owns(int(proc.name)):
                    return int(proc.name)
        raise ProcessLookupError(f"no process {inner} inside")

    def _owns(self, pid: int) -> bool:
        while pid > 1 and pid != self.leader:
            pid = int(_status(pid)["PPid"])
        return pid == self.leader

    # ------------------------------------------------------------ files

    def path(self, inside: str) -> Path:
        """The same file as the host sees it, tmpfs mounts like /run included."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def write(self, inside: str, content: str | bytes, *, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    def read(self, inside: str) -> str:
        return self.path(inside).read_text()

    def put(self, outside: Path, inside: str) -> None:
        """Copy a file or a folder in."""
        target = self.path(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if outside.is_dir():
            shutil.copytree(outside, target, dirs_exist_ok=True)
        else:
            shutil.copy2(outside, target)

    @property
    def bus(self) -> str:
        """The D-Bus address of the machine's system bus, for a client outside."""
        return f"unix:path=/proc/{self.leader}/root/run/dbus/system_bus_socket"

    # ------------------------------------------------------------ journal

    def mark(self) -> str:
        """A cursor at the journal's end: what comes `since` it is news."""
        self.run("journalctl", "--sync")
        found = self.run("journalctl", "-n0", "--show-cursor", "-q").out
        return found.split("-- cursor: ", 1)[1].strip()

    def journal(self, *matches: str, since: str | None = None) -> list[dict[str, str]]:
        """Entries, oldest first, as field names to texts; `matches` are journalctl's arguments."""
        self.run("journalctl", "--sync")
        after = [f"--after-cursor={since}"] if since else []
        done = self.run("journalctl", "-q", "-ojson", "--all", *after, *matches)
        return [_entry(line) for line in done.out.splitlines()]

    # ------------------------------------------------------------ life

    def reset(self) -> None:
        """As after the boot: no engines, no units of tests, nothing failed. About 0.3 s if idle."""
        ours = self.run("sh", "-c", "cat /run/lab-units 2>/dev/null; :").out.split()
        names = sorted({*ours, "homegpt.service", "vllm-*.service", "homegpt*.slice"})
        self.systemctl("kill", "--signal=KILL", *names, check=False)
        self.systemctl("stop", *names, check=False)
        clean = "podman rm --all --force --time=0"  # fails once over what lost its conmon
        self.run("sh", "-c", f"command -v podman >/dev/null || exit 0; {clean} || {clean}")
        shutil.rmtree(self.path("/etc/containers/systemd"), ignore_errors=True)
        for rule in self.path("/etc/polkit-1/rules.d").glob("*"):
            rule.unlink()  # not the folder: polkit watches that inode and would go blind
        for name in ours:
            self.path(f"/etc/systemd/system/{name}").unlink(missing_ok=True)
        self.path("/run/lab-units").unlink(missing_ok=True)
        shutil.rmtree(self.path("/run/homegpt"), ignore_errors=True)
        self.systemctl("daemon-reload")
        self.systemctl("reset-failed")

    def install(self, name: str, text: str, *, reload: bool = True) -> None:
        """Put a unit where it belongs: .container, .network and .volume files are Quadlets."""
        if name.rpartition(".")[2] in {"container", "network", "volume"}:
            self.write(f"/etc/containers/systemd/homegpt/{name}", text)
        else:
            self.write(f"/etc/systemd/system/{name}", text)
            with self.path("/run/lab-units").open("a") as file:
                file.write(f"{name}\n")
        if reload:
            self.systemctl("daemon-reload")

    def poweroff(self) -> None:
        """In good order: every unit is stopped."""
        with suppress(subprocess.TimeoutExpired):
            self.run("systemctl", "poweroff", "--no-wall", check=False, timeout=5)
        self._off()

    def unplug(self) -> None:
        """At once, as one pulls the plug; a no-op where it is off."""
        if self._nspawn.poll() is None:
            os.kill(self.leader, signal.SIGKILL)  # the kernel ends all of its pid namespace
        self._off()

    def _off(self) -> None:
        try:
            self._nspawn.wait(OFF_S)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()

    def _enter(self, *, net: bool) -> list[str]:
        spaces = ["-m", "-u", "-i", "-p", "-C", *(["-n"] if net else [])]
        return ["nsenter", "-t", str(self.leader), *spaces, "--root", "--wd"]


@contextmanager
def booted(
    layer: roots.Layer = roots.BASE, *, shared: Mapping[Path, str] = MappingProxyType({})
) -> Iterator[Machine]:
    """A fresh machine, powered off and removed at the end. About 4 s in all.

    `shared`: the host's folders, and where they are seen inside, read-only.
    """
    with roots.lent(layer) as root:
        _furnish(root)
        machine = boot(root, shared=shared)
        try:
            yield machine
        finally:
            machine.unplug()


def boot(root: Path, *, shared: Mapping[Path, str] = MappingProxyType({})) -> Machine:
    """Start systemd in `root` and wait until it has finished booting."""
    with tempfile.TemporaryDirectory(prefix="lab-") as name:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with notify, (root.parent / "console.log").open("wb") as console:
            notify.bind(f"{name}/notify")
            nspawn = subprocess.Popen(
                _nspawn(root, shared),
                env={**_host_env(), "NOTIFY_SOCKET": f"{name}/notify"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
            return Machine(root, _until_booted(notify, nspawn, Path(console.name)), nspawn)


def _nspawn(root: Path, shared: Mapping[Path, str]) -> list[str]:
    return [
        *("setpriv", "--pdeathsig", "KILL"),  # no machine outlives its test run
        *("systemd-nspawn", "--register=no", "--keep-unit", f"--machine=lab{os.getpid()}"),
        *("--private-network", "--notify-ready=yes", "-b", "-D", str(root)),
        *("--capability=all", "--system-call-filter=@known"),
        *("--bind=/dev/fuse", "--bind=/dev/net/tun", "--property=DeviceAllow=char-* rwm"),
        f"--bind={root.parent / 'containers'}:/var/lib/containers",
        f"--bind-ro={REPO}:{SOURCE}",
        *(f"--bind-ro={outside}:{inside}" for outside, inside in shared.items()),
    ]


def _until_booted(notify: socket.socket, nspawn: "subprocess.Popen[bytes]", console: Path) -> int:
    """nspawn tells its leader and, from the systemd inside, READY=1: see sd_notify(3)."""
    leader, until = 0, time.monotonic() + BOOT_S
    while time.monotonic() < until and nspawn.poll() is None:
        notify.settimeout(0.5)
        with suppress(TimeoutError):
            for line in notify.recv(4096).decode().splitlines():
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    leader = int(line.partition("=")[2])
                elif line == "READY=1" and leader:
                    return leader
    nspawn.send_signal(signal.SIGKILL)
    nspawn.wait()
    raise RuntimeError(f"the lab did not boot:\n{console.read_text(errors='replace')[-3000:]}")


def _furnish(root: Path) -> None:
    """What an administrator's hand would have done on the box."""
    for name, text in (
        ("etc/containers/containers.conf", _CONTAINERS),
        ("etc/cdi/nvidia.yaml", _CDI),
        ("etc/hostname", "lab\n"),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with suppress(OSError):
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")  # for `online` commands
    (root / "usr/src/homegpt").mkdir(parents=True, exist_ok=True)
    for unit in _NOT_HERE:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _host_env() -> dict[str, str]:
    return {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}


def _environment(env: Mapping[str, str]) -> list[str]:
    return ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in env.items())]


def _as_service(user: str | None, env: Mapping[str, str]) -> list[str]:
    who = [f"--uid={user}"] if user is not None else []
    given = [f"--setenv={name}={value}" for name, value in env.items()]
    return ["systemd-run", "-q", "--wait", "--pipe", "--collect", "--working-directory=/",
            *who, *given, "--"]  # fmt: skip


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _text(block: bytes) -> str:
    return block.decode(errors="replace")


def _entry(line: str) -> dict[str, str]:
    """Values that are not UTF-8 come as lists of bytes, see systemd.journal-fields(7)."""
    entry = json.loads(line)
    return {k: _text(bytes(v)) if isinstance(v, list) else str(v) for k, v in entry.items()}

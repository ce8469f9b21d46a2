"""Debian 13 roots for the lab: built once by debootstrap, kept as trees, lent out as overlays.

Roots are layers, each a tree that overlayfs puts on the ones under it. `CLEAN` is what a new server
has, for tests that install the package; `BASE` has podman and Python on top. The name of a tree
holds a hash of its recipe: change the recipe and the next run builds anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
RECIPE = 1
"""Raise to build everything anew."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Packages on top of another layer; without one, the system itself."""

    name: str
    packages: tuple[str, ...]
    under: "Layer | None" = None

    @property
    def key(self) -> str:
        told = [RECIPE, SUITE, self.name, self.packages, self.under.key if self.under else ""]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    @property
    def tree(self) -> Path:
        """What it adds to the layers under it."""
        return cache() / f"{self.name}-{self.key}"

    @property
    def trees(self) -> list[Path]:
        """The topmost first, as mount(8) takes lowerdir=."""
        return [self.tree, *(self.under.trees if self.under else [])]


# libpam-systemd by name: debootstrap does not resolve polkitd's "default-logind | logind"
CLEAN = Layer("clean", ("systemd", "systemd-sysv", "libpam-systemd", "dbus", "ca-certificates"))
BASE = Layer(
    "base",
    (
        *("podman", "crun", "netavark", "aardvark-dns", "nftables", "iproute2", "polkitd"),
        *("python3", "python3-aiohttp", "python3-yaml", "python3-jeepney", "python3-msgspec"),
        *("python3-uvloop", "python3-sdnotify", "busybox-static", "curl", "procps"),
    ),
    under=CLEAN,
)


def cache() -> Path:
    base = os.environ.get("HOMEGPT_CACHE") or Path.home() / ".cache" / "homegpt"
    return Path(base) / "lab"


def why_not() -> str | None:
    """Why this machine cannot run the lab; None if it can."""
    if os.geteuid() != 0:
        return "needs root and systemd-nspawn"
    if shutil.which("systemd-nspawn") is None:
        return "needs systemd-nspawn (.ci/lab installs it)"
    if not BASE.tree.exists() and shutil.which("debootstrap") is None:
        return "needs a cached root or debootstrap (.ci/lab makes one)"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        return "may not make namespaces here (unshare -m)"
    return None


def prepare(layer: Layer) -> None:
    """Build the layer and what is under it where they are not cached."""
    cache().mkdir(parents=True, exist_ok=True)
    with _only_one(cache() / "lock"):
        _prepare(layer)


@contextmanager
def lent(layer: Layer) -> Iterator[Path]:
    """A root of its own, ready in milliseconds and removed at the end.

    Beside it lies `containers`, an empty folder for /var/lib/containers: podman's own overlays
    cannot have their upper folder on another overlay.
    """
    prepare(layer)
    homes = cache() / "machines"
    homes.mkdir(exist_ok=True)
    _remove_abandoned(homes)
    home = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=homes))
    try:
        for name in ("root", "upper", "work", "containers"):
            (home / name).mkdir()
        with _mounted(layer.trees, home / "upper", home / "work", home / "root"):
            yield home / "root"
    finally:
        shutil.rmtree(home, ignore_errors=True)


def offline(root: Path, *argv: str) -> str:
    """Run in a root that is not booted, with the host's network: for package installs."""
    return _sh(
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", "--as-pid2"),
        *("--resolv-conf=copy-host", "--setenv=DEBIAN_FRONTEND=noninteractive", "-D", root),
        *argv,
    )


def _prepare(layer: Layer) -> None:
    if layer.tree.exists():
        return
    if layer.under is not None:
        _prepare(layer.under)
    for old in cache().glob(f"{layer.name}-*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as name:
        tree, work, root = (Path(name, part) for part in ("tree", "work", "root"))
        for folder in (tree, work, root):
            folder.mkdir()
        if layer.under is None:
            include = ",".join(layer.packages)
            _sh("debootstrap", "--variant=minbase", f"--include={include}", SUITE, tree, _mirror())
            _remove_debs(tree)
        else:
            with _mounted(layer.under.trees, tree, work, root):
                _install(root, layer.packages)
        tree.rename(layer.tree)


def _install(root: Path, packages: tuple[str, ...]) -> None:
    offline(root, "apt-get", "-qq", "update")
    offline(root, "apt-get", "-qq", "-y", "--no-install-recommends", "install", *packages)
    _remove_debs(root)


def _remove_debs(root: Path) -> None:
    for litter in (root / "var/cache/apt/archives").glob("*.deb"):
        litter.unlink()


@contextmanager
def _mounted(lower: list[Path], upper: Path, work: Path, root: Path) -> Iterator[None]:
    folders = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}"
    _sh("mount", "-t", "overlay", "overlay", "-o", folders, root)
    try:
        yield
    finally:
        _sh("umount", "--lazy", root)


def _mirror() -> str:
    return os.environ.get("HOMEGPT_DEBIAN_MIRROR", "http://deb.debian.org/debian")


def _remove_abandoned(homes: Path) -> None:
    for home in homes.iterdir():
        if not Path("/proc", home.name.partition("-")[0]).exists():
            subprocess.run(["umount", "--lazy", home / "root"], capture_output=True, check=False)
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sh(*argv: str | Path) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    text = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        raise RuntimeError(f"{argv[0]} exited with {done.returncode}:\n{text[-4000:]}")
    return done.stdout.decode(errors="replace")

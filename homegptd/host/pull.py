"""Images and weights, fetched before an engine starts: engines themselves have no network."""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from homegptd.config.schema import Config, EngineConfig, ModelConfig

from .commands import HostFault, must, run
from .places import HF_CACHE, Places
from .podman_api import pull_image
from .weights import complete, is_local, revision

_FETCH = """\
import sys
from huggingface_hub import HfApi, snapshot_download
repo, revision = sys.argv[1], sys.argv[2] or None
names = HfApi().list_repo_files(repo, revision=revision)
skip = ["original/*", "*.onnx", "*.h5", "*.msgpack", "*.gguf"]
if any(name.endswith(".safetensors") for name in names):
    skip += ["*.bin", "*.pt", "*.pth"]
snapshot_download(repo, revision=revision, ignore_patterns=skip)
"""
"""Runs in the engine's own image, which has huggingface_hub and its fast ways to download."""


def lacks_image(image: str) -> bool:
    """Raises: HostFault if podman is not there."""
    done = run("podman", "image", "exists", image)
    if done.code not in (0, 1):
        raise HostFault(f"podman cannot say whether {image} is here: {done.why}")
    return done.code == 1


def lacks_weights(engine: EngineConfig, places: Places) -> bool:
    if engine.model is None or is_local(engine.model) or engine.network:
        return False
    return not complete(places.hf_cache, engine.model, revision(engine.args))


def pull(
    model: ModelConfig, config: Config, places: Places, show: Callable[[str], None]
) -> list[str]:
    """Fetch what is missing; `show` is told how far the image is, and the hub says so itself.

    Returns what was fetched. Raises: HostFault.
    """
    engine = model.engine
    if engine is None:
        return []
    fetched: list[str] = []
    if lacks_image(engine.image):
        _image(engine.image, show)
        fetched.append(engine.image)
    if lacks_weights(engine, places):
        _fetch(model, engine, config, places)
        fetched.append(engine.model or "")
    return fetched


def note_image(model: ModelConfig, places: Places) -> None:
    """Write down which image the engine is about to start from, by digest: its name does not tell
    (`:latest`), and what was measured with another one does not hold.

    Never raises: without a note the version of vLLM has to tell images apart.
    """
    if model.engine is None or places.images.is_symlink():
        return  # only root can make the folder, and tmpfiles.d has
    note = places.images / model.id
    asked = ("podman", "image", "inspect", "--format={{.Digest}}", model.engine.image)
    done = run(*asked)
    with suppress(OSError):
        note.unlink(missing_ok=True)
        if done.code == 0:
            note.write_text(done.out.strip() + "\n")
            note.chmod(0o644)


def _image(name: str, show: Callable[[str], None]) -> None:
    try:
        pull_image(name, show)
    except HostFault:  # no service, or none that can: the command line says why, if it cannot
        _shown("podman", "pull", name, doing=f"pull {name}")


def _fetch(model: ModelConfig, engine: EngineConfig, config: Config, places: Places) -> None:
    Path(places.hf_cache).mkdir(parents=True, exist_ok=True)
    token = config.secrets.hf_token
    secret = [f"--secret={token},type=env,target=HF_TOKEN"] if token else []
    _shown(
        *("podman", "run", "--rm", "--replace", f"--name=homegpt-pull-{model.id}"),
        *("--pull=never", "--cap-drop=all", "--security-opt=no-new-privileges"),
        *("--security-opt=label=disable", "--env=HF_HUB_DISABLE_TELEMETRY=1", *secret),
        *(f"--volume={HF_CACHE}:/root/.cache/huggingface", "--entrypoint=python3", engine.image),
        *("-c", _FETCH, engine.model or "", revision(engine.args) or ""),
        doing=f"fetch the weights of {engine.model}",
    )


def _shown(*argv: str, doing: str) -> None:
    """Run with the terminal as it is. Raises: HostFault."""
    try:
        code = subprocess.run(argv, check=False).returncode
    except OSError as error:
        raise HostFault(f"cannot {doing}: {argv[0]}: {error.strerror}") from error
    if code:
        raise HostFault(f"cannot {doing}: {argv[0]} exited with {code}, see above")


def has_secret(name: str) -> bool:
    listed = must("podman", "secret", "ls", "--format", "{{.Name}}", doing="list podman's secrets")
    return name in listed.split()

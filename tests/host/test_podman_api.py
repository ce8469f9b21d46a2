"""Podman's stream of a pull, and names of images. What needs a Podman is in tests/e2e."""

import pytest

from homegptd.host.commands import HostFault
from homegptd.host.podman_api import Layers, split


def _line(name: str, status: str, current: int = 0, total: int = 0) -> dict[str, object]:
    return {"id": name, "status": status, "progressDetail": {"current": current, "total": total}}


def test_layers_are_summed_up() -> None:
    layers = Layers()
    assert str(layers) == "0 of 0 layers"
    layers.take({"status": "Pulling from vllm/vllm-openai"})
    layers.take(_line("a", "Downloading", 1_000_000_000, 4_000_000_000))
    layers.take(_line("b", "Downloading", 2_000_000_000, 2_000_000_000))
    assert str(layers) == " 50 %, 3.0 of 6.0 GB, 0 of 2 layers"
    layers.take(_line("b", "Download complete"))
    layers.take(_line("c", "Already exists"))
    layers.take({"id": "image", "status": "Pull complete"})
    assert str(layers) == " 50 %, 3.0 of 6.0 GB, 2 of 3 layers"


@pytest.mark.parametrize("line", [{"error": "no such"}, {"errorDetail": {"message": "no such"}}])
def test_an_error_ends_it(line: dict[str, object]) -> None:
    with pytest.raises(HostFault, match="no such"):
        Layers().take(line)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("docker.io/vllm/vllm-openai:v0.32.0", ("docker.io/vllm/vllm-openai", "v0.32.0")),
        ("localhost:5000/vllm", ("localhost:5000/vllm", "latest")),
        ("localhost:5000/vllm:1", ("localhost:5000/vllm", "1")),
        ("ghcr.io/x/y@sha256:abc", ("ghcr.io/x/y", "sha256:abc")),
    ],
)
def test_names_are_taken_apart(name: str, parts: tuple[str, str]) -> None:
    assert split(name) == parts

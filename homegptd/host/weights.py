"""Models in a Hugging Face cache: whether they are complete, and what they will need.

The cache's layout is that of huggingface_hub 0.2x to 1.x: hub/models--ORG--NAME with refs,
snapshots of links, and blobs.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
CONTEXT_GIB = 2.0
"""CUDA context, graphs, activations on each GPU: 1.2 to 2 GiB were reported (vLLM 0.11 to 0.32)."""
SPARE_SEQUENCES = 2
"""Answers of full length that shall fit beside each other."""
_LONGEST_ASSUMED = 32768
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_BITS = (
    (r"awq|gptq|int4|w4a16|4[ -]?bit|mxfp4|nvfp4|fp4|bnb", 0.6),
    (r"fp8|int8|w8a8|8[ -]?bit", 1.05),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model will take, and how that was found."""

    weights_gib: float
    kv_gib: float
    context_gib: float
    source: str
    longest: int | None = None
    """Tokens that the model was made for, where its files say so."""

    @property
    def total_gib(self) -> float:
        return self.weights_gib + self.kv_gib + self.context_gib

    def __str__(self) -> str:
        parts = f"weights {self.weights_gib:.1f} + KV cache {self.kv_gib:.1f}"
        return f"{parts} + context {self.context_gib:.1f} = {self.total_gib:.1f} GB ({self.source})"


def is_local(model: str) -> bool:
    """A path rather than a name on the hub."""
    return model.startswith(("/", "./", "../", "~"))


def snapshot(cache: Path, model: str, revision: str | None = None) -> Path | None:
    """Where the files of a model are; None if the cache does not know it."""
    folder = cache / "hub" / f"models--{model.replace('/', '--')}"
    name = revision or "main"
    try:
        commit = (folder / "refs" / name).read_text().strip()
    except OSError:
        commit = name
    found = folder / "snapshots" / commit
    return found if found.is_dir() else None


def complete(cache: Path, model: str, revision: str | None = None) -> bool:
    """Whether a server without a network can load it."""
    files = snapshot(cache, model, revision)
    if files is None or not any((files / n).exists() for n in ("config.json", "params.json")):
        return False
    for index in files.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return False
        if not all((files / name).exists() for name in names):
            return False
    return any(path.exists() for path in weight_files(files))


def weight_files(files: Path) -> list[Path]:
    """The kind that would be loaded: safetensors where there are some."""
    for kind in _WEIGHTS:
        found = sorted(files.glob(f"*{kind}"))
        if found:
            return found
    return []


def cached(cache: Path) -> Iterator[str]:
    """Names of the models that are complete."""
    for folder in sorted((cache / "hub").glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        if complete(cache, name):
            yield name


def estimate(
    model: str, *, caches: Sequence[Path], args: Sequence[str] = (), gpus: int = 1
) -> Estimate | None:
    """From its files if they are there, else from its name; None if that says nothing."""
    for cache in caches:
        files = Path(model) if is_local(model) else snapshot(cache, model)
        if files is not None and weight_files(files):
            return _measured(files, args, gpus)
    return _guessed(model, gpus)


def on_disk_gib(model: str, caches: Sequence[Path], revision: str | None = None) -> float:
    """Size of the weights that would be loaded; 0 where they are in none of the caches."""
    for cache in caches:
        files = Path(model) if is_local(model) else snapshot(cache, model, revision)
        if files is not None and (found := weight_files(files)):
            return sum(path.stat().st_size for path in found if path.exists()) / GIB
    return 0.0


def _measured(files: Path, args: Sequence[str], gpus: int) -> Estimate:
    size = sum(path.stat().st_size for path in weight_files(files) if path.exists()) / GIB
    shape = _shape(files)
    longest = _whole(shape, "max_position_embeddings")
    tokens = _tokens(args, longest)
    small = "fp8" in (_value(args, "kv-cache-dtype") or "")
    kv = SPARE_SEQUENCES * tokens * _kv_bytes(shape, 1 if small else 2) / GIB
    # without a shape to reckon with: about a third on top, as most models of the hub come out
    kv = kv or size / 3
    return Estimate(size, kv, CONTEXT_GIB * gpus, f"from {files}", longest)


def _guessed(model: str, gpus: int) -> Estimate | None:
    found = re.search(r"(?<![A-Za-z0-9])(\d+(?:\.\d+)?)b(?![a-z])", model.lower())
    if found is None:
        return None
    bytes_each = next((size for word, size in _BITS if re.search(word, model.lower())), 2.0)
    size = float(found[1]) * 1e9 * bytes_each / GIB
    return Estimate(size, size / 3, CONTEXT_GIB * gpus, "guessed from its name")


def _shape(files: Path) -> dict[str, Any]:
    try:
        told = json.loads((files / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(told, dict):
        return {}
    inner = told.get("text_config")
    return {**told, **inner} if isinstance(inner, dict) else told


def _whole(shape: dict[str, Any], key: str) -> int | None:
    value = shape.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _kv_bytes(shape: dict[str, Any], each: int) -> float:
    """Bytes per token over all GPUs; 0 where the shape does not say."""
    layers, heads = _whole(shape, "num_hidden_layers"), _whole(shape, "num_attention_heads")
    if layers is None or heads is None:
        return 0
    size = _whole(shape, "head_dim") or (_whole(shape, "hidden_size") or 0) // heads
    return 2 * layers * (_whole(shape, "num_key_value_heads") or heads) * size * each


def _tokens(args: Sequence[str], longest: int | None) -> int:
    given = _value(args, "max-model-len") or ""
    return int(given) if given.isdecimal() else min(longest or 8192, _LONGEST_ASSUMED)


def _value(args: Sequence[str], flag: str) -> str | None:
    """`--flag value` or `--flag=value`."""
    for at, word in enumerate(args):
        name, equals, value = word.lstrip("-").replace("_", "-").partition("=")
        if name == flag and word.startswith("-"):
            return value if equals else next(iter(args[at + 1 : at + 2]), None)
    return None


def revision(args: Sequence[str]) -> str | None:
    """What `--revision` asks for."""
    return _value(args, "revision")

"""Where things lie on the box. `root` is / except in tests and in package builds."""

from dataclasses import dataclass
from pathlib import Path

SOCKETS = "/run/homegpt/engines"
"""Each engine's directory, root's and closed: only the group homegpt may look into it."""
IMAGES = "/run/homegpt/images"
"""The digest of the image that each engine was started from, in a file of its model's name."""
HF_CACHE = "/var/cache/homegpt/hf"
"""Weights, shared by all engines; they see it read-only."""
ENGINE_CACHES = "/var/cache/homegpt/engines"
"""What engines compile, by model and image."""
LOGGING = "/etc/homegpt/vllm-logging.json"
QUADLETS = "/etc/containers/systemd/homegpt"
RULE = "/etc/polkit-1/rules.d/50-homegpt.rules"
CONFIG = "/etc/homegpt/config.yaml"
KEYS = "/etc/homegpt/keys.yaml"
"""API keys as hashes, unless `http.keys` names another file."""
GROUP = "homegpt"


@dataclass(frozen=True, slots=True)
class Places:
    """Paths of the box as this process sees them."""

    root: Path = Path("/")

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    @property
    def config(self) -> Path:
        return self.at(CONFIG)

    @property
    def quadlets(self) -> Path:
        """The renderer's own folder; the administrator's drop-ins lie beside it."""
        return self.at(QUADLETS)

    @property
    def images(self) -> Path:
        return self.at(IMAGES)

    @property
    def rule(self) -> Path:
        return self.at(RULE)

    @property
    def hf_cache(self) -> Path:
        return self.at(HF_CACHE)

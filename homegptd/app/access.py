"""Who may come in, from a configuration: API keys, the guard, and the engines' own keys."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

from homegptd.config.keys import Key, load
from homegptd.config.schema import CONTAINER_SUBNET, Config, ModelConfig
from homegptd.core.model import ModelId
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import LOOPBACK, Guard

log = logging.getLogger(__name__)


def engine_key(model: ModelConfig) -> str | None:
    """What the engine asks for itself: as it is configured, else from systemd's credentials.

    The latter is for a unit written by hand whose key the configuration does not show.
    """
    given = model.engine.api_key if model.engine is not None else None
    return given or _credential(f"engine-key-{model.id}") or _credential("engine-key")


def engine_keys(config: Config) -> Mapping[ModelId, str]:
    """Of the engines that ask for one."""
    found = {ModelId(model.id): engine_key(model) for model in config.models}
    return {model: key for model, key in found.items() if key is not None}


def keyring(config: Config) -> tuple[Key, ...] | None:
    """The API keys that are good; None where nobody is asked for one. Raises: ConfigError.

    From `http.keys` and from the credential `api-keys`, which has the form of that file.
    """
    given = [config.http.keys, _credential_path("api-keys")]
    files = [path for path in given if path is not None]
    if not files:
        return None
    keys = {key.name: _resolved(key, config) for path in files for key in load(path)}
    return tuple(keys.values())


def guard(config: Config, keys: Keyring | None, *, containers: bool) -> Guard:
    """`containers`: whether Open WebUI runs in one, from where it manages models."""
    networks = (*LOOPBACK, ip_network(CONTAINER_SUBNET)) if containers else LOOPBACK
    hosts = frozenset(name.lower() for name in config.http.hosts)
    return Guard(networks, hosts, keys, frozenset(config.http.cors))


def _resolved(key: Key, config: Config) -> Key:
    """Its models by id; one that is not there (any more) is told of and stays out of reach."""
    if key.models is None:
        return key
    found = {name: config.model(name) for name in sorted(key.models)}
    for name, model in found.items():
        if model is None:
            log.warning('the API key "%s" names a model that is not there: %s', key.name, name)
    return replace(key, models=frozenset(model.id for model in found.values() if model))


def _credential(name: str) -> str | None:
    path = _credential_path(name)
    return path.read_text().strip() or None if path is not None else None


def _credential_path(name: str) -> Path | None:
    """What LoadCredential= of the unit brought (systemd.exec(5))."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None

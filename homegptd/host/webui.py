"""The unit of Open WebUI, told to be quiet: one connection, no calls outside, no extra requests.

Each of its helpers (titles apart) is a further request to the chat's model, which may be asleep by
then; tags and follow-ups are therefore off. What it keeps lies on a volume.
"""

import json

from homegptd.config.schema import CONTAINER_GATEWAY, Config, ModelConfig

from .quote import expanded, word

NAME = "homegpt.internal"
"""How the box is called inside; an address of the bridge, where homegptd listens too."""
SECRET = "homegpt-webui"  # noqa: S105 - the name of a Podman secret
KEY = "homegpt-webui-key"
"""Another Podman secret, with an API key."""
_OWN_NAMES = ("localhost", "127.0.0.1")
"""How the page is opened on the box, where alone it is published."""
_CONNECTION = {
    "0": {
        "enable": True,
        "provider": "llama.cpp",
        "connection_type": "local",
        "headers": {"X-HomeGPT-Client": "open-webui"},
    }
}


def webui(config: Config) -> str:
    port = config.webui.port
    env = "\n".join(f"Environment={word(f'{k}={v}')}" for k, v in environment(config).items())
    return f"""\
[Unit]
Description=homeGPT: Open WebUI
Documentation=https://docs.openwebui.com
# homegpt.service is up once the models are; it must not wait for this one
After=homegpt.service

[Container]
Image={expanded(config.webui.image)}
ContainerName=open-webui
Network=homegpt.network
PodmanArgs=--add-host={NAME}:{CONTAINER_GATEWAY}
PublishPort=127.0.0.1:{port}:8080
Volume=open-webui:/app/backend/data
{env}
Secret={SECRET},type=env,target=WEBUI_SECRET_KEY
{_key(config)}DropCapability=all
NoNewPrivileges=true
RunInit=true
LogDriver=journald

[Service]
Slice=homegpt.slice
# signs the sessions: a new one at each start would log everybody out
ExecStartPre=/bin/sh -c "podman secret inspect {SECRET} >/dev/null 2>&1 || \\
    head -c 32 /dev/urandom | base64 -w0 | podman secret create {SECRET} - >/dev/null"
{_make_key(config)}Restart=on-failure
RestartSec=5
# the first start fetches the image
TimeoutStartSec=60min
TimeoutStopSec=30

[Install]
WantedBy=homegpt.service
"""


def _key(config: Config) -> str:
    """Its API key, where the daemon asks for one."""
    return f"Secret={KEY},type=env,target=OPENAI_API_KEYS\n" if config.http.keys else ""


def _make_key(config: Config) -> str:
    if not config.http.keys:
        return ""
    return f"""\
# a key of its own, with which it loads and unloads models
ExecStartPre=/bin/sh -c "podman secret inspect {KEY} >/dev/null 2>&1 || \\
    homegptctl key add open-webui --manage --replace | podman secret create {KEY} - >/dev/null"
"""


def environment(config: Config, box: str = NAME) -> dict[str, str]:
    """What Open WebUI is told; `box` is how it reaches homegptd from where it runs."""
    port = config.http.listen[0].rpartition(":")[2]
    # must not be empty, also where the daemon asks for none
    key = {} if config.http.keys else {"OPENAI_API_KEYS": "homegpt"}
    env = {
        "OPENAI_API_BASE_URLS": f"http://{box}:{port}/v1",
        **key,
        "OPENAI_API_CONFIGS": json.dumps(_CONNECTION, separators=(",", ":")),
        "ENABLE_OLLAMA_API": "false",
        "ENABLE_PERSISTENT_CONFIG": "false",  # this file is the truth, not the database
        "ENABLE_TAGS_GENERATION": "false",
        "ENABLE_FOLLOW_UP_GENERATION": "false",
        "ENABLE_AUTOCOMPLETE_GENERATION": "false",
        "AIOHTTP_CLIENT_TIMEOUT_MODEL_LIST": "3",
        "RAG_EMBEDDING_ENGINE": "openai",
        "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "false",
        "ENABLE_COMMUNITY_SHARING": "false",
        "ANONYMIZED_TELEMETRY": "false",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
        # a page under another name loads, but its websocket is refused and no answer ever shows
        "CORS_ALLOW_ORIGIN": ";".join(f"http://{own}:{config.webui.port}" for own in _OWN_NAMES),
    }
    if not all(_calls_tools(model) for model in config.models):
        # three dozen tools go with each chat otherwise, and a vLLM that is not told how to read
        # calls answers all of them with 400
        env["DEFAULT_MODEL_METADATA"] = '{"capabilities":{"builtin_tools":false}}'
    return env


def _calls_tools(model: ModelConfig) -> bool:
    """Whether it is known to; what a unit by hand says is not."""
    engine = model.engine
    if engine is None or engine.kind != "generate":
        return engine is not None
    words = {word.partition("=")[0] for word in (*engine.args, *(engine.command or ()))}
    return {"--enable-auto-tool-choice", "--tool-call-parser"} <= words

"""Why something was not done: one table from the reason's word to what each door says.

The word is what travels (`error.data.reason`; with underscores as `error.code` in HTTP bodies);
numbers follow from it. JSON-RPC leaves -32099 to -32000 to servers (specification §5.1); the codes
it defines itself are in `wire.rpc.Code`.

Exit codes of `homegptctl`: 0 done; 1 it was tried and failed; 2 usage; 3 the daemon is not there;
4 refused; 5 no such model or operation; 78 the configuration has problems (EX_CONFIG in
sysexits.h); 130 interrupted while waiting (128 + SIGINT).
"""

from __future__ import annotations

from typing import NamedTuple

DONE = 0
FAILED = 1
USAGE = 2
ABSENT = 3
REFUSED = 4
UNKNOWN = 5
CONFIG = 78
INTERRUPTED = 130


class Row(NamedTuple):
    """What each door says for one reason."""

    http: int  # HTTP status
    openai: str  # `error.type` of an OpenAI error body
    rpc: int  # JSON-RPC error code
    exit: int  # exit code of homegptctl


TABLE: dict[str, Row] = {
    "bad-request": Row(400, "invalid_request_error", -32602, USAGE),
    "unauthorized": Row(401, "authentication_error", -32001, REFUSED),
    "forbidden": Row(403, "permission_error", -32002, REFUSED),
    "unknown-model": Row(404, "invalid_request_error", -32003, UNKNOWN),
    "unknown-operation": Row(404, "invalid_request_error", -32004, UNKNOWN),
    "model-disabled": Row(404, "invalid_request_error", -32005, REFUSED),
    "does-not-fit": Row(409, "invalid_request_error", -32006, REFUSED),
    "pinned": Row(409, "invalid_request_error", -32007, REFUSED),
    "busy": Row(409, "invalid_request_error", -32008, REFUSED),
    "cancelled": Row(409, "invalid_request_error", -32009, FAILED),
    "too-large": Row(413, "invalid_request_error", -32010, USAGE),
    "bad-config": Row(422, "invalid_request_error", -32011, CONFIG),
    "too-many-requests": Row(429, "rate_limit_error", -32018, REFUSED),
    "internal": Row(500, "server_error", -32603, FAILED),
    "engine-fault": Row(502, "server_error", -32012, FAILED),
    "cut": Row(502, "server_error", -32013, FAILED),
    "model-failed": Row(503, "server_error", -32014, FAILED),
    "queue-full": Row(503, "server_error", -32015, REFUSED),
    "waited-too-long": Row(503, "server_error", -32016, FAILED),
    "shutting-down": Row(503, "server_error", -32017, ABSENT),
    "gpu-freed": Row(503, "server_error", -32019, REFUSED),
}


def row(reason: str) -> Row:
    """The row of a reason; a word that a newer daemon made up counts as `internal`."""
    return TABLE.get(reason, TABLE["internal"])


def openai_code(reason: str) -> str:
    """`error.code` of an OpenAI error body; clients know `model_not_found` by heart."""
    return "model_not_found" if reason == "unknown-model" else reason.replace("-", "_")

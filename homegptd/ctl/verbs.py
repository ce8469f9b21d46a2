"""What can be said to `homegptctl`. Kept as plain values: this is read at every start.

Each row: the module that does it, what follows the verb (in brackets: may be left out), its options
(with `=` if they take a value, `=*` if they may be repeated), and one line of help.
"""

from __future__ import annotations

VERBS: dict[str, tuple[str, str, str, str]] = {
    "status": ("status", "", "", "models, memory, queue, and what is going on"),
    "switch": (
        "acts",
        "MODEL",
        "--wait --no-wait --now --force",
        "make a model awake, displacing others",
    ),
    "sleep": ("acts", "MODEL", "--wait --no-wait --level=", "put a model to sleep"),
    "wake": ("acts", "MODEL", "--wait --no-wait", "wake a model that fits beside the others"),
    "start": ("acts", "MODEL", "--wait --no-wait", "start the engine of a model"),
    "stop": ("acts", "MODEL", "--wait --no-wait --now", "stop the engine of a model"),
    "prove": ("acts", "MODEL", "--wait --no-wait", "prove that a model survives sleep here"),
    "free": (
        "acts",
        "",
        "--wait --no-wait --now --gpu=",
        "empty a GPU for a game or a training run",
    ),
    "reclaim": ("acts", "", "--wait --no-wait --gpu=", "let a freed GPU serve models again"),
    "plan": ("plan", "MODEL", "", "what a switch would do, and how long it should take"),
    "memory": ("memory", "[MODEL]", "", "what memory is reckoned with, measured or given"),
    "operation": ("acts", "ID", "--wait --no-wait", "an operation, running or ended"),
    "cancel": ("acts", "ID", "", "give up what an operation has not yet begun"),
    "events": ("watch", "", "--follow", "what happens, as it happens"),
    "logs": (
        "watch",
        "MODEL",
        "-n= --lines= --all -f --follow",
        "the last lines of a model's engine",
    ),
    "reload": ("acts", "", "--wait --no-wait", "read the configuration again"),
    "add": (
        "grow",
        "NAME",
        "--id= --gpu= --gpu-memory-gb= --mode= --arg=* --no-pull --yes",
        "add a model: to the configuration, as a unit, asleep",
    ),
    "remove": ("grow", "MODEL", "--yes", "take a model out again"),
    "pull": ("grow", "[MODEL]", "--missing", "fetch images and weights that are missing"),
    "init": ("grow", "", "--yes", "propose a configuration for this box"),
    "apply": ("units", "", "--yes --files-only", "make the units as configured, and reload"),
    "render": ("units", "", "--to= --check --config=", "print the units of a configuration"),
    "doctor": ("doctor", "", "--gpu --yes", "what is wrong with this box, and what mends it"),
    "key": (
        "key",
        "add|list|remove [NAME]",
        "--models= --no-switch --manage --max-wait= --concurrency= --replace --file=",
        "API keys: who may use the models over HTTP",
    ),
    "config": ("config", "check [FILE]", "", "check a configuration file"),
    "version": ("version", "", "", "the versions of this command and of the daemon"),
    "completion": ("completion", "bash|zsh|fish", "", "print a completion script for a shell"),
    "help": ("help", "[VERB]", "", "help on a verb"),
}
HIDDEN: dict[str, tuple[str, str, str, str]] = {
    "__complete": ("completion", "models|operations|verbs", "", "for the completion scripts"),
}

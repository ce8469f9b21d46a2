"""`homegptctl help [VERB]`."""

from __future__ import annotations

from .asked import no_verb, row_of
from .verbs import HIDDEN, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .asked import Asked

_TOP = """\
usage: homegptctl [--socket PATH] [--json] VERB ...

Talks to homegptd, which runs many models on one GPU box."""
_OPTIONS = """\
options, before or after the verb:
  --socket PATH  the daemon's socket; default $HOMEGPT_SOCKET, /run/homegpt/control.sock,
                 $XDG_RUNTIME_DIR/homegpt/control.sock or /tmp/homegpt-$UID/control.sock
  --json         one JSON document on stdout (events: one a line); errors as {"error": ...}
  --version      the version of this command
  -h, --help     this text, or that of a verb

exit codes:
  0 done  1 it was tried and failed  2 usage  3 the daemon is not there  4 refused
  5 no such model or operation  78 the configuration has problems
  130 interrupted while waiting (the operation goes on)  141 the reader of the output left"""
_OPTION_TEXTS = {
    "--wait": "wait for the end and show the progress",
    "--no-wait": "print the operation and return at once",
    "--now": "cut running answers instead of letting them end",
    "--force": "displace pinned models too",
    "--level=": "1 keeps weights in RAM, 2 drops them; default: the daemon chooses",
    "-f": "go on until interrupted",
    "--follow": "go on until interrupted (what events does anyway)",
    "-n=": "how many lines, default 50",
    "--lines=": "the same",
    "--all": "with the daemon's own questions to it",
    "--id=": "what the model is called here; default: from its name",
    "--gpu=": "its GPUs, such as 0 or 0,1; default: the first ones",
    "--gpu-memory-gb=": "GB it takes awake, KV cache included; default: estimated",
    "--mode=": "active, sleep (default) or disabled",
    "--arg=*": "a flag for vLLM, flag=value or flag; may be repeated",
    "--no-pull": "leave fetching image and weights to the first start",
    "--missing": "say nothing where nothing is missing",
    "--yes": "do it without asking",
    "--files-only": "leave a running daemon alone",
    "--to=": "write them into this folder instead",
    "--check": "only say whether the installed ones differ; exit code 1 if so",
    "--config=": "default: /etc/homegpt/config.yaml",
    "--models=": "ids or aliases, such as a,b, that the key may use; default: all",
    "--no-switch": "its requests do not bring up a model that is not awake",
    "--manage": "it may manage the box over HTTP",
    "--max-wait=": "seconds that its requests wait at most",
    "--concurrency=": "requests that it may have under way at once",
    "--replace": "a key of that name is there: it goes, and this one takes its place",
    "--file=": "the file of keys; default: http.keys, else /etc/homegpt/keys.yaml",
    "--gpu": "put each model to sleep and wake it, and measure the cards",
}
_VALUES = {"--id": "ID", "--gpu": "LIST", "--gpu-memory-gb": "GB", "--mode": "MODE",
           "--arg": "FLAG", "--models": "LIST", "--max-wait": "S", "--concurrency": "N",
           "--file": "FILE", "--to": "FOLDER", "--config": "FILE"}  # fmt: skip
_MORE = {
    "key": """\
add prints the key once, alone on standard output; the file holds only its hash. list shows names
and limits, remove takes a key out. A running daemon is told at once.""",
    "status": """\
MEMORY is GiB on the GPU, +R what is kept in RAM; REQS running+waiting*frozen; the star marks the
default model. A time before the words under WHY is minutes and seconds until the state changes
by itself; homegptctl(1) says what changes in which state. Where the terminal is too narrow,
columns are left out.""",
    "switch": """\
Others make room for it: running answers end first, or are cut with --now; then they sleep, or stop
where they cannot sleep. A request whose answer --now cuts before its first byte is sent again, and
may bring its model back. No pinned model makes room without --force. What keeps it waiting stands
in the live line. Ctrl-C leaves, the switch goes on: `homegptctl operation ID` looks again,
`homegptctl cancel ID` gives it up.""",
    "sleep": """\
Running answers end first. Level 1 keeps the weights in RAM and wakes within seconds; level 2
drops them. A request for it wakes it again.""",
    "wake": "Displaces nobody: what does not fit beside the models that are awake is refused.",
    "start": """\
Loads the model and puts it to sleep, a disabled one too. Loading needs the GPU: the model that
is awake may have to make room for that long.""",
    "stop": """\
Running answers end first, or are cut with --now. Requests that wait for it are refused. A later
request starts it again, unless its startup_mode is disabled.""",
    "prove": """\
Tries on this box, with answers of its own, whether an answer of the model can be frozen by a
sleep and go on rightly. Needs its GPU meanwhile. The daemon does this by itself, once for each
model, when it loads it; until it is proved, a switch waits for running answers.""",
    "free": """\
For a game or a training run: running answers end first, or are cut with --now; then what is on the
GPU sleeps, or is stopped where it cannot sleep, and nothing is started there until `homegptctl
reclaim`, also over restarts. Without --gpu: all GPUs. Sleepers keep a little of it; `homegptctl
stop MODEL` gives that back.""",
    "reclaim": "What was awake wakes, and what is missing is loaded. Without --gpu: all GPUs.",
    "plan": """\
Changes nothing. In brackets: one switch in ten is quicker, one slower. Below the steps the sum of
memory, place by place. Exit code 4 if the model does not fit; then the sum says why.""",
    "operation": "ID stands in what a verb prints with --no-wait, and in homegptctl status.",
    "cancel": "A step that has begun is carried out; what comes after it is not.",
    "events": "One line each, with --json one object. Goes on over a restart of the daemon.",
    "logs": """\
Without the lines that the daemon's own questions leave there (GET /health and the like); --all
shows those too.""",
    "reload": "A file with problems changes nothing, and each problem is told. Exit code 78 then.",
    "add": "NAME is one on Hugging Face or a path. Shows what it would do, then asks.",
    "remove": "Stops its engine and removes its unit. The weights stay on the disk. Asks first.",
    "pull": "Without MODEL: of all models. Needs root and Podman.",
    "init": "Looks at the cards and the RAM, and prints a configuration; --yes writes it.",
    "apply": "Shows the difference, then asks. What does not validate changes nothing.",
    "render": "Prints them, or writes them with --to. Needs no daemon and changes nothing else.",
    "doctor": "Exit code 1 if something is wrong. Run it with sudo to have everything looked at.",
    "config": "Without FILE: /etc/homegpt/config.yaml. Needs no daemon. Exit code 78 if it is bad.",
    "completion": "For example: source <(homegptctl completion bash)",
}


def run(asked: Asked) -> int:
    """Print help."""
    if asked.words:
        print(_verb(asked.words[0]))
    else:
        print("\n".join([_TOP, "", "verbs:", *_verbs(), "", _OPTIONS]))
    return 0


def _verbs() -> list[str]:
    names = {verb: f"{verb} {row[1]}".strip() for verb, row in VERBS.items()}
    width = max(map(len, names.values()))
    return [f"  {names[verb].ljust(width)}  {row[3]}" for verb, row in VERBS.items()]


def usage_of(verb: str) -> str:
    """The shape of one verb with its options."""
    _, words, options, _ = row_of(verb)
    marks = [f"[{_mark(option)}{' ...' if '*' in option else ''}]" for option in options.split()]
    return " ".join(["homegptctl", verb, *filter(None, [words]), *marks])


def _verb(verb: str) -> str:
    if verb not in VERBS and verb not in HIDDEN:
        no_verb(verb)
    _, _, options, summary = row_of(verb)
    lines = [f"usage: {usage_of(verb)}", "", summary]
    if options:
        marks = {option: _mark(option) for option in options.split()}
        width = max(map(len, marks.values()))
        lines += ["", *(f"  {marks[one].ljust(width)}  {_OPTION_TEXTS[one]}" for one in marks)]
    if verb in _MORE:
        lines += ["", _MORE[verb]]
    return "\n".join(lines)


def _mark(option: str) -> str:
    """The option as the manual page spells it."""
    name = option.rstrip("=*")
    return f"{name} {_VALUES.get(name, 'N')}" if "=" in option else name

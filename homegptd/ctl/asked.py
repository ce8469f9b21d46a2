"""The command line, read by hand: argparse costs 10 ms, as much as the interpreter itself."""

from __future__ import annotations

from os import environ

from homegptd.wire.paths import ENVIRONMENT, socket_to_ask

from .verbs import HIDDEN, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class Stop(Exception):
    """The run ends here. `message` and `hint` go to stderr, `code` to the shell."""

    def __init__(
        self, message: str, *, code: int, hint: str | None = None, reason: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.hint, self.reason = message, code, hint, reason


class Asked:
    """What the command line says."""

    __slots__ = ("chosen", "json", "lists", "options", "socket", "verb", "words")

    def __init__(self) -> None:
        self.verb = ""
        self.words: list[str] = []
        self.options: dict[str, str] = {}  # without their dashes; "" for those without a value
        self.lists: dict[str, list[str]] = {}  # options that may be repeated
        self.socket = ""
        self.chosen = False  # whether somebody named the socket
        self.json = False

    @property
    def wait(self) -> bool:
        """Whether to wait for the end; `operation` looks by default, the others wait."""
        if "no-wait" in self.options:
            return False
        return "wait" in self.options or self.verb != "operation"


def read(argv: list[str]) -> Asked:
    """The command line in order. Raises: Stop (usage)."""
    asked = Asked()
    rest = list(argv)
    only_words = False
    while rest:
        word = rest.pop(0)
        if word == "--" and not only_words:
            only_words = True
        elif word.startswith("-") and len(word) > 1 and not only_words:
            _option(asked, word, rest)
        elif not asked.verb:
            asked.verb = _verb(word)
        else:
            asked.words.append(word)
    _check(asked)
    asked.chosen = bool(asked.socket or environ.get(ENVIRONMENT))
    asked.socket = asked.socket or socket_to_ask()
    return asked


def row_of(verb: str) -> tuple[str, str, str, str]:
    """The row of a known verb."""
    return VERBS.get(verb) or HIDDEN[verb]


def usage(message: str, hint: str | None = None) -> NoReturn:
    """Raises: Stop."""
    raise Stop(message, code=2, hint=hint or "homegptctl --help", reason="bad-request")


def nearest(word: str, known: list[str], *, cutoff: float = 0.7) -> str | None:
    """The known word that was probably meant: a slip of the fingers, or its beginning."""
    from difflib import get_close_matches

    found = get_close_matches(word, known, n=1, cutoff=cutoff)
    begun = [one for one in known if len(word) > 1 and one.startswith(word)]
    return next(iter([*found, *begun]), None)


def usage_line(verb: str) -> str:
    """How the verb is used."""
    from .help import usage_of

    return f"usage: {usage_of(verb)}"


def no_verb(word: str) -> NoReturn:
    """Raises: Stop."""
    near = nearest(word, list(VERBS))
    usage(f'there is no verb "{word}"', f"did you mean {near}?" if near else "homegptctl help")


def _verb(word: str) -> str:
    if word in VERBS or word in HIDDEN:
        return word
    no_verb(word)


def _option(asked: Asked, word: str, rest: list[str]) -> None:
    name, equals, value = word.partition("=")
    if name in ("--json", "--help", "-h", "--version", "--socket"):
        _global_option(asked, name, value if equals else None, rest)
        return
    if not asked.verb:
        usage(f"there is no option {name} before the verb")
    allowed = row_of(asked.verb)[2].split()
    if f"{name}=" in allowed:
        asked.options[name.lstrip("-")] = value if equals else _value(name, rest, asked.verb)
    elif f"{name}=*" in allowed:
        one = value if equals else _value(name, rest, asked.verb)
        asked.lists.setdefault(name.lstrip("-"), []).append(one)
    elif name in allowed and not equals:
        asked.options[name.lstrip("-")] = ""
    elif name[:2] == "-n" and "-n=" in allowed and name[2:].isdigit():  # -n20, as in tail
        asked.options["n"] = name[2:]
    else:
        _no_option(asked.verb, name, [one.rstrip("=*") for one in allowed])


def _no_option(verb: str, name: str, allowed: list[str]) -> NoReturn:
    """Raises: Stop. Compared without dashes, which make everything alike."""
    known = {one.lstrip("-"): one for one in [*allowed, "--json", "--socket", "--help"]}
    near = nearest(name.lstrip("-"), list(known), cutoff=0.6)
    usage(
        f"{verb} has no option {name}", f"did you mean {known[near]}?" if near else usage_line(verb)
    )


def _global_option(asked: Asked, name: str, value: str | None, rest: list[str]) -> None:
    if name == "--socket":
        asked.socket = _value(name, rest) if value is None else value
    elif name == "--json":
        asked.json = True
    elif name == "--version":
        asked.options["version"] = ""
    else:
        asked.options["help"] = ""


def _value(name: str, rest: list[str], verb: str = "") -> str:
    if not rest:
        usage(f"{name} wants a value", usage_line(verb) if verb else None)
    return rest.pop(0)


def _check(asked: Asked) -> None:
    """Turn --help, --version and an empty line into verbs, and count the words."""
    if "help" in asked.options:
        asked.words = [asked.verb] if asked.verb else []
        asked.verb = "help"
    elif "version" in asked.options:
        asked.verb = "--version"
        return
    elif not asked.verb:
        asked.verb = "help"
    wanted = row_of(asked.verb)[1].split()
    least = len([word for word in wanted if not word.startswith("[")])
    if len(asked.words) > len(wanted):
        usage(f"{asked.verb}: too many words", usage_line(asked.verb))
    if len(asked.words) < least:
        usage(f"{asked.verb}: {wanted[len(asked.words)]} is missing", usage_line(asked.verb))
    for word, name in zip(asked.words, wanted, strict=False):
        if not word.strip():
            what = "a model must be named" if "MODEL" in name else f"{name} is empty"
            usage(f"{asked.verb}: {what}", usage_line(asked.verb))

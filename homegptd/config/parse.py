"""A file's text in, a `Config` out; or a `ConfigError` with everything that is wrong with it."""

from contextlib import suppress
from pathlib import Path

from .checks import check
from .models import defaults, models
from .nodes import MAX_BYTES, Document, compose
from .problems import ConfigError, Enough, Problem, Problems
from .schema import Config, Trust
from .sections import BACKEND, PATH, TRUST, control, gpus, http, router, secrets, switching, webui
from .table import Table
from .values import Item, text

__all__ = ["ConfigError", "Problem", "load", "parse", "read_text"]


def load(path: Path | str) -> Config:
    """Read and parse a file.

    Raises `ConfigError`, also for a file that cannot be read or is not text.
    """
    return parse(read_text(Path(path)), str(path))


def parse(source: str, name: str) -> Config:
    """Parse the text of a file; `name` is what its problems are reported under.

    Raises `ConfigError` with all problems at once, sorted by line.
    """
    document = Document(name)
    config: Config | None = None
    with suppress(Enough):  # the problems say why reading ended there
        config = _config(source, document)
    if config is None or document.problems:
        raise document.problems.error()
    return config


def _config(source: str, document: Document) -> Config | None:
    if len(source.encode(errors="replace")) > MAX_BYTES:
        document.problems.add(0, "", f"is larger than {MAX_BYTES // 1024} KiB")
        return None
    node = compose(source, document)
    if node is None:
        if not document.problems:
            document.problems.add(1, "", "is empty: it must at least list models:")
        return None
    return _root(Table(Item(node, "", document)))


def _root(root: Table) -> Config:
    cards = gpus(root)
    switches = switching(root)
    usual: Trust = "measured"
    trust = root.get("trust", TRUST, usual)
    read = models(root, base=defaults(root), cards=cards, switching=switches, trust=trust)
    config = Config(
        models=tuple(entry.model for entry in read),
        default=root.get("default", text, None),
        gpus=cards,
        switching=switches,
        router=router(root),
        http=http(root),
        control=control(root),
        webui=webui(root),
        secrets=secrets(root),
        state_dir=root.get("state_dir", PATH, None),
        trust=trust,
        backend=root.get("backend", BACKEND, None),
    )
    check(root, config, read)
    root.ignore("x-")
    root.finish()
    return config


def read_text(path: Path) -> str:
    """Raises: ConfigError where it cannot be read, or is not text."""
    problems = Problems(str(path))
    data = b""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        problems.add(line, "", f"is not UTF-8 text: byte 0x{data[fault.start]:02x}")
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        problems.add(0, "", f"cannot be read: {reason}")
    raise problems.error()

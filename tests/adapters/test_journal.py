"""Against a real datagram socket in journald's place, and real streams."""

import fcntl
import io
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from homegptd.adapters.journal import JournalHandler, LineFormatter, configure_logging

Fields = dict[str, str]


class Journald:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def receive(self) -> Fields:
        data, fds, _, _ = socket.recv_fds(self.socket, 2**20, 1)
        for fd in fds:
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            data = os.pread(fd, os.fstat(fd).st_size, 0)
            os.close(fd)
        return parse(data)


def parse(data: bytes) -> Fields:
    """By the text of systemd.io/JOURNAL_NATIVE_PROTOCOL."""
    fields: Fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    journald = Journald(tmp_path / "journal")
    yield journald
    journald.socket.close()


@pytest.fixture
def handler(journald: Journald) -> Iterator[JournalHandler]:
    handler = JournalHandler(journald.path)
    yield handler
    handler.close()


@pytest.fixture
def logger(handler: JournalHandler) -> Iterator[logging.Logger]:
    logger = logging.getLogger("homegptd.runtime.scheduler")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_a_record_arrives_with_its_fields(journald: Journald, logger: logging.Logger) -> None:
    fields = {"MODEL_ID": "qwen3-8b", "OPERATION_ID": 17, "PHASE": "waking→awake", "NONE": None}
    logger.info("awake %s", "qwen3-8b", extra={"fields": fields})
    got = journald.receive()
    assert got.pop("CODE_LINE").isdecimal()
    assert got == {
        "MESSAGE": "awake qwen3-8b",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "homegptd",
        "LOGGER": "homegptd.runtime.scheduler",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_a_record_arrives_with_its_fields",
        "MODEL_ID": "qwen3-8b",
        "OPERATION_ID": "17",
        "PHASE": "waking→awake",
    }


@pytest.mark.parametrize(("level", "priority"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_levels_are_syslogs(
    journald: Journald, logger: logging.Logger, level: int, priority: int
) -> None:
    logger.log(level, "x")
    assert journald.receive()["PRIORITY"] == str(priority)


def test_a_value_with_line_breaks_cannot_forge_fields(
    journald: Journald, logger: logging.Logger
) -> None:
    logger.info("one\nPRIORITY=0\ntwo \udc80", extra={"fields": {"message": "x", "_uid": "0=\n"}})
    got = journald.receive()
    assert got["MESSAGE"] == "one\nPRIORITY=0\ntwo \\udc80"
    assert got["PRIORITY"] == "6"
    assert got["UID"] == "0=\n"


def test_a_traceback_belongs_to_its_message(journald: Journald, logger: logging.Logger) -> None:
    try:
        int("boom")
    except ValueError:
        logger.exception("failed")
    message = journald.receive()["MESSAGE"]
    assert message.startswith("failed\nTraceback")
    assert message.endswith("invalid literal for int() with base 10: 'boom'")


def test_a_large_record_goes_by_memfd(journald: Journald, logger: logging.Logger) -> None:
    logger.info("x" * 500_000)
    assert journald.receive()["MESSAGE"] == "x" * 500_000


def test_what_a_slow_journald_cannot_take_is_counted_and_told(
    journald: Journald, handler: JournalHandler, logger: logging.Logger
) -> None:
    sent = 0
    while not handler.dropped:
        logger.info("line %s", sent)
        sent += 1
    for _ in range(sent - 1):
        journald.receive()
    logger.info("after")
    assert journald.receive()["MESSAGE"] == "after"
    assert journald.receive()["MESSAGE"].startswith("1 log lines were lost")


def test_neither_a_dead_journald_nor_a_bad_record_raises(
    journald: Journald,
    handler: JournalHandler,
    logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = logging.LogRecord("homegptd", 20, __file__, 1, "%d", ("not a number",), None)
    handler.handle(bad)
    journald.socket.close()
    logger.info("nobody there")
    journald.path.unlink()
    logger.info("not even a socket")
    assert handler.dropped == 3
    assert capsys.readouterr().err == ""


def test_a_restarted_journald_is_found_again(journald: Journald, logger: logging.Logger) -> None:
    journald.socket.close()
    journald.path.unlink()
    again = Journald(journald.path)
    logger.info("back")
    assert again.receive()["MESSAGE"] == "back"
    again.socket.close()


# Which of the two


@pytest.fixture
def untouched_root() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("homegptd")
    before, levels = root.handlers[:], (root.level, ours.level)
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = before
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.usefixtures("untouched_root")
def test_journald_is_used_only_where_stderr_leads_to_it(journald: Journald, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        stat = os.fstat(stream.fileno())
        for told, kind in [
            (f"{stat.st_dev}:{stat.st_ino}", JournalHandler),
            (f"{stat.st_dev}:{stat.st_ino + 1}", logging.StreamHandler),
            ("", logging.StreamHandler),
        ]:
            environ = {"JOURNAL_STREAM": told} if told else {}
            handler = configure_logging("info", environ, journal=journald.path, stream=stream)
            assert type(handler) is kind
            assert logging.getLogger().handlers == [handler]
        logging.getLogger("homegptd.core").info("seen")
        logging.getLogger("homegptd.core").debug("not seen")
        logging.getLogger("aiohttp").info("not seen")
        logging.getLogger("aiohttp").warning("look")
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert [line[9:] for line in lines] == ["seen", "warning: look"]


# Lines for a person


def line(message: str, *, colour: bool = False, level: int = 20, **fields: object) -> str:
    record = logging.LogRecord("homegptd", level, __file__, 1, message, (), None)
    record.fields = fields
    return LineFormatter(colour=colour).format(record)


def test_a_line_tells_the_time_the_message_and_what_it_left_out() -> None:
    text = line("awake    qwen3-8b", MODEL_ID="qwen3-8b", PHASE="awake", TOOK="3.1s")
    assert re.fullmatch(r"\d\d:\d\d:\d\d awake    qwen3-8b  took=3.1s", text)


@pytest.mark.parametrize(
    ("message", "fields", "said"),
    [
        ("up", {}, "up"),
        ("took 1.17s", {"OPERATION_ID": 17}, "took 1.17s  operation=17"),
        ('cannot wake "coder": hung', {"MODEL_ID": "coder"}, 'cannot wake "coder": hung'),
        ("up", {"WHY": "asked by ann", "NONE": None}, 'up  why="asked by ann"'),
        ("asked by ann", {"WHY": "asked by ann"}, "asked by ann"),
    ],
)
def test_only_what_is_not_said_yet_is_added(
    message: str, fields: dict[str, object], said: str
) -> None:
    assert line(message, **fields)[9:] == said


def test_warnings_say_so_and_colours_need_a_terminal() -> None:
    assert line("hung", level=30)[9:] == "warning: hung"
    assert "\x1b[33mwarning: hung\x1b[0m" in line("hung", level=30, colour=True)
    assert "\x1b" not in line("hung", level=40)


@pytest.mark.usefixtures("untouched_root")
@pytest.mark.parametrize(
    ("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_colours_unless_it_asks_not_to(
    environ: dict[str, str], *, colour: bool
) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        configure_logging("info", environ, stream=terminal)
        logging.getLogger("homegptd").error("hung")
        assert (b"\x1b[31m" in os.read(ours, 1000)) is colour
    os.close(ours)


@pytest.mark.usefixtures("untouched_root")
def test_a_stream_without_a_file_gets_plain_lines() -> None:
    stream = io.StringIO()
    configure_logging("debug", {"JOURNAL_STREAM": "1:2"}, stream=stream)
    logging.getLogger("homegptd").debug("x")
    assert stream.getvalue()[9:] == "x\n"

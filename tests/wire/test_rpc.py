"""JSON-RPC 2.0: what a line means, and that no line can break the reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homegptd.wire import lean, rpc
from homegptd.wire.rpc import BadMessage, Call, Code, Failure, Notification, Reply

calmly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def bad(line: bytes) -> Failure:
    with pytest.raises(BadMessage) as caught:
        rpc.parse(line)
    return caught.value.failure


def test_a_call_with_positional_parameters() -> None:
    line = b'{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}'
    assert rpc.parse(line) == Call(1, "subtract", [42, 23])


def test_a_call_with_named_parameters() -> None:
    line = (
        b'{"jsonrpc": "2.0", "method": "subtract",'
        b' "params": {"subtrahend": 23, "minuend": 42}, "id": 3}'
    )
    assert rpc.parse(line) == Call(3, "subtract", {"subtrahend": 23, "minuend": 42})


def test_without_an_id_it_is_a_notification() -> None:
    assert rpc.parse(b'{"jsonrpc": "2.0", "method": "foobar"}') == Notification("foobar", {})


def test_with_an_id_of_null_it_is_a_call() -> None:
    assert rpc.parse(b'{"jsonrpc": "2.0", "method": "f", "id": null}') == Call(None, "f", {})


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
        b'[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
        b' {"jsonrpc": "2.0", "method" ]',
        b"\xff\xfe",
        b"",
        b'{"jsonrpc": "2.0", "method": "f", "params": [NaN], "id": 1}',
        b"[" * 100_000,
        b'{"jsonrpc": "2.0", "method": "f", "id": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_json_is_a_parse_error(line: bytes) -> None:
    failure = bad(line)
    assert (failure.code, failure.id) == (Code.PARSE_ERROR, None)


@pytest.mark.parametrize(
    ("line", "call_id"),
    [
        (b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}', None),
        (b"[]", None),
        (b"1", None),
        (b'"text"', None),
        (b'{"foo": "boo"}', None),
        (b'{"jsonrpc": "1.0", "method": "f", "id": 7}', 7),
        (b'{"jsonrpc": "2.0", "method": "f", "params": 3, "id": "x"}', "x"),
        (b'{"jsonrpc": "2.0", "method": "f", "id": true}', None),
        (b'{"jsonrpc": "2.0", "method": "f", "id": {}}', None),
        (b'{"jsonrpc": "2.0", "method": "f", "id": 1e999}', None),
        (b'{"jsonrpc": "2.0", "id": 4}', 4),
        (b'{"jsonrpc": "2.0", "id": 4, "result": 1, "error": {}}', 4),
    ],
)
def test_json_that_is_no_message_is_an_invalid_request(line: bytes, call_id: object) -> None:
    failure = bad(line)
    assert (failure.code, failure.id) == (Code.INVALID_REQUEST, call_id)


def test_a_batch_keeps_the_bad_ones_in_their_places() -> None:
    batch = rpc.parse(b'[1, {"jsonrpc": "2.0", "method": "f", "id": 2}, 3]')
    assert isinstance(batch, tuple)
    assert [type(item) for item in batch] == [BadMessage, Call, BadMessage]


def test_replies_are_read_as_well() -> None:
    assert rpc.parse(b'{"jsonrpc": "2.0", "result": 19, "id": 1}') == Reply(1, 19)
    line = b'{"jsonrpc": "2.0", "error": {"code": -1, "message": "no", "data": 3}, "id": 1}'
    assert rpc.parse(line) == Failure(1, -1, "no", 3)


def test_a_batch_is_encoded_as_one_line() -> None:
    line = rpc.encode_batch([Reply(1, "a\nb"), Failure(2, -32601, "Method not found")])
    assert line.count(b"\n") == 1
    assert rpc.parse(line) == (Reply(1, "a\nb"), Failure(2, -32601, "Method not found"))


def test_what_json_cannot_say_is_not_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        rpc.encode(Reply(1, float("nan")))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars, lambda deeper: st.lists(deeper) | st.dictionaries(st.text(), deeper), max_leaves=8
)
members = st.dictionaries(
    st.sampled_from(["jsonrpc", "method", "params", "id", "result", "error", "x"]),
    values | st.just("2.0"),
)


@calmly
@given(st.binary())
def test_no_bytes_break_the_parser(line: bytes) -> None:
    _answerable(line)


@calmly
@given(members | st.lists(members))
def test_no_almost_message_breaks_the_parser(value: object) -> None:
    _answerable(json.dumps(value).encode())


def _answerable(line: bytes) -> None:
    try:
        message = rpc.parse(line)
    except BadMessage as bad_one:
        rpc.encode(bad_one.failure)
        return
    for item in message if isinstance(message, tuple) else (message,):
        if isinstance(item, BadMessage):
            rpc.encode(item.failure)
        if isinstance(item, Call):
            assert rpc.parse(rpc.encode(Reply(item.id, True))) == Reply(item.id, True)


ids = st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda deeper: st.lists(deeper) | st.dictionaries(st.text(), deeper),
    max_leaves=8,
)
parameters = st.dictionaries(st.text(), plain) | st.lists(plain)
items = (
    st.builds(Call, ids, st.text(), parameters)
    | st.builds(Notification, st.text(), parameters)
    | st.builds(Reply, ids, plain)
    | st.builds(Failure, ids, st.integers(), st.text(), plain)
)


@calmly
@given(items)
def test_what_was_encoded_is_parsed_as_it_was(item: rpc.Item) -> None:
    assert rpc.parse(rpc.encode(item)) == item


@calmly
@given(plain)
def test_the_lean_reader_agrees_with_json(value: object) -> None:
    assert lean.loads(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "nope", '{"a":', "[1,]", "1 2", '{"a" 1}'])
def test_the_lean_reader_refuses_what_json_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        lean.loads(text)


def test_a_lean_call_is_a_call() -> None:
    assert rpc.parse(lean.call_line(3, "status")) == Call(3, "status", {})
    line = lean.call_line(4, "switch", {"model": "ä\n", "wait": True})
    assert rpc.parse(line) == Call(4, "switch", {"model": "ä\n", "wait": True})

"""Which model a body names: right for every body, and without standing still for a big one."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homegptd.faces import openai
from homegptd.faces.adjust import Adjustment, adjusted
from homegptd.faces.openai import NotUnderstood, Wish

BIG = "x" * 70_000
DECOYS = [
    {"role": "user", "content": '", "model": "wrong", "x": "'},
    {"role": "user", "content": "back\\slash\\", "model": "wrong"},
    {"type": "function", "function": {"parameters": {"properties": {"model": {"type": "string"}}}}},
    {
        "metadata": {"model": "wrong", "stream": True},
        "list": ["model", "stream", [{"model": "no"}]],
    },
]


@pytest.mark.parametrize("pad", ["", BIG], ids=["parsed", "scanned"])
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": "), (" ,\n", " :\t")])
def test_the_model_is_found_wherever_it_stands(pad: str, spaces: tuple[str, str]) -> None:
    for content in (
        {"model": "right", "messages": DECOYS, "pad": pad, "stream": True},
        {"messages": DECOYS, "pad": pad, "stream": True, "model": "right"},
        {"a": "model", "pad": pad, "b": "stream", "stream": True, "x": DECOYS, "model": "right"},
    ):
        body = json.dumps(content, separators=spaces).encode()
        assert openai.read(body) == Wish("right", stream=True)


@pytest.mark.parametrize("pad", ["", BIG], ids=["parsed", "scanned"])
@pytest.mark.parametrize(
    ("content", "wish"),
    [
        ({"model": "", "stream": False}, Wish(None, stream=False)),
        ({"model": None, "stream": None}, Wish(None, stream=False)),
        ({"messages": [{"model": "deep"}]}, Wish(None, stream=False)),
        ({"model": 'a"b\\c/ü'}, Wish('a"b\\c/ü', stream=False)),
        ({}, Wish(None, stream=False)),
    ],
)
def test_bodies_that_say_less(pad: str, content: dict[str, object], wish: Wish) -> None:
    assert openai.read(json.dumps({"pad": pad} | content).encode()) == wish
    assert openai.read(json.dumps(content | {"pad": pad}, ensure_ascii=False).encode()) == wish


def test_an_escaped_key_is_a_key_too() -> None:
    assert openai.read(b'{"pad":"%s","m\\u006fdel":"right"}' % BIG.encode()).model == "right"


def test_the_last_of_two_models_counts_as_it_does_for_the_engine() -> None:
    assert openai.read(b'{"model":"a","pad":"%s","model":"b"}' % BIG.encode()).model == "b"
    assert openai.read(b'{"model":"a","model":"b"}').model == "b"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        (b'{"model": 5}', "must be a string"),
        (b'{"model": {"a": 1}, "pad": "%s"}' % BIG.encode(), "must be a string"),
        (b'{"model": "\xff"}', "not "),
        (b'{"a": "%s' % BIG.encode(), "not JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_what_cannot_be_read_is_said(body: bytes, says: str) -> None:
    with pytest.raises(NotUnderstood, match=says):
        openai.read(body)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["model"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["model", "stream", "a", '"', "\\"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(
    st.dictionaries(st.text(max_size=8), values, max_size=6),
    st.none() | st.text(max_size=10),
    st.booleans(),
    st.permutations(["model", "stream", "pad"]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_scanning_agrees_with_parsing(
    rest: dict[str, object], model: str | None, stream: bool, order: list[str], ascii_only: bool
) -> None:
    known = {"model": model, "stream": stream, "pad": BIG}
    content = {order[0]: known[order[0]]} | rest | {name: known[name] for name in order}
    body = json.dumps(content, ensure_ascii=ascii_only).encode()
    assert openai.read(body) == Wish(model or None, stream=stream)


@given(st.dictionaries(st.sampled_from(["a", "stream", "messages"]), values, max_size=3))
def test_a_body_that_names_no_model_gets_one_and_stays_the_same(rest: dict[str, object]) -> None:
    body = json.dumps(rest, indent=1).encode()
    named = openai.with_model(body, 'the "one"')
    assert json.loads(named) == rest | {"model": 'the "one"'}


@pytest.mark.parametrize(
    "value", [b'"' + b"a" * 9_000_000 + b'"', b"[" + b"[]," * 1_000_000 + b"[]]"]
)
@pytest.mark.parametrize("key", ["model", "stream"])
def test_a_value_of_megabytes_is_not_built(key: str, value: bytes) -> None:
    body = b'{"%s":%s}' % (key.encode(), value)
    tracemalloc.start()
    try:
        if key == "model":
            with pytest.raises(NotUnderstood, match="at most 1024 bytes"):
                openai.read(body)
        else:
            assert not openai.read(body).stream
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()


def test_ten_megabytes_do_not_stop_the_loop() -> None:
    image = "iVBORw0KGgo/+" * 800_000
    body = json.dumps({"messages": [{"content": image}], "model": "right"}).encode()
    best = min(_seconds(body) for _ in range(5))
    parsed = min(_seconds(body, parse=True) for _ in range(5))
    assert best < parsed / 2


MIB = 1 << 20


@pytest.mark.parametrize(
    "middle",
    [
        b"[" + b"1," * (4 * MIB) + b"1]",
        b" " * (8 * MIB) + b"1",
        b'"' + b"\\\\" * (4 * MIB) + b'"',
        b'"' + b'\\"' * (4 * MIB) + b'"',
        b"[" + b"[1]," * (2 * MIB) + b"1]",
        b'["' + b'","' * (2 * MIB) + b'"]',
        b"[" + (b" " * 4000 + b'"",') * 2000 + b"1]",
    ],
    ids=["numbers", "spaces", "backslashes", "escaped quotes", "lists", "strings", "gaps"],
)
def test_no_body_makes_the_scanner_much_slower_than_a_parser(middle: bytes) -> None:
    body = b'{"a":%s,"model":"right"}' % middle
    best = min(_seconds(body) for _ in range(3))
    parsed = min(_seconds(body, parse=True) for _ in range(3))
    assert best < parsed * 2 + 0.02


def _seconds(body: bytes, *, parse: bool = False) -> float:
    began = time.perf_counter()
    found = openai._wish(openai._parse(body)) if parse else openai.read(body)
    assert found.model == "right"
    return time.perf_counter() - began


KEYS = [
    '"model"', '"stream"', '"mod\\u0065l"', '"\\u006dodel"', '"store"', '"a"', '"\\"model"',
    '"previous_response_id"', '"background"', '"model "', '"Model"', '"x\\\\"',
]  # fmt: skip
VALUES = [
    '"one"', '"t\\u0077o"', '"\\u00fc\\n"', "null", '""', "true", "1", "0.5e3", "[]", "{}", '"}"',
    '"\\\\"', '"\\\\\\""', '{"model":"no"}', '["model","no"]', '"\\"model\\":\\"no\\""', "-0",
    '[{"model":[{"model":"no"}]}]', '"yes"',
]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS),
            st.sampled_from(VALUES),
            st.sampled_from(["", " ", "\n\t", " " * 300]),
        ),
        max_size=8,
    ),
    st.integers(0, 8),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_body_is_read_as_json_reads_it(
    members: list[tuple[str, str, str]], at: int, big: bool
) -> None:
    """Escaped and repeated keys, any spacing, small (parsed) and big (scanned)."""
    told = [f"{gap}{key}{gap}:{gap}{value}{gap}" for key, value, gap in members]
    told.insert(at, '"pad":"%s"' % (BIG if big else ""))
    body = ("{" + ",".join(told) + "}").encode()
    meant = json.loads(body)
    model = meant.get("model")
    if model is not None and not isinstance(model, str):
        with pytest.raises(NotUnderstood):
            openai.read(body)
        return
    wish = openai.read(body)
    assert wish.model == (model or None)
    assert wish.stream is openai.is_yes(meant.get("stream"))
    previous = meant.get("previous_response_id")
    assert wish.previous == (previous if isinstance(previous, str) else None)
    keeps = meant.get("store") is True or bool(meant.get("background"))
    assert wish.stores is (keeps or previous is not None)
    assert json.loads(openai.with_model(body, "other")) == meant | {"model": "other"}


numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abcd"), plain, max_size=4)


def added(to: object, what: object) -> object:
    if to is None:
        return what
    if isinstance(to, dict) and isinstance(what, dict):
        return to | {key: added(to.get(key), value) for key, value in what.items()}
    return to


def put(to: object, what: object) -> object:
    if not isinstance(what, dict):
        return what
    merged = dict(to) if isinstance(to, dict) else {}
    for key, value in what.items():
        merged[key] = put(merged.get(key), value)
        if value is None:
            del merged[key]
    return merged


@given(objects, objects, objects)
@settings(max_examples=150, deadline=None)
def test_settings_are_merged_as_they_are_written(
    body: dict[str, object], defaults: dict[str, object], overrides: dict[str, object]
) -> None:
    sent = adjusted(json.dumps(body).encode(), Adjustment(defaults, overrides))
    assert json.loads(sent) == put(added(body, defaults), overrides)

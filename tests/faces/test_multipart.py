"""Which model a form names: what python-multipart reads, which is vLLM's reader of forms."""

from __future__ import annotations

import time
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from homegptd.faces import multipart
from homegptd.faces.openai import NotUnderstood

KIND = "multipart/form-data; boundary=XX"


def part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return b"--XX\r\n" + head.encode() + value + b"\r\n"


AUDIO = part("file", b"\x00\r\n--X\r\n\xff" * 1000, '; filename="a.wav"')
MODEL = part("model", b"right")
END = b"--XX--\r\n"


def theirs(content_type: str, body: bytes) -> list[tuple[str, bytes, bool]]:
    """Fields as Starlette collects them from python-multipart's callbacks."""
    boundary = parse_options_header(content_type)[1][b"boundary"]
    parts: list[list[Any]] = []
    header: list[bytes] = [b"", b""]

    def headers_end() -> None:
        if header[0].lower() == b"content-disposition":
            parts[-1][1] = header[1]
        header[:] = b"", b""

    def add(place: int) -> Any:
        def take(data: bytes, start: int, end: int) -> None:
            header[place] += data[start:end]

        return take

    def data(piece: bytes, start: int, end: int) -> None:
        parts[-1][0] += piece[start:end]

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": lambda: parts.append([b"", b""]),
            "on_part_data": data,
            "on_header_field": add(0),
            "on_header_value": add(1),
            "on_header_end": headers_end,
        },
    )
    parser.write(body)
    parser.finalize()
    read = [(parse_options_header(head)[1], value) for value, head in parts]
    return [(o[b"name"].decode(), value, b"filename" in o) for o, value in read]


@pytest.mark.parametrize("order", [(AUDIO, MODEL), (MODEL, AUDIO)], ids=["after", "before"])
def test_the_model_is_found_before_and_after_the_file(order: tuple[bytes, ...]) -> None:
    form = multipart.read(KIND, b"".join(order) + END)
    assert (form.model, form.stream) == ("right", False)


def test_a_model_inside_the_file_is_none() -> None:
    inside = part("file", MODEL[2:] + b"--XY\r\n", '; filename="a"')
    assert multipart.read(KIND, inside + part("stream", b"True") + END).model is None
    assert multipart.read(KIND, inside + part("stream", b"True") + END).stream


def test_the_last_of_two_models_counts() -> None:
    body = part("model", b"wrong") + AUDIO + MODEL + END
    assert multipart.read(KIND, body).model == "right"


def test_an_empty_model_is_none_and_one_gets_in_its_place() -> None:
    for fields in (b"", part("model", b""), MODEL):
        body = AUDIO + fields + part("language", b"de") + END
        named = multipart.with_model(body, multipart.read(KIND, body), "other")
        assert multipart.read(KIND, named).model == "other"
        assert ("language", b"de", False) in theirs(KIND, named)
        assert theirs(KIND, named)[-1][0] == "language"


def test_defaults_give_way_and_overrides_do_not() -> None:
    body = AUDIO + part("language", b"de") + part("temperature", b"1") + END
    form = multipart.read(KIND, body)
    named = multipart.with_fields(
        body, form, {"language": "en", "prompt": "x"}, {"temperature": 0.2, "stream": True, "a": {}}
    )
    last = {name: value for name, value, _ in theirs(KIND, named)}
    assert last["language"] == b"de"
    assert last["prompt"] == b"x"
    assert (last["temperature"], last["stream"]) == (b"0.2", b"true")
    assert "a" not in last


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", MODEL + END),
        ("multipart/form-data; boundary=", MODEL + END),
        (KIND + "; boundary=YY", MODEL + END),
        (KIND + "; charset=utf-16", MODEL + END),
        (KIND, b""),
        (KIND, MODEL),
        (KIND, b"preamble\r\n" + MODEL + END),
        (KIND, b"\r\npreamble" + MODEL + END),
        (KIND, MODEL.replace(b"--XX\r\n", b"--XX \r\n") + END),
        (KIND, MODEL.replace(b"\r\n", b"\n") + END),
        (KIND, b"--XX\r\n\r\nright\r\n" + END),
        (KIND, b"--XX\r\nContent-Type: text/plain\r\n\r\nright\r\n" + END),
        (KIND, part("model", b"right", '; filename="x"') + END),
        (KIND, part("model", b"right", "; filename*=utf-8''x") + END),
        (KIND, part("model", b"right", '; name="other"') + END),
        (KIND, part("model", b"right", "; name*=utf-8''other") + END),
        (KIND, part("mod\\el", b"right") + END),
        (KIND, part("model", b"\xff") + END),
        (KIND, part("model", b"x" * 2000) + END),
        (KIND, MODEL.replace(b"form-data", b"attachment") + END),
        (KIND, MODEL.replace(b"Content-Disposition", b"Content Disposition") + END),
        (KIND, MODEL.replace(b"right", b"a\r\n--XXQ\r\nb") + END),
        (KIND, MODEL * 1001 + END),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(NotUnderstood):
        multipart.read(kind, body)


def test_a_form_of_pythons_email_is_read() -> None:
    message = EmailMessage()
    message["Content-Type"] = KIND
    text = message.get_param("boundary")
    assert text == "XX"
    assert multipart.read('multipart/form-data; boundary="XX"', MODEL + END).model == "right"
    assert multipart.read("Multipart/Form-Data; Boundary=XX", MODEL + END).model == "right"


def test_a_big_file_costs_little() -> None:
    body = part("file", b"\r\n-x" * 10_000_000, '; filename="a"') + MODEL + END
    began = time.perf_counter()
    assert multipart.read(KIND, body).model == "right"
    assert time.perf_counter() - began < 0.5


PIECES = [
    b"--XX", b"\r\n", b"--", b"\r", b"\n", b"--XX--", b" ", b":", b"\r\n--XX\r\n", b"\r\n\r\n",
    b'Content-Disposition: form-data; name="model"', b"; filename=x", b"; filename*=x", b'"',
    b'content-disposition: form-data; name="a"', b"right", b"wrong", b"X-Y: z", b"\\", b"; name=b",
    b'Content-Disposition: form-data; name="stream"', b"true", b"; name*=utf-8''model", b"-",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25))
@example([b"--XX\r\n", PIECES[10], b"\r\n\r\n", b"a\r\n--XX", b" ", b"\r\n--XX--"])
@settings(max_examples=1500, deadline=None)
def test_what_is_read_is_what_vllm_reads(pieces: list[bytes]) -> None:
    body = b"--XX\r\n" + PIECES[10] + b"\r\n\r\n" + b"".join(pieces) + b"\r\n--XX--\r\n"
    agree(body)


@given(st.lists(st.sampled_from(PIECES), max_size=20))
@settings(max_examples=500, deadline=None)
def test_what_is_read_of_garbage_is_what_vllm_reads(pieces: list[bytes]) -> None:
    agree(b"".join(pieces))


def agree(body: bytes) -> None:
    try:
        form = multipart.read(KIND, body)
    except NotUnderstood:
        return
    try:
        fields = theirs(KIND, body)
    except (FormParserError, KeyError):
        return  # the engine refuses it
    named = [value.decode() for name, value, is_file in fields if name == "model" and not is_file]
    assert form.model == ((named or [""])[-1] or None)

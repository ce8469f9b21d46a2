"""What a model says after a wake, compared with what it said before."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from homegptd.adapters.faults import Garbled
from homegptd.adapters.vllm_canary import TOKENS, TOKENS_KEPT, Canary, Kind
from homegptd.adapters.vllm_wire import Wire

SAID = "\N{BLACK HEART SUIT}, blue as the sea"


@asynccontextmanager
async def model(path: Path, says: Callable[[int], str]) -> AsyncIterator[Canary]:
    """A server whose model gives `says(max_tokens)`, and no log probabilities."""

    async def complete(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"choices": [{"text": says(asked["max_tokens"])}]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        yield Canary(Wire(path), "coder", Kind.GENERATE)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("short", ["", "\N{REPLACEMENT CHARACTER}"])
async def test_a_short_text_that_ends_in_half_a_character_is_asked_for_in_full(
    tmp_path: Path, short: str
) -> None:
    async with model(tmp_path / "s", lambda n: SAID if n == TOKENS else short) as canary:
        await canary.confirm(SAID, deadline_s=2, tokens=TOKENS_KEPT)


async def test_a_short_text_that_agrees_is_enough(tmp_path: Path) -> None:
    asked = []
    async with model(tmp_path / "s", lambda n: asked.append(n) or SAID[:n]) as canary:
        await canary.confirm(SAID, deadline_s=2, tokens=TOKENS_KEPT)
    assert asked == [TOKENS_KEPT]


async def test_other_words_are_garbage_however_few_were_asked_for(tmp_path: Path) -> None:
    async with model(tmp_path / "s", lambda n: "xyzzy"[:n]) as canary:
        with pytest.raises(Garbled, match="now says 'xyzzy'"):
            await canary.confirm(SAID, deadline_s=2, tokens=TOKENS_KEPT)

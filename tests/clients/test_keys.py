"""What the SDKs make of keys: a wrong one, none that may, and one that is good."""

from pathlib import Path

import anthropic
import openai
import pytest

from homegptd.host.keys import Wish, add
from tests.e2e.harness import Box, SimModel

ASK = [{"role": "user", "content": "Hi"}]


async def test_a_wrong_key_is_an_authentication_error_and_not_retried(
    box: Box, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    good = add(file, Wish("mine", ("a",)))
    box.write(SimModel("a", "active"), SimModel("b"), head=f"http: {{keys: '{file}'}}\n")
    url = f"http://127.0.0.1:{box.port}"
    with box.daemon() as daemon:
        daemon.ready()
        for key in ("sk-wrong", good):
            async with (
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as chat,
                anthropic.AsyncAnthropic(base_url=url, api_key=key) as claude,
            ):
                if key == good:
                    await chat.chat.completions.create(model="a", messages=ASK, max_tokens=2)
                    await claude.messages.create(model="a", messages=ASK, max_tokens=2)
                    with pytest.raises(openai.NotFoundError):  # a key sees its models alone
                        await chat.chat.completions.create(model="b", messages=ASK)
                    continue
                with pytest.raises(openai.AuthenticationError, match="not known here"):
                    await chat.chat.completions.create(model="a", messages=ASK)
                with pytest.raises(anthropic.AuthenticationError, match="not known here"):
                    await claude.messages.create(model="a", messages=ASK, max_tokens=2)

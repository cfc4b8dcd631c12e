"""The official SDKs make a proper exception of a stream that ended with hive's error event."""

from typing import Any

import anthropic
import openai
import pytest

from steps.driver import Hive

SAY: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def dying(hive: Hive) -> Hive:
    """An engine that dies after five tokens of every stream but answers its probe."""
    hive.model("m", "--good-requests", "1", "--die-after", "5", "--die-how", "sigkill")
    hive.start()
    return hive


def test_openai_raises_with_the_code(dying: Hive) -> None:
    texts: list[str | None] = []
    with openai.OpenAI(base_url=f"{dying.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="m", messages=SAY, max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="process ended") as caught:
            texts.extend(event.choices[0].delta.content for event in stream)
    assert caught.value.code == "WORKER_CRASHED"
    assert "".join(text or "" for text in texts) == "t0 t1 t2 t3 t4 "


def test_anthropic_raises_with_the_code(dying: Hive) -> None:
    with (
        anthropic.Anthropic(base_url=dying.url, api_key="x", max_retries=0) as client,
        client.messages.stream(model="m", messages=SAY, max_tokens=50) as stream,
        pytest.raises(anthropic.APIStatusError, match="process ended") as caught,
    ):
        stream.until_done()
    body: Any = caught.value.body
    assert body["error"]["code"] == "WORKER_CRASHED"

"""The double's tokenizer: a word is a token, so an answer that is sent back continues its prompt."""

import json
import zlib

from tests.doubles.engine.asks import Json, Refused

END = "</s>"


def text_ids(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) & 0x7FFFFFFF for word in text.split()]


def chat_ids(body: Json, messages: list[object]) -> list[int]:
    """A conversation in the double's chat template, and the begin of the answer to it."""
    said: list[str] = []
    for message in messages:
        if isinstance(message, dict):
            calls = message.get("tool_calls")
            told = (_content(message.get("content")), json.dumps(calls) if calls else "")
            said += [f"<{message.get('role')}>", *told, END]
    if body.get("add_generation_prompt", True):
        said.append("<assistant>")
    return text_ids(" ".join(said))


def prompt_ids(prompt: object) -> list[list[int]]:
    """Of every prompt of a completion: a text, its ids, or a list of either."""
    if isinstance(prompt, str):
        return [text_ids(prompt)]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return list(map(_one_prompt, prompt if isinstance(prompt, list) and several else [prompt]))


def _one_prompt(prompt: object) -> list[int]:
    if isinstance(prompt, str):
        return text_ids(prompt)
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return prompt
    raise Refused(400, "prompt: Input should be a valid string or list", "prompt")


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(map(_content, content))
    if not isinstance(content, dict):
        return ""
    if content.get("type") == "tool_use":
        return json.dumps(content)
    return _content(content.get("text") or content.get("content"))

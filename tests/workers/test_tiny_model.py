"""The tiny model, made and asked by the engine environment's own libraries."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hive.workers import environment

SCRIPT = Path(environment.__file__).with_name("tiny_model.py")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
ASK = """
import json, runpy, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
where, again, other, script = sys.argv[1:]
for directory, seed in ((again, "0"), (other, "1")):
    sys.argv = [script, directory, seed]
    runpy.run_path(script, run_name="__main__")
words = AutoTokenizer.from_pretrained(where)
model = AutoModelForCausalLM.from_pretrained(where)
user, system = ({"role": r, "content": c} for r, c in (("user", "Hi."), ("system", "Be brief.")))
tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
call = {"role": "assistant", "content": None, "tool_calls": [called]}
answer = {"role": "tool", "content": "2"}

def rendered(messages, **more):
    return words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)

def said(text):
    asked = words(text, return_tensors="pt")
    out = model.generate(**asked, do_sample=False, min_new_tokens=24, max_new_tokens=24)
    return out[0, asked.input_ids.shape[1] :].tolist()

text = 'héllo ☃ <tool_call>{"name": "add"}</tool_call>'
print(json.dumps({
    "config": AutoConfig.from_pretrained(where).to_dict(),
    "vocabulary": len(words),
    "parameters": model.num_parameters(),
    "chat": rendered([system, user]),
    "tools": rendered([system, user], tools=[tool]),
    "called": rendered([user, call, answer], tools=[tool]),
    "round_trip": words.decode(words(text + "<|im_end|>").input_ids, skip_special_tokens=True) == text,
    "one": said(rendered([user])),
    "again": said(rendered([user])),
    "other": said("x" + rendered([user])),
}))
"""


@pytest.fixture(scope="module")
def engine_python() -> Path:
    python = environment.managed_python()
    if python is None:
        pytest.skip("no managed engine environment: run 'hive engine install cpu'")
    return python


@pytest.fixture(scope="module")
def models(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are: `first` and `again` of seed 0, `other` of seed 1."""
    directory = tmp_path_factory.mktemp("models")
    command = (str(engine_python), "-P", str(SCRIPT), str(directory / "first"), "0")
    subprocess.run(command, env=OFFLINE, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def told(engine_python: Path, models: Path) -> dict[str, Any]:
    """What transformers says about the model, asked once since importing it takes seconds."""
    paths = (str(models / name) for name in ("first", "again", "other"))
    command = (str(engine_python), "-c", ASK, *paths, str(SCRIPT))
    asked = subprocess.run(command, env=OFFLINE, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    return answer


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


@pytest.mark.usefixtures("told")
def test_the_same_seed_makes_the_same_bytes(models: Path) -> None:
    assert digests(models / "again") == digests(models / "first")


@pytest.mark.usefixtures("told")
def test_another_seed_makes_other_weights_and_the_same_words(models: Path) -> None:
    first, other = digests(models / "first"), digests(models / "other")

    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_it_has_the_shape_that_is_promised(told: dict[str, Any]) -> None:
    expected = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 16_384,
    }

    assert told["config"].items() >= expected.items()
    assert told["vocabulary"] == 512
    assert told["parameters"] == 2_623_744


def test_any_text_survives_the_tokenizer(told: dict[str, Any]) -> None:
    assert told["round_trip"]


def test_greedy_answers_repeat_and_depend_on_the_whole_prompt(told: dict[str, Any]) -> None:
    assert told["one"] == told["again"]
    assert told["one"] != told["other"]
    assert len(set(told["one"])) > 12


def test_the_chat_template_names_each_speaker(told: dict[str, Any]) -> None:
    assert told["chat"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_chat_template_shows_tools_calls_and_their_answers(told: dict[str, Any]) -> None:
    assert told["tools"].startswith("<|im_start|>system\nBe brief.\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in told["tools"]
    assert told["called"].endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )

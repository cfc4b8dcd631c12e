"""Write the tiny model: a complete Llama with random weights, for trying engines without a download.

Run by the Python of an engine environment, never imported by hive: `python tiny_model.py DIR SEED`.
The answers are noise, but the same noise each time, so two runs can be compared token by token.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import (  # type: ignore[import-not-found]
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import (  # type: ignore[import-not-found]
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

VOCABULARY = 512
POSITIONS = 16_384
PAD, BEGIN, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# Not special: a tool-call parser looks for them in the text of the answer.
CALL, CALL_END = "<tool_call>", "</tool_call>"
# The usual 0.02 soon repeats a few tokens; with this the answer depends on the whole prompt.
WEIGHTS_STD = 0.1

# Enough words, often enough, for a vocabulary of 512; what chat and tools say is among them.
TEXT = """
The daemon owns its engines: it starts them, watches over them, and ends them when it ends.
A worker is one engine process tree on its devices. A slot is room for one running request, and
a window is a conversation that was put aside and can be taken up again later, from where it was.
When every slot is taken, a request waits in the queue for a short while, or is refused at once
with a reason and a hint when to come back. Nothing is retried on another device behind your back.
You are a helpful assistant. Answer the question of the user in a few short words, please.
What is the capital of France? Paris is the capital of France. Tell me a story about a bee, a
flower and the summer sun. Once upon a time there was a small bee that lived in a hive by the sea.
One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve. Write a poem. Count.
def add(left, right): return left + right   # the sum of two numbers, for example 12 and 30
You may call one or more functions to help with the question of the user. The functions that you
may call are listed within <tools></tools>. For each function call return a JSON object with the
name of the function and its arguments: {"name": "get_weather", "arguments": {"city": "Paris"}}
{"type": "function", "function": {"name": "search", "description": "Search the documents for a
text", "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "limit":
{"type": "integer"}}, "required": ["query"]}}} <tool_response> system user assistant tool
0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90 100 1000 2024 2025 2026 Monday Tuesday Sunday
"""

# ChatML; tools and calls as the Hermes format has them.
CHAT_TEMPLATE = """\
{%- macro begin(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro -%}
{%- set first = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- if tools -%}
{{ begin('system') }}
{%- if first %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
{{ 'You may call one or more functions to help with the question of the user.\\n' -}}
{{- 'The functions that you may call are listed within <tools></tools>:\\n<tools>\\n' -}}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor -%}
{{ '</tools>\\nFor each function call return a JSON object with the name of the function and its ' -}}
{{- 'arguments within <tool_call></tool_call>:\\n<tool_call>\\n' -}}
{{- '{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call><|im_end|>\\n' -}}
{%- elif first -%}
{{ begin('system') + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages[first:] -%}
{%- if message.role == 'tool' -%}
{{ begin('user') + '<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else -%}
{{ begin(message.role) + (message.content or '') }}
{%- for call in message.tool_calls or [] -%}
{%- set called = call.function or call -%}
{%- set arguments = called.arguments -%}
{{ '\\n' if message.content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": "' + called.name + '", "arguments": ' -}}
{{- (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ begin('assistant') }}{% endif -%}
"""


def tokenizer() -> Any:
    """A byte-level BPE tokenizer: any text has tokens, and any token has text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    calls = [AddedToken(text, special=False, normalized=False) for text in (CALL, CALL_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(calls),
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    trained.add_tokens(calls)
    if trained.get_vocab_size() != VOCABULARY:
        sys.exit(f"the text gave {trained.get_vocab_size()} tokens instead of {VOCABULARY}")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def model(seed: int, ids: dict[str, int]) -> Any:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        initializer_range=WEIGHTS_STD,
        **ids,
    )
    made = LlamaForCausalLM(config).bfloat16().eval()
    # No sampling values: those of the request hold, and the engine's own where it has none.
    made.generation_config = GenerationConfig(**ids)
    return made


def main() -> None:
    directory, seed = Path(sys.argv[1]), int(sys.argv[2])
    words = tokenizer()
    made = model(
        seed,
        {
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
    )
    words.save_pretrained(directory)
    made.save_pretrained(directory)
    sys.stdout.write(json.dumps({"parameters": made.num_parameters(), "tokens": len(words)}) + "\n")


if __name__ == "__main__":
    main()

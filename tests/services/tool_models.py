"""Tiny models with random weights whose chat templates have tools."""

import json
from dataclasses import replace
from pathlib import Path

from services.versions.store import ModelFiles
from stages.common.chat.tools_template import adapt_template
from stages.common.gguf.model import write_gguf
from stages.common.gguf.vocabulary import read_vocabulary
from stages.common.model.loading import load_base, load_tokenizer
from tests.services.serving import tiny_files
from tests.tiny import save_model

LAMP = {
    "type": "object",
    "properties": {
        "room": {"enum": ["kitchen", "hall"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["room", "level"],
}
HEAT = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}


def make_tool(name: str, parameters: dict | None = None) -> dict:
    """Return a tool as a request has it."""
    function = {"name": name, "description": f"the {name}", "parameters": parameters}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


TOOLS = [make_tool("lamp", LAMP), make_tool("heat", HEAT), make_tool("stop")]


def tool_files(
    folder: Path, template: str | None = None, max_position_embeddings: int = 4096, **about
) -> ModelFiles:
    """Save a tiny model that knows tools, with its GGUF file.

    Args:
        template: its chat template; None for the default notation of tools before its own template.
    """
    import torch

    files = tiny_files(folder, **about)
    merges = (("a", "b"), ("t", "h"))  # GGUF holds no vocabulary without merges
    shape = {"initializer_range": 0.5, "max_position_embeddings": max_position_embeddings}
    save_model(folder, merges=merges, tie_word_embeddings=False, **shape)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template or adapt_template(tokenizer, {}, True, "default")
    tokenizer.save_pretrained(folder)
    model = load_base(folder, torch.float32, torch.device("cpu"))
    vocabulary = read_vocabulary(load_tokenizer(folder), model.config.vocab_size)
    write_gguf(folder / "model.gguf", model, vocabulary, "f16", "tiny")
    return replace(files, gguf=folder / "model.gguf")


def find_call_fault(call: dict, tools: list[dict]) -> str | None:
    """Return what is wrong with a call of a response, or None."""
    import jsonschema

    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if call["type"] != "function" or not call["id"].startswith("call_"):
        return "no id or another type"
    if call["function"]["name"] not in schemas:
        return "an unknown tool"
    arguments = json.loads(call["function"]["arguments"])
    validator = jsonschema.Draft202012Validator(schemas[call["function"]["name"]])
    return None if isinstance(arguments, dict) and validator.is_valid(arguments) else "malformed arguments"

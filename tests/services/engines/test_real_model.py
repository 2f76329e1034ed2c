"""The engines over the pipeline's own model, where it has been made."""

import asyncio
from pathlib import Path

import pytest

from services.engines.openvino import OpenvinoEngine
from services.engines.protocol import Sampling
from services.engines.transformers import TransformersEngine
from stages.common.chat.template import encode_prompt
from stages.common.messages import Message
from stages.common.model.loading import load_tokenizer
from tests.services.engines.test_contract import answer

ARTIFACTS = Path(__file__).parents[3] / "artifacts"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ARTIFACTS / "export" / "model.gguf").exists(), reason="the pipeline has made no model here"
    ),
]


def test_both_engines_write_the_same_answers():
    export = ARTIFACTS / "export"
    tokenizer = load_tokenizer(export)
    questions = (
        "turn on the kitchen light",
        "close the blinds in the attic",
        "what time is it?",
        "dim the hall",
    )
    prompts = [encode_prompt(tokenizer, [Message("user", text)]) for text in questions]
    settings = {"precision": "float32", "context_tokens": 512}
    engines = [
        OpenvinoEngine(
            export / "model.gguf", export / "config.json", tokenizer, kv_cache_mib=256, **settings
        ),
        TransformersEngine(
            ARTIFACTS / "fetch_base", ARTIFACTS / "finetune", tokenizer, device="cpu", **settings
        ),
    ]

    async def ask(engine):
        return await asyncio.gather(*(answer(engine, prompt, Sampling(32)) for prompt in prompts))

    first, second = (asyncio.run(ask(engine)) for engine in engines)
    for engine in engines:
        engine.close()
    assert first == second

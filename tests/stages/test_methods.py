"""Each method from preflight to the engines and the model store, on a tiny random model."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from flows.registry.verify_adapter import compare
from services.engines.offline import ModelFolders, answer_limit, ask_model
from services.engines.transformers import TransformersEngine
from services.versions.store import add_pipeline_output, get_version
from stages import ask_base
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.adapter import PREFERENCE_METHODS
from stages.common.model.generation import answer_questions, encode_questions
from stages.common.model.loading import load_base, load_tokenizer, load_tuned
from stages.common.records import make_row, read_rows, write_rows
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from stages.preflight import __main__ as preflight
from tests.stages.families import write_project
from tests.stages.test_families import PROMPT, generate, numbered

METHODS = {
    "rslora": {},
    "dora": {},
    "full": {"finetune__learning_rate": 0.001},
    "partial": {"finetune__learning_rate": 0.001, "finetune__trained_modules": ["layers.1", "embed_tokens"]},
    "dpo": {},
    "orpo": {},
    "kto": {},
}


def with_pairs(make_numbered):
    """Return a maker of the same rows with a worse answer."""

    def make(n):
        row = make_numbered(n)
        return make_row(row.messages, row.source, row.license, rejected=Message("assistant", f"no {n}"))

    return make


async def ask(base, adapter):
    """Return the tokens that the engine which runs everywhere writes."""
    from services.engines.protocol import Sampling

    engine = TransformersEngine(base, adapter, load_tokenizer(base), device="cpu", precision="float32")
    try:
        return [t async for step in engine.generate(PROMPT, Sampling(12)) for t in step.token_ids]
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_trained_judged_exported_stored_and_served(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    compares = method in PREFERENCE_METHODS
    make = with_pairs(numbered("llama")) if compares else numbered("llama")
    write_project("llama", make, finetune__method=method, **METHODS[method])
    write_rows(Path("artifacts/split/refused.parquet"), [])
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    counted = json.loads(Path("reports/preflight/metrics.json").read_text())["training"]
    trained = json.loads(Path("reports/finetune/metrics.json").read_text())
    assert counted["trained_parameters"] == trained["trained_parameters"]
    assert json.loads(Path("reports/evaluate/metrics.json").read_text())["rows"] == 8

    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    stored = get_version(add_pipeline_output())
    assert asyncio.run(ask(stored.base, stored.adapter)) == generate()

    tokenizer = load_tokenizer(base)
    questions = encode_questions(tokenizer, read_rows(Path("artifacts/split/test.parquet")))
    gguf = Path("artifacts/export/model.gguf")
    limit = answer_limit(questions, 16)
    paged = ask_model(ModelFolders(base, gguf=gguf), "paged", tokenizer, questions, 8, limit, "float32")
    model = load_tuned(base, adapter, torch.float32, torch.device("cpu"))
    for weights in model.parameters():
        if weights.dim() > 1:  # as the file has them: random models have answers that depend on a digit
            weights.data = weights.data.half().float()
    answers = answer_questions(model, tokenizer, questions, 8, limit)
    assert [answer.text for answer in paged.answers] == [answer.text for answer in answers]

    assert compare(base, stored.adapter, adapter, [PROMPT]) > 0
    file = next(adapter.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8] + b"\x00\x00\x00\x40" * 2)
    with pytest.raises(InputError, match="the logits of 1 of 1 prompts differ"):
        compare(base, stored.adapter, adapter, [PROMPT])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "changed"),
    [("gemma3", "full", 80), ("gpt2", "partial", 12), ("gpt-neox", "dora", 8)],
)
def test_a_method_trains_the_text_part_of_other_architectures(tmp_path, monkeypatch, family, method, changed):
    monkeypatch.chdir(tmp_path)
    settings = {"finetune__method": method, "finetune__trained_modules": 1, "finetune__learning_rate": 1e-3}
    write_project(family, numbered(family), export__gguf=False, **settings)
    preflight.main()
    finetune.main()
    counted = json.loads(Path("reports/preflight/metrics.json").read_text())["training"]
    trained = json.loads(Path("reports/finetune/metrics.json").read_text())
    assert counted["trained_parameters"] == trained["trained_parameters"]
    base, cpu = Path("artifacts/fetch_base"), torch.device("cpu")
    before = dict(load_base(base, torch.float32, cpu).named_parameters())
    tuned = load_tuned(base, Path("artifacts/finetune"), torch.float32, cpu)
    names = [name for name, weights in tuned.named_parameters() if not torch.equal(weights, before[name])]
    assert len(names) == changed
    assert not [name for name in names if "vision" in name]

"""Model families from preflight to the engine: they work to the end, or are refused before training."""

import asyncio
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from services.engines.openvino import OpenvinoEngine
from services.engines.paged.engine import PagedEngine
from services.engines.protocol import Sampling
from services.engines.support import check_engine
from services.engines.transformers import TransformersEngine
from stages import ask_base
from stages.common.chat.template import end_of_turn_ids
from stages.common.errors import InputError
from stages.common.model.loading import load_tokenizer, load_tuned
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from stages.finetune.adapter import build_model
from stages.finetune.recipe import Recipe
from stages.preflight import __main__ as preflight
from stages.preflight.base_checks import find_engine_problems
from tests.stages.families import KNOWN, ROOT, make_base, row, takes_system, write_project


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def numbered(family):
    system = "Answer." if takes_system(family) else None
    return lambda n: row(f"question {n}", f'{{"n":{n % 5}}}', system)


PROMPT = [3, 4, 5, 6, 7, 8]
SCHEMA = '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'


def load_engine(kind):
    """Load what was trained into an engine, computing in float32."""
    base, adapter, exported = (Path(f"artifacts/{name}") for name in ("fetch_base", "finetune", "export"))
    tokenizer = load_tokenizer(base)
    if kind == "transformers":
        return TransformersEngine(base, adapter, tokenizer, device="cpu", precision="float32")
    common = {"kv_cache_mib": 16, "threads": 1, "precision": "float32"}
    if kind == "openvino":
        return OpenvinoEngine(exported / "model.gguf", exported / "config.json", tokenizer, **common)
    return PagedEngine(exported / "model.gguf", tokenizer, **common)


async def ask(engine, **sampling):
    """Return the tokens that an engine writes."""
    return [t async for step in engine.generate(PROMPT, Sampling(12, **sampling)) for t in step.token_ids]


def generate():
    """Return what transformers' own `generate` writes with base and adapter."""
    import torch

    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    model = load_tuned(base, adapter, torch.float32, torch.device("cpu"))
    ends = end_of_turn_ids(load_tokenizer(base))
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=ends)
    return [token for token in out[0, len(PROMPT) :].tolist() if token not in ends]


SENTENCEPIECE = {"llama": "prefix", "gemma2": "plain", "gemma3-text": "plain", "mistral": "first"}
EVERY_TOKENIZER = [*((family, None) for family in KNOWN), *SENTENCEPIECE.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "blanks"), EVERY_TOKENIZER)
def test_a_family_is_trained_exported_evaluated_and_served(project, family, blanks):
    known = KNOWN[family]
    write_project(family, numbered(family), blanks=blanks, export__gguf=known.gguf, ask_base__engine="auto")
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert report["rows"] == 8
    engine = "paged" if known.paged else "transformers"
    assert report["engine"] == {"base": engine, "tuned": engine}
    assert json.loads(Path("artifacts/export/serving.json").read_text())["context_tokens"] == 512
    assert Path("artifacts/export/model.gguf").exists() == known.gguf
    kinds = {"transformers": True, "paged": known.paged, "openvino": known.openvino and not blanks}
    if known.openvino and blanks:
        told = check_engine("openvino", Path("artifacts/export"), has_gguf=True)
        assert told == "it cannot read GGUF files with a tokenizer of SentencePiece"
    for kind in (kind for kind, computes in kinds.items() if computes):
        engine = load_engine(kind)
        try:
            assert asyncio.run(ask(engine)) == generate(), kind
            number = asyncio.run(ask(engine, json_schema=SCHEMA))
        finally:
            engine.close()
        text = "".join(load_tokenizer(Path("artifacts/export")).decode(number).split())
        assert text and text.startswith('{"n":'[: len(text)]), kind  # a random model may write blanks


@pytest.mark.slow
def test_weights_in_several_files_and_a_tokenizer_without_a_pad_token(project):
    write_project("llama", numbered("llama"), ask_base__engine="auto")
    base = Path("artifacts/fetch_base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(base, max_shard_size="50KB")
    assert len([*base.glob("model-*.safetensors")]) > 2
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    assert json.loads(Path("reports/evaluate/metrics.json").read_text())["rows"] == 8
    engine = load_engine("paged")
    try:
        assert asyncio.run(ask(engine)) == generate()
    finally:
        engine.close()


@pytest.mark.parametrize(("family", "method"), [("gpt2", "prefix_tuning"), ("qwen3-moe", "prompt_tuning")])
def test_virtual_tokens_of_families_whose_shapes_alone_are_not_computed(project, family, method):
    """GPT-2 looks for padding in the ids; torch has no shapes of a mixture's products in float32."""
    settings = {"finetune__method": method, "finetune__learning_rate": 0.1, "finetune__validate_every": None}
    write_project(family, numbered(family), export__gguf=False, **settings)
    preflight.main()
    finetune.main()
    assert json.loads(Path("reports/finetune/metrics.json").read_text())["method"] == method


@pytest.mark.parametrize("family", [name for name, known in KNOWN.items() if not known.gguf])
def test_a_family_without_gguf_is_refused_before_training_unless_no_gguf_is_wanted(project, family):
    write_project(family, numbered(family))
    with pytest.raises(InputError, match=f"'{KNOWN[family].model_type}' has no GGUF export") as error:
        preflight.main()
    assert "export.gguf: false" in error.value.fix


@pytest.mark.parametrize(("family", "known"), KNOWN.items())
def test_vllm_is_refused_for_a_family_of_which_it_has_no_adapters(tmp_path, family, known):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": known.model_type}))
    (*problems,) = find_engine_problems({"services.engine.kind": "vllm"}, tmp_path, exports_gguf=False)
    told = f"services.engine.kind is vllm, and vLLM loads no adapters of the architecture {known.model_type}"
    assert [problem.what for problem in problems] == ([] if known.adapters else [told])


def test_a_model_that_also_reads_pictures_gets_an_adapter_for_its_text_only(tmp_path):
    make_base(tmp_path, "gemma3")
    finetune_params = yaml.safe_load((ROOT / "params.yaml").read_text())["finetune"]
    recipe = Recipe(
        **{key: finetune_params[key] for key in Recipe.__dataclass_fields__ if key in finetune_params}
    )
    trained = [
        name for name, weights in build_model(tmp_path, recipe).named_parameters() if weights.requires_grad
    ]
    assert trained and all("language_model" in name for name in trained)

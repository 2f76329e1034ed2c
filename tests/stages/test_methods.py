"""Each method from preflight to the engines and the model store, on a tiny random model."""

import asyncio
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from flows.gate import private_server
from flows.gate.judge import run_gate
from flows.gate.private_server import PrivateServer
from flows.gate.verdict import read_verdict
from flows.registry.verify_adapter import compare
from services.engines.offline import ModelFolders, answer_limit, ask_model
from services.engines.paged.engine import PagedEngine
from services.engines.select import choose_kind, load_engine
from services.engines.transformers import TransformersEngine
from services.model_pool import LoadedModel
from services.versions.store import add_pipeline_output, get_version
from stages import ask_base
from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError, ParamsError
from stages.common.messages import Message
from stages.common.model.adapter import HEAD, PREFERENCE_METHODS, put_initial_adapter, read_settings
from stages.common.model.generation import answer_questions, encode_questions
from stages.common.model.loading import load_base, load_tokenizer, load_tuned
from stages.common.params.loading import load_params
from stages.common.records import make_row, read_rows, write_rows
from stages.compress import __main__ as compress
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from stages.finetune import __main__ as finetune
from stages.preflight import __main__ as preflight
from tests.services.serving import serving
from tests.stages.families import row, write_project
from tests.stages.test_families import PROMPT, generate, numbered

METHODS = {
    "rslora": {},
    "dora": {},
    "full": {"finetune__learning_rate": 0.001},
    "partial": {"finetune__learning_rate": 0.001, "finetune__trained_modules": ["layers.1", "embed_tokens"]},
    "dpo": {},
    "orpo": {},
    "kto": {},
    "distill": {"finetune__teacher": "artifacts/fetch_base"},
    # Any text that ends is an answer; hot enough, each token of a random model is as likely as another.
    "grpo": {
        "task__kind": "text",
        "task__label_key": None,
        "task__stratify_by": None,
        "finetune__temperature": 10.0,
        "finetune__rewards": {"valid": 1.0, "schema": 0.0, "match": 0.0},
    },
    "qlora": {},
}
# Without weights that a GGUF could hold: transformers judges and serves them.
UNMERGED = {
    "prompt_tuning": {"finetune__learning_rate": 0.1, "finetune__num_virtual_tokens": 5},
    "prefix_tuning": {"finetune__learning_rate": 0.1, "finetune__num_virtual_tokens": 5},
}


def with_pairs(make_numbered):
    """Return a maker of the same rows with a worse answer."""

    def make(n):
        row = make_numbered(n)
        return make_row(row.messages, row.source, row.license, rejected=Message("assistant", f"no {n}"))

    return make


def load_exact(base, adapter):
    """Load a version into the engine which runs everywhere."""
    return TransformersEngine(base, adapter, load_tokenizer(base), device="cpu", precision="float32")


async def ask(base, adapter):
    """Return the tokens that this engine writes."""
    from services.engines.protocol import Sampling

    engine = load_exact(base, adapter)
    try:
        return [t async for step in engine.generate(PROMPT, Sampling(12)) for t in step.token_ids]
    finally:
        engine.close()


def judge_served(tag, monkeypatch):
    """Have the gate judge a first version that the whole service serves, here in a thread of this process."""
    stored, folder = get_version(tag), Path("service")
    folder.mkdir()

    def load(files):
        tokenizer = load_tokenizer(files.tokenizer)
        if files.base is None:  # a compressed model has its GGUF alone
            return LoadedModel(files, tokenizer, PagedEngine(files.gguf, tokenizer, precision="float32"))
        if read_settings(files.adapter)["method"] == HEAD:
            return LoadedModel(files, tokenizer, load_engine(files, tokenizer, load_params().services.engine))
        return LoadedModel(files, tokenizer, load_exact(files.base, files.adapter))

    @contextmanager
    def serve(root, params, candidate, champion):
        with serving(folder, stored, load=load) as server:
            yield PrivateServer(server.url, candidate, champion, os.getpid())

    monkeypatch.setattr(private_server, "serve", serve)
    verdict = run_gate(Path(), load_params(), tag)
    assert read_verdict(Path(), tag) == verdict and verdict.mode == "first"
    return {criterion.name: criterion for criterion in verdict.criteria}


def check_judged(tag, monkeypatch):
    """Check that the gate finds the served answers equal to the trainer's, and judges the gain."""
    judged = judge_served(tag, monkeypatch)
    assert judged.keys() == {"better_than_base", "parity", "card"}
    assert judged["parity"].passed, judged["parity"].summary
    assert "agree on 8 test rows (100.0% equal answers)" in judged["parity"].summary
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    change = report["difference"][report["primary"]]
    assert judged["better_than_base"].value == change["value"]
    assert judged["better_than_base"].passed == (change["low"] > 0)
    assert judged["card"].summary.startswith("reports/model_card/README.md does not exist")


@pytest.mark.slow
def test_a_model_that_was_made_smaller_is_chosen_and_judged_as_it_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    smaller = {"compress__variants": ["pruned"], "compress__choose": "pruned", "compress__kept_channels": 0.5}
    answering = {"ask_base__engine": "paged", "ask_base__dtype": "float32"}
    write_project("llama", numbered("llama"), **answering, **smaller)
    for stage in (preflight, ask_base, finetune, export, compress, evaluate):
        stage.main()
    report = json.loads(Path("reports/compress/metrics.json").read_text())
    assert report["rows"] == 4, "the validation rows, and no test row"
    pruned, whole = (report["models"][name] for name in ("pruned", "exported"))
    assert pruned["channels"] == 32 and pruned["bytes"] < whole["bytes"]
    evaluated = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert (evaluated["compression"], evaluated["rows"]) == ("pruned", 8)
    stored = get_version(add_pipeline_output())
    assert stored.base is None and stored.gguf.stat().st_size == pruned["bytes"]
    check_judged(stored.tag, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_trained_judged_exported_stored_and_served(tmp_path, monkeypatch, method):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    compares = method in PREFERENCE_METHODS
    make = with_pairs(numbered("llama")) if compares else numbered("llama")
    kind = "text" if method == "grpo" else "json"
    settings = {"ask_base__dtype": "float32", "evaluate__min_preference_pairs": 8, **METHODS[method]}
    write_project("llama", make, kind, finetune__method=method, **settings)
    write_rows(Path("artifacts/split/refused.parquet"), [])
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    counted = json.loads(Path("reports/preflight/metrics.json").read_text())["training"]
    trained = json.loads(Path("reports/finetune/metrics.json").read_text())
    assert counted["trained_parameters"] == trained["trained_parameters"]
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert report["rows"] == 8
    assert (report["preferences"]["pairs"] == 8) if compares else (report["preferences"] is None)

    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    stored = get_version(add_pipeline_output())
    assert asyncio.run(ask(stored.base, stored.adapter)) == generate()
    check_judged(stored.tag, monkeypatch)

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
    break_weights(adapter)
    with pytest.raises(InputError, match="the logits of 1 of 1 prompts differ"):
        compare(base, stored.adapter, adapter, [PROMPT])


def break_weights(folder):
    """Change the last two numbers of the weights of an adapter."""
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8] + b"\x00\x00\x00\x40" * 2)


@pytest.mark.parametrize("method", UNMERGED)
def test_a_method_without_a_gguf_is_trained_judged_stored_and_served(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    settings = {"export__gguf": False, "ask_base__dtype": "float32", **UNMERGED[method]}
    write_project("llama", numbered("llama"), finetune__method=method, **settings)
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    counted = json.loads(Path("reports/preflight/metrics.json").read_text())["training"]
    trained = json.loads(Path("reports/finetune/metrics.json").read_text())
    assert counted["trained_parameters"] == trained["trained_parameters"]
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert report["engine"] == {"base": "transformers", "tuned": "transformers"}
    assert json.loads(Path("artifacts/export/serving.json").read_text())["context_tokens"] == 512 - 5

    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    stored = get_version(add_pipeline_output())
    kind = choose_kind("auto", stored.tokenizer, stored.gguf, stored.base, 0, adapter=stored.adapter)
    assert kind == "transformers"
    expected = generate()
    assert asyncio.run(ask(stored.base, stored.adapter)) == expected
    check_judged(stored.tag, monkeypatch)
    assert compare(base, stored.adapter, adapter, [PROMPT]) > 0
    break_weights(adapter)
    with pytest.raises(InputError, match="the logits of 1 of 1 prompts differ"):
        compare(base, stored.adapter, adapter, [PROMPT])


@pytest.mark.parametrize("method", UNMERGED)
def test_engines_that_cannot_hold_virtual_tokens_are_refused_before_any_work(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write_project("llama", numbered("llama"), finetune__method=method)
    with pytest.raises(ParamsError, match=f"finetune.method: {method} has no weights that a GGUF") as error:
        preflight.main()
    assert "set export.gguf: false and services.engine.kind: transformers" in error.value.what
    for kind in ("paged", "openvino"):
        write_project("llama", numbered("llama"), finetune__method=method, export__gguf=False)
        set_engine(kind)
        with pytest.raises(InputError, match=f"services.engine.kind is {kind}, and the model has no GGUF"):
            preflight.main()
    set_engine("vllm")
    with pytest.raises(ParamsError, match=f"{method} makes no adapter that vLLM loads"):
        preflight.main()
    set_engine("transformers")
    preflight.main()


def set_engine(kind):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["services"]["engine"]["kind"] = kind
    Path("params.yaml").write_text(yaml.safe_dump(params))


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


@pytest.mark.parametrize("changes", [{}, {"finetune__validate_every": None, "finetune__epochs": 3}])
def test_a_head_is_trained_judged_stored_and_served_with_labels_as_answers(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    write_label_project(**changes)
    for stage in (preflight, ask_base, finetune, export, evaluate):
        stage.main()
    counted = json.loads(Path("reports/preflight/metrics.json").read_text())["training"]
    trained = json.loads(Path("reports/finetune/metrics.json").read_text())
    assert counted["trained_parameters"] == trained["trained_parameters"] == 3 * (64 + 1)
    report = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert report["tuned"]["valid_output"]["value"] == 1.0 and report["calibration"]["rows"] == 8
    assert report["calibration"]["mean_confidence"] >= 1 / 3

    base, adapter = Path("artifacts/fetch_base"), Path("artifacts/finetune")
    stored = get_version(add_pipeline_output())
    engine = load_engine(stored, load_tokenizer(stored.tokenizer), load_params().services.engine)
    table = pq.read_table("artifacts/evaluate/predictions.parquet").to_pydict()
    rows = {one.id: one for one in read_rows(Path("artifacts/split/test.parquet"))}
    tokenizer = load_tokenizer(base)
    try:
        for row_id, answer in zip(table["id"], table["tuned"], strict=True):
            prompt = encode_prompt(tokenizer, rows[row_id].prompt)
            assert tokenizer.decode(asyncio.run(write(engine, prompt))) == answer
    finally:
        engine.close()
    check_judged(stored.tag, monkeypatch)
    assert compare(base, stored.adapter, adapter, [PROMPT]) > 0
    break_weights(adapter)
    with pytest.raises(InputError, match="the logits of 1 of 1 prompts differ"):
        compare(base, stored.adapter, adapter, [PROMPT])


def write_label_project(**changes):
    def labelled(n):
        return row(f"{'abc'[n % 3] * 4} {n}", ("book", "book it", "cancel")[n % 3], "Answer.")

    settings = {"task__kind": "label", "task__label_key": None, "export__gguf": False}
    write_project("llama", labelled, "label", finetune__method="head", **settings, **changes)
    labels = {"kind": "label", "label_key": None, "labels": ["book", "book it", "cancel"]}
    Path("artifacts/curate/task.json").write_text(json.dumps(labels))


async def write(engine, prompt):
    from services.engines.protocol import Sampling

    return [t async for step in engine.generate(prompt, Sampling(12)) for t in step.token_ids]


def test_a_head_is_for_tasks_of_labels_and_its_adapter_for_the_same_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project("llama", numbered("llama"), finetune__method="head", export__gguf=False)
    with pytest.raises(ParamsError, match=r"task\.kind is json: set task\.kind: label"):
        preflight.main()
    write_label_project(task__learned_turns="all")
    with pytest.raises(ParamsError, match=r"task\.learned_turns: all, and finetune\.method: head"):
        preflight.main()
    write_label_project()
    finetune.main()
    put_initial_adapter(Path("artifacts/finetune"), "0123456789ab", "a" * 64)
    finetune.main()
    assert json.loads(Path("reports/finetune/metrics.json").read_text())["started_from"] == "0123456789ab"
    config = Path("artifacts/initial_adapter/replaced_config.json")
    config.write_text(config.read_text().replace("cancel", "stop"))
    for stage in (preflight, finetune):
        with pytest.raises(InputError, match=r"labels: \('book', 'book it', 'cancel'\) here") as error:
            stage.main()
        assert "set task.labels" in error.value.fix

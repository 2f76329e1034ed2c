import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from stages import fetch_base
from stages.common.artifacts import hash_file, read_json, write_json
from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.messages import Message, Tool
from stages.common.model.loading import load_tokenizer
from stages.common.records import make_row, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from stages.export import __main__ as export
from tests.llama_cpp import LlamaCpp
from tests.tiny import save_model

REPO = Path(__file__).resolve().parents[3]
MERGES = (("t", "h"), ("th", "e"))
ROWS = [
    ("turn the light on", '{"intent":"On","domain":"light"}'),
    ("turn it off", '{"intent":"Off"}'),
    ("20 degrees", '{"intent":"Set","degrees":20}'),
]


def rows(answers=ROWS, system="Answer as JSON."):
    return [
        make_row([Message("system", system), Message("user", q), Message("assistant", a)], "toy", "cc0-1.0")
        for q, a in answers
    ]


def save_adapter(base, folder, seed=5):
    """Save an adapter that changes the model: trained far from its start, as it were."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.common.model.loading import load_base

    torch.manual_seed(seed)
    model = load_base(base, torch.float32, torch.device("cpu"))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, tensor in adapted.named_parameters():
            if "lora_B" in key:
                tensor.normal_()
    adapted.save_pretrained(folder)


def lay_out(folder, training=None, sections=None, **changes):
    """Lay out what the stage reads: base, adapter, training rows and params.yaml."""
    save_model(folder / "artifacts/fetch_base", merges=MERGES, **changes)
    save_adapter(folder / "artifacts/fetch_base", folder / "artifacts/finetune")
    (folder / "artifacts/split").mkdir()
    write_rows(folder / "artifacts/split/train.parquet", rows() if training is None else training)
    write_json(folder / TASK_FILE, JsonTask("intent").describe())
    (folder / "reports/fetch_base").mkdir(parents=True)
    facts = {"name": "tiny", "revision": "1", "sha256": "00"}
    (folder / "reports/fetch_base/metrics.json").write_text(json.dumps(facts))
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    for section, values in (sections or {}).items():
        params[section].update(values)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serving():
    return read_json(Path("artifacts/export/serving.json"))


def evidence():
    return read_json(Path("reports/export/metrics.json"))


def test_the_folder_holds_all_that_a_server_reads(project):
    lay_out(project)
    export.main()
    names = {path.name for path in Path("artifacts/export").iterdir()}
    assert names == {
        "model.gguf", "Modelfile", "serving.json", "draft_corpus.npz",
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    messages = [Message("user", "then")]
    ours, theirs = (load_tokenizer(Path("artifacts") / stage) for stage in ("export", "fetch_base"))
    assert encode_prompt(ours, messages) == encode_prompt(theirs, messages)
    assert serving() == {
        "adapter_sha256": hash_file(Path("artifacts/finetune/adapter_model.safetensors")),
        "answer_schema": {
            "type": "object",
            "properties": {
                "intent": {"enum": ["Off", "On", "Set"]},
                "domain": {"type": "string"},
                "degrees": {"type": "number"},
            },
            "additionalProperties": False,
            "required": ["intent"],
        },
        "base_model": "tiny",
        "base_revision": "1",
        "base_sha256": "00",
        "context_tokens": 512,
        "name": "home-intents-smollm2-135m",
        "normalize": ["nfc", "line_ends", "argument_order", "whole_numbers"],
        "system_prompt": "Answer as JSON.",
        "task": {"kind": "json", "label_key": "intent", "labels": None},
        "tools": [],
        "version": evidence()["version"],
    }


def test_the_schema_keeps_the_order_of_keys_in_the_file(project):
    lay_out(project)
    export.main()
    assert list(serving()["answer_schema"]["properties"]) == ["intent", "domain", "degrees"]
    assert list(serving()) == sorted(serving())


def test_the_evidence_says_what_was_compared(project):
    lay_out(project)
    export.main()
    found = evidence()
    assert found["gguf"]["bytes"] == Path("artifacts/export/model.gguf").stat().st_size
    assert found["gguf"]["tensors_by_type"] == {"F16": 15, "F32": 5}
    assert found["gguf"]["tensor_errors"]["F16"] < 1e-3
    assert (found["gguf"]["tokens_equal"], found["gguf"]["tokens_compared"]) == (3, 3)
    assert found["answers"] == {"checked": 3, "keys": 3, "labels": 3, "schema": True}


def test_llama_cpp_gives_the_likelihoods_of_base_and_adapter_together(project):
    import torch

    from stages.common.model.loading import load_base, load_tuned

    lay_out(project, initializer_range=0.3)
    export.main()
    base, cpu = Path("artifacts/fetch_base"), torch.device("cpu")
    tuned = load_tuned(base, Path("artifacts/finetune"), torch.float32, cpu)
    plain, tokenizer = load_base(base, torch.float32, cpu), load_tokenizer(base)
    llama_cpp = LlamaCpp(Path("artifacts/export/model.gguf"))

    def likely(model, prompt):
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)

    compared = 0
    for question in range(60):
        prompt = encode_prompt(tokenizer, [Message("user", f"then {question * 37}")])
        expected = likely(tuned, prompt)
        token = int(expected.argmax())
        if not 2 <= token < 96:
            continue  # an end or half a character, of which llama.cpp gives no logprob
        assert llama_cpp.complete(prompt, 1)[0][token] == pytest.approx(float(expected[token]), abs=0.15)
        compared += abs(float(expected[token] - likely(plain, prompt)[token])) > 1
    assert compared >= 3


def test_two_runs_write_the_same_bytes_and_evidence(project):
    lay_out(project, sections={"export": {"quantization": "q8_0"}})

    def everything():
        export.main()
        found = {path.name: path.read_bytes() for path in Path("artifacts/export").iterdir()}
        return found, {key: value for key, value in evidence().items() if key != "throughput"}

    assert everything() == everything()


def test_the_version_names_what_is_served(project):
    lay_out(project)
    export.main()
    first = serving()["version"]
    save_adapter(Path("artifacts/fetch_base"), Path("artifacts/finetune"), seed=6)
    export.main()
    assert serving()["version"] != first
    assert len(first) == 12


def test_without_gguf_any_architecture_is_exported_and_the_version_still_names_it(project):
    lay_out(project, sections={"export": {"gguf": False}}, model_type="olmo2")
    export.main()
    names = {path.name for path in Path("artifacts/export").iterdir()}
    assert not names & {"model.gguf", "Modelfile"}
    assert evidence()["gguf"] is None
    first = serving()["version"]
    save_adapter(Path("artifacts/fetch_base"), Path("artifacts/finetune"), seed=6)
    export.main()
    assert serving()["version"] != first


def test_an_architecture_without_gguf_is_refused_and_nothing_is_left_behind(project):
    lay_out(project, model_type="gpt_neox")
    with pytest.raises(InputError, match=r"(?s)'gpt_neox' has no GGUF export.*export\.gguf: false"):
        export.main()
    assert [path.name for path in Path("artifacts").iterdir() if "export" in path.name] == []


def test_free_text_has_no_schema(project):
    lay_out(project)
    write_json(TASK_FILE, TextTask().describe())
    export.main()
    assert serving()["answer_schema"] is None
    assert evidence()["answers"]["schema"] is False


def test_system_prompts_that_differ_are_none(project):
    training = [*rows(), *rows([("hi", '{"intent":"Hi"}')], system="Be kind.")]
    lay_out(project, training)
    export.main()
    assert serving()["system_prompt"] is None
    assert "SYSTEM" not in Path("artifacts/export/Modelfile").read_text()


def test_tools_are_those_that_all_rows_offer():
    lamp, heat = (Tool(json.dumps({"type": "function", "function": {"name": n}})) for n in ("lamp", "heat"))
    messages = [Message("user", "hi"), Message("assistant", "ho")]

    def offering(*tools):
        return make_row(messages, "toy", "cc0-1.0", tools=tools)

    assert export.find_common_tools([offering(lamp, heat)] * 2) == [lamp.value, heat.value]
    assert export.find_common_tools([offering(lamp), offering(heat)]) == []
    assert export.find_common_tools([offering(lamp), offering()]) == []
    assert export.find_common_tools([]) == []


@pytest.mark.parametrize(
    ("gone", "stage"),
    [
        ("artifacts/fetch_base", "fetch_base"),
        ("artifacts/finetune", "finetune"),
        ("artifacts/split/train.parquet", "split"),
        ("reports/fetch_base/metrics.json", "fetch_base"),
    ],
)
def test_what_is_missing_is_named_with_the_stage_that_makes_it(project, gone, stage):
    lay_out(project)
    path = project / gone
    shutil.rmtree(path) if path.is_dir() else os.remove(path)
    with pytest.raises(InputError, match=rf"(?s){gone}.*dvc repro {stage}"):
        export.main()


@pytest.mark.slow
def test_the_default_base_answers_in_llama_cpp_with_its_own_tokens(project):
    lay_out(project)
    shutil.rmtree("artifacts/fetch_base")
    fetch_base.main()
    save_adapter(Path("artifacts/fetch_base"), Path("artifacts/finetune"), seed=5)
    # An adapter that changes nothing: the base model must know what it knows.
    import safetensors.torch

    file = Path("artifacts/finetune/adapter_model.safetensors")
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: value * 0 for key, value in weights.items()}, file)
    export.main()
    assert evidence()["gguf"]["pre_tokenizer"] == "gpt-2"
    llama_cpp = LlamaCpp(Path("artifacts/export/model.gguf"))
    tokenizer = load_tokenizer(Path("artifacts/export"))
    for text in [
        "Don't  STOP, we'Ll SEE\n\n\tnow   12345 1 22 ٣٤ ½",
        "été e\u0301t\u0301 你好，世界 Привет 🙂👩‍👩‍👧\u00a0x\u200b",
        "<|im_start|>user\nHi<|im_end|>\n<repo_name> <file_sep>",
    ]:
        assert llama_cpp.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = llama_cpp.chat([{"role": "user", "content": "What is the capital of France?"}], 12)
    assert "Paris" in answer

"""The stage: what it makes without variants, and with them the model that everything after it reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from services.parity import read_trainer_side
from services.versions.store import read_pipeline_tag
from stages import ask_base
from stages.common.artifacts import read_json, write_json
from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.exported import CHOSEN, find_exported
from stages.common.model.generation import encode_questions
from stages.common.model.loading import load_base, load_tokenizer
from stages.common.model.results import score
from stages.common.params.loading import load_params
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from stages.compress import __main__ as compress
from stages.compress import healing, variants
from stages.compress.asking import ask_in_process
from stages.compress.healing import heal_model
from stages.compress.shrinking import drop_blocks
from stages.evaluate import __main__ as evaluate
from stages.export import __main__ as export
from tests.stages.finetune.project import make_project
from tests.stages.finetune.project import rows as finetune_rows
from tests.tiny import make_model, make_tokenizer, save_model

ROOT = Path(__file__).parents[3]
MERGES = (("a", "b"), ("t", "h"), ("t", "r"), ("e", "s"))
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.2}


def rows_of(name, count):
    return [
        make_row(
            [Message("user", f"{name} {i}"), Message("assistant", f"answer {i % 3}")],
            "toy",
            "mit",
            group=f"{name}{i}",
        )
        for i in range(count)
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that lays out a project with these settings of `compress`, up to `export`."""
    monkeypatch.chdir(tmp_path)

    def lay_out(**settings):
        from peft import LoraConfig, get_peft_model

        save_model(tmp_path / "artifacts/fetch_base", merges=MERGES, **SHAPE)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(make_model(vocab_size=258 + len(MERGES), **SHAPE), lora)
        model.save_pretrained(tmp_path / "artifacts/finetune")
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["ask_base"] |= {
            "engine": "paged",
            "dtype": "float32",
            "min_test_rows": 10,
            "max_new_tokens": 8,
        }
        params["evaluate"] |= {"resamples": 100}
        params["compress"] |= {"calibration_rows": 4} | settings
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        for side, count in (("train", 8), ("validation", 4), ("test", 12)):
            write_rows(tmp_path / f"artifacts/split/{side}.parquet", rows_of(side, count))
        write_json(tmp_path / TASK_FILE, TextTask().describe())
        write_json(
            tmp_path / "reports/fetch_base/metrics.json",
            {"name": "tiny", "revision": "1", "sha256": "0" * 64},
        )
        ask_base.main()
        export.main()
        return tmp_path

    return lay_out


def set_params(section, **settings):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params[section] |= settings
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def report():
    return json.loads(Path("reports/compress/metrics.json").read_text())


def test_without_variants_the_exported_model_goes_on(project):
    project()
    compress.main()
    assert report() == {"models": {}, "chosen": None, "choice": "compress.variants is empty."}
    assert find_exported() == Path("artifacts/export")
    assert "no smaller model was made" in Path("reports/compress/comparison/table.md").read_text()


def test_a_choice_made_from_another_export_is_refused(project):
    folder = project()
    shutil.copytree("artifacts/export", CHOSEN)
    serving = read_json(CHOSEN / "serving.json")
    write_json(CHOSEN / "serving.json", serving | {"compression": {"variant": "int8", "made_from": "0" * 12}})
    with pytest.raises(
        InputError, match=f"made from version 000000000000, and artifacts/export has {serving['version']}"
    ):
        read_pipeline_tag(folder)


def test_each_learned_turn_of_a_validation_row_is_asked(project):
    project(variants=["int8"])
    turns = ("user", "one"), ("assistant", "a"), ("user", "two"), ("assistant", "b")
    row = make_row([Message(*turn) for turn in turns], "toy", "mit")
    write_rows(Path("artifacts/split/validation.parquet"), [row])
    tokenizer = load_tokenizer(Path("artifacts/fetch_base"))
    answers = []
    for wanted in ("all", "last"):
        set_params("task", learned_turns=wanted)
        answers.append([one.answer for one in compress.draw_compared(load_params(), tokenizer)])
    assert answers == [["a", "b"], ["b"]]


def test_without_a_row_to_ask_no_variant_is_made(project, monkeypatch):
    project(variants=["int8"])
    write_rows(Path("artifacts/split/validation.parquet"), [])
    monkeypatch.delattr(compress, "make_variant")
    with pytest.raises(InputError, match="and there are none that can be asked"):
        compress.main()


@pytest.mark.parametrize("side", ["validation", "test"])
def test_a_row_that_a_small_vocabulary_makes_too_long_is_refused_before_a_training(
    project, side, monkeypatch
):
    """The pair "es" is in no training row: 245 tokens become 490, and with an answer more than 512."""
    project(variants=["fewer_layers", "small_vocabulary"], kept_tokens=0.0)
    monkeypatch.delattr(variants, "heal_model")
    long = make_row([Message("user", "es" * 245), Message("assistant", "answer 1")], "toy", "mit")
    write_rows(Path(f"artifacts/split/{side}.parquet"), [*rows_of(side, 2), long])
    with pytest.raises(InputError, match=f"1 validation or test rows have no room.*\n.*{long.id}") as refused:
        compress.main()
    assert "raise compress.kept_tokens" in refused.value.fix


@pytest.mark.parametrize("launcher", ["ray", "torchrun", "local"])
def test_a_model_is_healed_with_the_devices_of_this_host(launcher, tmp_path, monkeypatch):
    """A cluster's number of devices is not that of the host that runs this stage."""
    seen = {}
    monkeypatch.chdir(make_project(tmp_path, launcher=launcher, devices=8, batch_size=16, sharding="full"))
    base = tmp_path / "artifacts/fetch_base"
    write_json(tmp_path / "reports/fetch_base/metrics.json", {"sha256": "0" * 64})
    whole = load_base(base, torch.float32, torch.device("cpu"))

    def read(folder):
        seen.update(load_params(folder / "params.yaml").finetune.model_dump())
        raise InterruptedError

    monkeypatch.setattr(healing, "run_training", read)
    with pytest.raises(InterruptedError):
        healing.heal_model(whole, whole, 4, 1, 0.003, 0.0, 7, tmp_path / "healing")
    assert (seen["launcher"], seen["devices"], seen["sharding"]) == ("local", "auto", "none")


@pytest.mark.slow
def test_the_whole_model_teaches_the_smaller_one(tmp_path, monkeypatch):
    """By its logits alone: it comes nearer to the whole model, and no answer is learned."""
    monkeypatch.chdir(make_project(tmp_path))
    base = save_model(tmp_path / "artifacts/fetch_base", initializer_range=0.2)
    write_json(tmp_path / "reports/fetch_base/metrics.json", {"sha256": "0" * 64})
    whole = load_base(base, torch.float32, torch.device("cpu"))
    questions = encode_questions(make_tokenizer(), finetune_rows(8, 1000))
    smaller, _ = drop_blocks(whole, [[*one.prompt, *one.reference] for one in questions], 0.5)

    def measure_divergence(model):
        total = 0.0
        with torch.inference_mode():
            for one in questions:
                ids = torch.tensor([[*one.prompt, *one.reference]])
                theirs, ours = (
                    torch.log_softmax(each(ids).logits[0, len(one.prompt) - 1 : -1], dim=-1)
                    for each in (whole, model)
                )
                total += float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
        return total

    before = measure_divergence(smaller)
    healed = heal_model(smaller, whole, 40, 4, 0.003, 1.0, 7, tmp_path / "healing")
    assert measure_divergence(healed) < 0.8 * before
    assert not (tmp_path / "healing").exists()


@pytest.mark.slow
def test_the_chosen_model_is_measured_evaluated_and_served(project, monkeypatch):
    """Three variants, each asked in a process of its own; the one that is served has one block of two."""
    folder = project(
        variants=["int8", "int4", "fewer_layers"],
        choose="fewer_layers",
        healing_epochs=8,
        healing_rate=0.003,
    )
    compress.main()
    found = report()
    models, chosen, exported = found["models"], find_exported(), Path("artifacts/export")
    assert [*models] == ["exported", "fewer_layers", "int4", "int8"] and found["chosen"] == "fewer_layers"
    assert models["int4"]["bytes"] < models["int8"]["bytes"] < 0.75 * models["exported"]["bytes"]
    assert models["fewer_layers"]["bytes"] < models["exported"]["bytes"]
    assert models["int4"]["calibration_rows"] == 4 and models["fewer_layers"]["healing_rows"] == 8
    losses = {name: one["results"]["perplexity"]["value"] for name, one in models.items()}
    assert abs(losses["int8"] / losses["exported"] - 1) < 0.05
    assert losses["fewer_layers"] < 0.8 * losses["exported"]  # the model is random: any training helps
    speeds = found["throughput"]
    assert all(one["alone_tokens_per_s"] > 0 and one["peak_memory_mib"] > 50 for one in speeds.values())

    assert chosen == CHOSEN
    assert sorted(path.name for path in chosen.parent.iterdir()) == ["choice.json", "chosen"]
    assert (chosen / "model.gguf").stat().st_size == models["fewer_layers"]["bytes"]
    layers = [read_json(path / "config.json")["num_hidden_layers"] for path in (chosen, exported)]
    assert layers == [1, 2] and len(models["fewer_layers"]["blocks"]) == 1
    serving, before = (read_json(path / "serving.json") for path in (chosen, exported))
    assert serving["version"] == found["version"] != before["version"]
    assert serving["adapter_sha256"] == before["adapter_sha256"]
    assert serving["compression"]["made_from"] == before["version"]
    for name in ("Modelfile", "draft_corpus.npz", "tokenizer.json"):
        assert (chosen / name).read_bytes() == (exported / name).read_bytes()

    evaluate.main()
    judged = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert judged["compression"] == "fewer_layers"
    assert (judged["rows"], found["rows"]) == (12, 4)
    assert judged["tuned"]["perplexity"]["value"] == pytest.approx(measure_on_test_rows(), abs=2e-6)
    check_served(folder, serving, models["fewer_layers"]["bytes"], monkeypatch)


@pytest.mark.slow
def test_a_model_of_few_tokens_is_asked_compared_and_served_by_them(project, monkeypatch):
    """The training rows have the pair "tr" alone, and every test row has "es": it takes one token more."""
    folder = project(variants=["small_vocabulary"], choose="small_vocabulary", kept_tokens=0.0)
    whole = load_tokenizer(Path("artifacts/fetch_base"))
    compress.main()
    found = report()["models"]
    small, own = found["small_vocabulary"], load_tokenizer(CHOSEN)
    assert small["tokens"] == len(own) == len(whole) - 3 and small["longer_texts"] == 1.0
    assert "tr" in own.get_vocab() and "es" not in own.get_vocab()
    assert small["bytes"] < found["exported"]["bytes"] and "healing_rows" not in small
    serving = read_json(CHOSEN / "serving.json")
    exported = Path("artifacts/export")
    assert (CHOSEN / "Modelfile").read_bytes() == (exported / "Modelfile").read_bytes()
    assert read_json(CHOSEN / "config.json")["vocab_size"] == len(own)

    evaluate.main()
    judged = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert judged["compression"] == "small_vocabulary"
    assert judged["tuned"]["perplexity"]["value"] == pytest.approx(measure_on_test_rows(), abs=2e-6)
    trainer = read_trainer_side(folder, None)
    longer = [len(encode_prompt(whole, row.prompt)) + 1 for row in trainer.rows]
    assert [*trainer.prompt_tokens] == longer == [len(encode_prompt(own, row.prompt)) for row in trainer.rows]
    check_served(folder, serving, small["bytes"], monkeypatch)


def measure_on_test_rows():
    """Return the perplexity of the chosen file, asked as `compress` asks each file."""
    path = Path("artifacts/split/test.parquet")
    asked = ask_in_process("chosen", CHOSEN / "model.gguf", path, 8, load_params().ask_base)
    questions = encode_questions(load_tokenizer(Path("artifacts/fetch_base")), read_rows(path))
    return score(read_rows(path), questions, asked.found.answers, TextTask())["perplexity"].value()


def check_served(folder, serving, size, monkeypatch):
    """The store takes the chosen model, and no engine gets the whole weights in its place."""
    code = (
        "import json; from services.versions.store import add_pipeline_output, get_version;"
        "files = get_version(add_pipeline_output());"
        "print(json.dumps([files.tag, files.gguf.stat().st_size, files.base, files.adapter]))"
    )
    monkeypatch.setenv("BENTOML_HOME", str(folder / "bentoml"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [f"{serving['name']}:{serving['version']}", size, None, None]

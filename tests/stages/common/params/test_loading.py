import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stages.common.errors import ParamsError
from stages.common.params import packaged
from stages.common.params.loading import load_params

SHIPPED = Path(__file__).parents[4] / "params.yaml"
TOOLS = SHIPPED.with_name("params.tools.yaml")
# Where the shipped task with tools differs.
OF_TOOLS = {
    "task": {"kind", "label_key", "system_prompt", "stratify_by", "slices"},
    "collect": {"sources"},
    "split": {"max_test_rows_per_group", "max_train_rows_per_group"},
    "ask_base": {"max_new_tokens"},
    "evaluate": {"simulator"},
    "finetune": {"max_length", "validation_rows"},
    "model_card": {"name", "intended_use", "out_of_scope"},
}


@pytest.fixture
def edited(tmp_path):
    """Return a function that writes params.yaml with some texts replaced, and loads it."""

    def load(*replacements: tuple[str, str], path: Path = SHIPPED):
        text = path.read_text(encoding="utf-8")
        for old, new in replacements:
            assert text.count(old) >= 1, old
            text = text.replace(old, new, 1)
        path = tmp_path / "params.yaml"
        path.write_text(text, encoding="utf-8")
        return load_params(path)

    return load


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(SHIPPED.read_text().splitlines(), 1) if text in line)


def test_the_values_of_the_file_arrive(edited):
    params = edited(("rank: 16", "rank: 24"))
    assert params.finetune.rank == 24
    assert params.collect.sources[0].kind == "home_intents"


def test_an_unknown_key_is_named_with_its_line_value_and_the_nearest_right_key(edited):
    with pytest.raises(ParamsError) as error:
        edited(("  rank: 16", "  rnak: 16"))
    assert f":{line_of('  rank: 16')}: finetune.rnak: unknown key (value 16); did you mean rank?" in str(
        error.value
    )


def test_a_wrong_type_is_named_with_its_line_and_value(edited):
    with pytest.raises(ParamsError, match=r"finetune\.epochs: .*integer.*'two'") as error:
        edited(("epochs: 1", "epochs: two"))
    assert f":{line_of('epochs: 1')}:" in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_generator_would_refuse_later_is_refused_now(edited, seed):
    with pytest.raises(ParamsError) as error:
        edited(
            ("seed: 7 # random seed of the adapter", f"seed: {seed} # random seed of the adapter"),
            ("seed: 7 # random seed of the resampling", f"seed: {seed} # random seed of the resampling"),
        )
    assert str(error.value).startswith("2 problems")
    assert all(key in str(error.value) for key in ("finetune.seed", "evaluate.seed"))


def test_a_misspelt_key_inside_a_source_gets_the_nearest_of_that_kind(edited):
    with pytest.raises(
        ParamsError, match=r"sources\.0\.row_per_template: .*did you mean rows_per_template\?"
    ):
        edited(("rows_per_template", "row_per_template"))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("origin: package", "origin: hub", "fetch_base.sha256"),
        ("validation_fraction: 0.04", "validation_fraction: 0.9", "split.test_fraction"),
        ("kind: json", "kind: text", "task.label_key"),
        ("kind: json", "kind: label", "task.label_key"),
        ("label_key: intent", "label_key: null", "task.stratify_by"),
        ("labels: null", "labels: [a, b]", "task.labels"),
        ("kind: json", "kind: tools", "task.label_key"),
        ("primary_metric: null", "primary_metric: chrf", "task.primary_metric"),
        ("template_arguments: {}", "template_arguments: {messages: x}", "task.template_arguments"),
        ("template_arguments: {}", "template_arguments: {enable-thinking: x}", "task.template_arguments"),
    ],
)
def test_a_pair_that_cannot_stand_together_is_refused(edited, old, new, key):
    with pytest.raises(ParamsError, match=key.replace(".", r"\.")):
        edited((old, new))


@pytest.mark.parametrize("path, words", [(SHIPPED, packaged.INTENTS), (TOOLS, packaged.TOOLS)])
def test_the_words_of_a_packaged_task_are_those_of_its_file(path, words):
    shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert shipped["model_card"]["name"] == words.name
    assert {key: shipped["model_card"][key] for key in words.prose} == words.prose
    task = [shipped["task"][key] for key in ("system_prompt", "kind", "label_key")]
    assert task == [words.system_prompt, words.kind, words.label_key]
    assert any(isinstance(source, words.source) for source in load_params(path).collect.sources)


def test_the_two_shipped_files_differ_only_where_their_tasks_do():
    one, other = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (SHIPPED, TOOLS))
    assert list(one) == list(other)
    differing = {
        section: {
            key for key in one[section] | other[section] if one[section].get(key) != other[section].get(key)
        }
        for section in one
        if one[section] != other[section]
    }
    assert differing == OF_TOOLS
    lines = [
        [
            line.split(" # ")[1]
            for line in path.read_text().splitlines()
            if re.match("  [a-z]", line) and " # " in line
        ]
        for path in (SHIPPED, TOOLS)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("words", [packaged.INTENTS, packaged.TOOLS], ids=["intents", "tools"])
def test_descriptions_of_the_packaged_rows_cannot_stay_with_others(edited, words):
    path = SHIPPED if words is packaged.INTENTS else TOOLS
    text = path.read_text(encoding="utf-8")
    first = text.index("    - kind: home_")
    packaged_source = text[first : text.index("    - kind: feedback")]
    own = (packaged_source, "    - kind: file\n      path: data/rows.csv\n      license: mit\n")
    with pytest.raises(ParamsError, match="3 problems") as error:
        edited(own, path=path)
    assert all(f"model_card.{key} is" in str(error.value) for key in ("name", *words.prose))
    kind = (f"kind: {words.kind} #", "kind: label #")
    more = [("label_key: intent", "label_key: null")] if words.label_key else []
    name = (f"name: {words.name}", "name: tickets")
    with pytest.raises(ParamsError, match=r"task\.system_prompt is the packaged task's"):
        edited(own, kind, *more, name, path=path)
    prompt = (words.system_prompt, "Answer with one team.")
    prose = [(" ".join(part.split()[:3]), "Route") for part in words.prose.values()]
    assert edited(own, kind, *more, name, prompt, *prose, path=path).model_card.name == "tickets"


def test_a_file_outside_data_is_refused_because_dvc_could_not_see_it(edited):
    entry = "    - kind: file\n      path: /tmp/rows.jsonl\n      license: mit\n    - kind: home_intents"
    with pytest.raises(ParamsError, match=r"sources\.0\.path: '/tmp/rows.jsonl' is outside data/"):
        edited(("    - kind: home_intents", entry))


def test_all_problems_come_in_one_message(edited):
    with pytest.raises(ParamsError) as error:
        edited(
            ("rank: 16", "rank: 0"),
            ("epochs: 1", "epochs: x"),
            ("cron:", "crn:"),
            ("kind: json", "kind: yaml"),
        )
    text = str(error.value)
    assert text.startswith("5 problems")  # crn is unknown, and so cron is missing
    assert all(key in text for key in ("finetune.rank", "finetune.epochs", "flows.training.crn", "task.kind"))


def test_a_key_given_twice_is_refused(edited):
    with pytest.raises(ParamsError, match="epochs: given twice"):
        edited(("  epochs: 1", "  epochs: 1\n  epochs: 2"))


def test_a_missing_section_and_an_unknown_section_are_both_named(edited):
    with pytest.raises(ParamsError, match=r"finetuen: unknown key; did you mean finetune\?") as error:
        edited(("finetune:", "finetuen:"))
    assert "finetune: missing section" in str(error.value)


def test_exponents_are_numbers_as_they_are_for_dvc(edited):
    assert (
        edited(
            ("learning_rate: ", "learning_rate: 1e-3 # "),
        ).finetune.learning_rate
        == 0.001
    )


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"a: [1\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_mapping_is_a_clear_error(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert "fix" in str(error.value)


def test_the_check_exits_2_before_anything_heavy_is_imported(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text().replace("rank: 16", "rnak: 16"))
    command = [sys.executable, "-X", "importtime", "-m", "stages.common.params", str(path)]
    done = subprocess.run(command, cwd=SHIPPED.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean rank?" in done.stderr
    assert not {"torch", "prefect", "dvc", "transformers"} & {
        line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }


@pytest.mark.parametrize(
    ("kind", "gpus", "message"),
    [
        ("vllm", 0, "kind: vllm needs a GPU"),
        ("paged", 1, "computes on the CPU"),
        ("auto", 2, "a service computes on one GPU"),
    ],
)
def test_gpus_that_an_engine_cannot_use_are_refused(edited, kind, gpus, message):
    with pytest.raises(ParamsError, match=message):
        edited(("    kind: auto #", f"    kind: {kind} #"), ("gpus: 0 #", f"gpus: {gpus} #"))


def test_a_method_whose_adapter_the_engine_cannot_load_is_refused(edited):
    vllm = (("    kind: auto #", "    kind: vllm #"), ("gpus: 0 #", "gpus: 1 #"))
    for method in ("dora", "full", "partial"):
        with pytest.raises(ParamsError, match=f"finetune.method: {method} makes no adapter that vLLM loads"):
            edited(*vllm, ("method: lora #", f"method: {method} #"))
    for method in ("rslora", "dpo"):
        assert edited(*vllm, ("method: lora #", f"method: {method} #")).finetune.method == method


@pytest.mark.parametrize("value", ["0", "true", "[]", "mlp", "[1]", "null"])
def test_modules_to_train_are_a_number_of_blocks_or_names(edited, value):
    with pytest.raises(ParamsError, match="a whole number of at least 1 or a list of module names"):
        edited(("trained_modules: 4 #", f"trained_modules: {value} #"))
    assert edited(("trained_modules: 4 #", "trained_modules: [mlp] #")).finetune.trained_modules == ("mlp",)


VARIANTS = ("variants: [] #", "variants: [int8] #")
CHOSEN = ("choose: null #", "choose: int8 #")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("variants: [] #", "variants: [int3] #")], r"compress.variants.0"),
        ([("variants: [] #", "variants: [int8, int8] #")], "names a variant twice"),
        ([CHOSEN], "is int8, which is not in variants"),
        ([("choose: null #", "choose: smallest #")], "there is nothing to choose from"),
        ([VARIANTS, ("gguf: true #", "gguf: false #")], "export.gguf is false"),
        ([VARIANTS, ("engine: auto #", "engine: transformers #")], "ask_base.engine is transformers"),
        ([VARIANTS, CHOSEN, ("gpus: 0 #", "gpus: 1 #")], "services.engine.gpus: 1 serves another format"),
        (
            [VARIANTS, CHOSEN, ("    kind: auto #", "    kind: transformers #")],
            "services.engine.kind: transformers serves another format",
        ),
    ],
    ids=str,
)
def test_smaller_models_that_cannot_be_made_measured_or_served_are_refused(edited, changes, message):
    with pytest.raises(ParamsError, match=message):
        edited(*changes)


def test_smaller_models_may_be_measured_where_another_engine_serves(edited):
    params = edited(VARIANTS, ("    kind: auto #", "    kind: transformers #"))
    assert params.compress.variants == ("int8",) and params.compress.choose is None
    assert edited(VARIANTS, CHOSEN).compress.choose == "int8"

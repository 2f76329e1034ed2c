import json
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from tokenizers import AddedToken
from transformers import T5Config

from stages.common.artifacts import write_json
from stages.common.chat.template import Encoded, encode_example, fix_argument
from stages.common.chat.tools_template import adapt_template
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.model.adapter import write_trained_ids
from stages.common.model.loading import read_config
from stages.common.model.replaced import measure_reach, select_weights
from stages.common.params.compress import Compress
from stages.common.params.finetune import EarlyStopping
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.task.kinds import read_task
from stages.preflight import __main__ as preflight
from stages.preflight import base_checks, finetune_checks, memory_checks
from stages.preflight.finetune_checks import find_method_problems
from stages.preflight.page import render_page
from tests.stages.common.chat.tool_templates import QWEN_3 as THINKS
from tests.stages.common.chat_templates import GEMMA_2, MISTRAL_1, NO_END, QWEN_3
from tests.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

MERGES = (("q", "q"),)  # llama.cpp reads no tokenizer without one
SIZE = 259
GEMMA = GEMMA_2.replace("<start_of_turn>", "<|im_start|>").replace("<end_of_turn>", "<|im_end|>")
REPO = Path(__file__).parents[3]


def row(n, answer=None, system=None, question=None, license="cc0-1.0", language=None):
    messages = [
        *([Message("system", system)] if system else []),
        Message("user", question or f"question {n}"),
        Message("assistant", answer or f'{{"n":{n % 5}}}'),
    ]
    return make_row(messages, "toy", license, tags={"language": language} if language else {})


@pytest.fixture
def lay_out(tmp_path, monkeypatch):
    """Lay out what the stage reads: 30 training rows, 4 validation rows, 10 test rows, unless given."""
    monkeypatch.chdir(tmp_path)

    def write(template=CHAT_TEMPLATE, model=None, tokenizer=None, kind="json", **sides):
        base = tmp_path / "artifacts" / "fetch_base"
        (model or make_model(vocab_size=SIZE)).save_pretrained(base)
        tokenizer = tokenizer or make_tokenizer(MERGES)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
        default = {
            "train": [row(n) for n in range(30)],
            "validation": [row(n) for n in range(100, 104)],
            "test": [row(n) for n in range(200, 210)],
        }
        for side, rows in (default | sides).items():
            write_rows(tmp_path / "artifacts" / "split" / f"{side}.parquet", rows)
        write_json(
            tmp_path / "artifacts" / "curate" / "task.json", {"kind": kind, "label_key": None, "labels": None}
        )
        write_json(tmp_path / "reports" / "fetch_base" / "metrics.json", {"license": "apache-2.0"})

    return write


@pytest.fixture
def set_params(tmp_path):
    """Write params.yaml with these keys changed, as `section__key=value`."""

    def write(**changes):
        params = yaml.safe_load((REPO / "params.yaml").read_text())
        params["finetune"]["max_length"] = 120
        params["ask_base"]["max_new_tokens"] = 40
        for name, value in changes.items():
            section, key = name.split("__")
            before = params[section][key]
            params[section][key] = before | value if before and isinstance(value, dict) else value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    write()
    return write


def found():
    return json.loads(Path("reports/preflight/metrics.json").read_text())


def rejected(side):
    return [json.loads(line) for line in Path(f"artifacts/preflight/{side}.jsonl").read_text().splitlines()]


def test_rows_that_fit_pass_and_are_counted_in_tokens(lay_out, set_params):
    lay_out()
    preflight.main()
    report = found()
    assert report["success"] and report["problems"] == []
    assert {side: report["sides"][side]["rows"] for side in preflight.SIDES} == {
        "train": 30,
        "validation": 4,
        "test": 10,
    }
    train = report["sides"]["train"]
    assert train["excluded"] == {} and train["learned_tokens"] == 30 * len('{"n":0}.')
    assert report["template"]["end"] == "<|im_end|>" and report["template"]["before"] == ""
    assert [rejected(side) for side in preflight.SIDES] == [[], [], []]


def test_equal_runs_write_equal_bytes(lay_out, set_params):
    lay_out(template=QWEN_3)
    files = ["reports/preflight/metrics.json", "reports/preflight/learned.html"]
    preflight.main()
    first = [Path(file).read_bytes() for file in files]
    preflight.main()
    assert [Path(file).read_bytes() for file in files] == first


def test_gates_count_the_rows_that_are_left_once_the_long_ones_are_out(lay_out, set_params):
    long = [row(n, question=f"{n} " + "long " * 40) for n in range(300, 346)]
    lay_out(train=[*[row(n) for n in range(14)], *long])
    set_params(split__min_train_rows=50)
    with pytest.raises(InputError, match=r"train: 14 rows are left of 60, and 50 are required") as error:
        preflight.main()
    assert "{'too_long': 46}" in error.value.what and long[0].id in error.value.what
    assert "finetune.max_length" in error.value.fix
    assert {r["id"] for r in rejected("train")} == {r.id for r in long}
    assert not found()["success"]
    set_params(split__min_train_rows=14)
    preflight.main()
    assert found()["sides"]["train"] == found()["sides"]["train"] | {"rows": 14, "rows_in": 60}
    set_params(split__min_train_rows=14, finetune__on_long_row="stop")
    with pytest.raises(InputError, match=r"46 rows are longer than finetune.max_length") as error:
        preflight.main()
    assert "raise finetune.max_length" in error.value.fix
    lay_out(train=[row(1, question="y" * 500)])
    set_params(finetune__max_length=2000, finetune__on_long_row="stop")
    with pytest.raises(InputError, match=r"1 rows are longer than the base model's context \(512\)") as error:
        preflight.main()
    assert "a base model with a longer context" in error.value.fix
    set_params(
        finetune__max_length=2000,
        finetune__on_long_row="stop",
        finetune__method="prefix_tuning",
        finetune__num_virtual_tokens=10,
        export__gguf=False,
    )
    with pytest.raises(InputError, match=r"longer than the base model's context \(502\)") as error:
        preflight.main()
    assert "num_virtual_tokens, which take 10 of the base model's 512 positions" in error.value.fix


def test_a_test_row_beyond_the_context_is_excluded_and_the_gate_counts_the_rest(lay_out, set_params):
    beyond = row(9, question="y" * 500)  # of a context of 512, with the marks of the template
    lay_out(test=[beyond, *[row(n) for n in range(200, 206)]], validation=[beyond, row(1)])
    preflight.main()
    assert [r["id"] for r in rejected("test")] == [beyond.id]
    assert [r["id"] for r in rejected("validation")] == [beyond.id]
    set_params(ask_base__min_test_rows=7)
    with pytest.raises(InputError, match="test: 6 rows are left of 7, and 7 are required"):
        preflight.main()


def test_rows_with_refused_roles_are_excluded_and_named_or_stop(lay_out, set_params):
    twice = make_row(
        [Message("user", "one"), Message("user", "two"), Message("assistant", '{"n":1}')], "toy", "cc0-1.0"
    )
    lay_out(template=MISTRAL_1, train=[twice, *[row(n) for n in range(30)]])
    preflight.main()
    (out,) = rejected("train")
    assert out["id"] == twice.id and out["reason"] == "refused_by_template"
    assert "must alternate" in out["detail"]
    set_params(preflight__on_refused_row="stop")
    with pytest.raises(InputError, match=rf"refuses 1 rows\n.*row {twice.id} from toy"):
        preflight.main()


@pytest.mark.parametrize(
    ("template", "why"), [(GEMMA, "System role not supported"), (MISTRAL_1, "roles must alternate")]
)
@pytest.mark.parametrize("on_refused_row", ["drop", "stop"])
def test_a_refused_system_prompt_is_one_error_before_training(
    lay_out, set_params, template, why, on_refused_row
):
    with_system = [row(n, system="Be brief.") for n in range(30)]
    lay_out(template=template, train=with_system, validation=with_system[:2], test=with_system[:9])
    set_params(preflight__on_refused_row=on_refused_row)
    with pytest.raises(InputError, match=why) as error:
        preflight.main()
    assert with_system[0].id in error.value.what and "task.system_prompt: null" in error.value.fix


def test_a_template_without_an_end_of_turn_is_refused(lay_out, set_params):
    lay_out(template=NO_END)
    with pytest.raises(InputError, match="no end of turn"):
        preflight.main()
    assert found()["success"] is False


@pytest.mark.parametrize(
    "answer",
    ['{"n":NaN}', '{"n":1,"n":2}', '{"n":Infinity}', "[1", "5"],
    ids=["NaN", "twice", "inf", "open", "5"],
)
def test_an_answer_that_is_no_json_object_is_named(lay_out, set_params, answer):
    wrong = row(1, answer=answer)
    lay_out(train=[wrong, *[row(n) for n in range(30)]])
    with pytest.raises(InputError, match=f"1 answers are not of kind json\n.*row {wrong.id}"):
        preflight.main()


def test_control_tokens_are_counted_in_every_text_of_a_row():
    tokenizer = make_tokenizer()
    mark = "<|im_end|>"
    assert mark in tokenizer.all_special_tokens
    call = ToolCall("f", json.dumps({"a": mark}))
    tool = Tool(json.dumps({"type": "function", "function": {"name": "f", "description": mark}}))
    plain = Message("assistant", "so")
    rows = [
        replace(row(1), messages=(Message("user", "x"), Message("assistant", "", (call,)))),
        replace(row(2), messages=(Message("user", "x"), replace(plain, reasoning=mark))),
        replace(row(3), messages=(Message("user", "x"), plain), tools=(tool,)),
        replace(row(4), messages=(Message("user", "x"), plain)),
    ]
    fitting = {"train": [(one, Encoded([0], 1)) for one in rows], "validation": [], "test": []}
    text = preflight.describe_text(tokenizer, fitting)
    assert text["first_rows_with_control_tokens"] == sorted(one.id for one in rows[:3])


def test_control_tokens_in_texts_are_counted_and_stay_text(lay_out, set_params):
    lay_out(
        train=[
            row(n, question=f"what does <|im_end|> mean? {n}", answer="It ends <|im_end|> a turn")
            for n in range(20)
        ],
        kind="text",
        test=[row(n, answer="so") for n in range(9)],
    )
    preflight.main()
    text = found()["text"]
    assert text["rows_with_control_tokens_as_text"] == 20
    assert text["control_tokens_as_text"] == {"<|im_end|>": 20}
    page = Path("reports/preflight/learned.html").read_text()
    # Framed are the template's own: two turns of three rows have two ends each, and no text has one.
    assert page.count('control">&lt;|im_end|&gt;</span>') == 6
    assert "It ends &lt;|im_end|&gt; a turn</span>" in page


def test_thoughts_that_the_template_does_not_write_are_counted_with_the_remedy(lay_out, set_params, caplog):
    def thoughtful(n):
        messages = [Message("user", f"q {n}"), Message("assistant", f"a {n}", reasoning="hm")]
        return make_row(messages, "toy", "cc0-1.0")

    rows = [*map(thoughtful, range(20)), *(row(n, answer="so") for n in range(20))]
    sides = {"train": rows, "test": [row(n, answer="so") for n in range(200, 210)], "kind": "text"}
    lay_out(template=THINKS, **sides)
    preflight.main()
    assert found()["thoughts_not_written"] == 20
    assert "20 learned answers have thoughts that the template does not write" in caplog.text
    assert "fix: set task.template_arguments: {enable_thinking: true}" in caplog.text
    lay_out(template=fix_argument("enable_thinking", True) + THINKS, **sides)
    preflight.main()
    assert found()["thoughts_not_written"] == 0


def test_learned_rows_that_the_service_would_refuse_are_counted(lay_out, set_params, caplog):
    set_params(services__guard={"max_prompt_tokens": 60, "max_messages": 2})
    turns = [Message(role, role[0]) for _ in range(2) for role in ("user", "assistant")]
    talks = [replace(row(n), messages=(*turns[:-1], row(n).messages[-1])) for n in range(3)]
    long = [row(n, question=f"{n} " * 40) for n in range(5)]
    lay_out(train=[*(row(n) for n in range(30)), *talks, *long])
    preflight.main()
    assert found()["learned_rows_refused_by_the_guard"] == {"max_prompt_tokens": 5, "max_messages": 3}
    assert "5 learned rows exceed services.guard.max_prompt_tokens (60)" in caplog.text


def test_the_page_shows_the_answer_and_its_end_as_learned_and_nothing_else(lay_out, set_params):
    lay_out(template=QWEN_3)
    preflight.main()
    page = Path("reports/preflight/learned.html").read_text()
    assert page.count("<h2>") == 3
    assert '<span class="learned">{&quot;n&quot;:0}</span>' in page
    assert page.count('class="learned control"') == 3
    assert "think" in page and 'learned">&lt;think' not in page


def test_the_page_folds_a_long_text_that_is_not_learned_and_loses_none_of_it():
    tokenizer = make_tokenizer()
    long = " ".join(f"<{number}>" for number in range(300))
    asked, told = row(0, question=long), row(0, answer=long)
    examples = [(one, encode_example(tokenizer, one.messages)) for one in (asked, told)]
    page = render_page(tokenizer, examples)
    assert page.count("<details>") == page.count("more characters</summary>") == 1
    assert escape(long) in re.sub("<details><summary>.*?</summary>", "", page)
    assert f'<span class="learned">{escape(long)}</span>' in page


def test_the_page_runs_nothing_that_rows_hold(lay_out, set_params):
    lay_out(train=[row(n, question=f"<script>alert({n})</script><img src=x>") for n in range(12)])
    preflight.main()
    page = Path("reports/preflight/learned.html").read_text()
    assert "<script" not in page and "<img" not in page and "default-src 'none'" in page


def test_answers_that_the_template_changes_are_shown_as_written_and_as_learned(lay_out, set_params):
    lay_out(
        template=GEMMA,
        train=[row(n, answer=f"  {n} ") for n in range(12)],
        test=[row(n, answer="x") for n in range(8)],
        validation=[],
        kind="text",
    )
    preflight.main()
    text = found()["text"]
    assert text["answers_changed_by_the_template"] == 12
    assert text["first_answers_changed"][0]["written"] == "  0 "
    assert text["first_answers_changed"][0]["learned"] == "0<|im_end|>"


def test_prompts_from_which_the_template_leaves_text_out_are_counted(lay_out, set_params):
    cut = "(message['content'] if role == 'model' else message['content'][:4]) | trim"
    lay_out(template=GEMMA.replace("message['content'] | trim", cut))
    preflight.main()
    text = found()["text"]
    assert text["prompts_cut_by_the_template"] > 0
    assert text["first_prompts_cut"][0]["left_out"].startswith("user: ")


def test_a_date_that_servers_would_write_anew_is_refused(lay_out, set_params):
    lay_out(template="{% set now = strftime_now %}{{ now('%Y') }}" + GEMMA)
    with pytest.raises(InputError, match="another day than the one learned"):
        preflight.main()


def test_a_token_beyond_the_embedding_is_refused(lay_out, set_params):
    tokenizer = make_tokenizer(MERGES)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    lay_out(tokenizer=tokenizer)
    for gguf in (True, False):
        set_params(export__gguf=gguf)
        with pytest.raises(InputError, match=r"embedding of 259 rows does not have: <\|pad\|> \(259\)"):
            preflight.main()


def test_an_added_token_that_nothing_needs_stops_only_a_gguf_export(lay_out, set_params):
    tokenizer = make_tokenizer(MERGES)
    tokenizer.add_tokens(["<image>"])
    lay_out(tokenizer=tokenizer)
    with pytest.raises(InputError, match="<image>") as error:
        preflight.main()
    assert "export.gguf: false" in error.value.fix
    set_params(export__gguf=False)
    preflight.main()


def test_control_tokens_that_strip_blanks_are_found_before_training(lay_out, set_params):
    tokenizer = make_tokenizer(MERGES)
    stripping = AddedToken("<|im_end|>", normalized=False, special=True, rstrip=True)
    tokenizer.add_tokens([stripping], special_tokens=True)
    lay_out(tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"the GGUF export gives .* other tokens") as error:
        preflight.main()
    assert "export.gguf: false" in error.value.fix
    set_params(export__gguf=False)
    preflight.main()


def test_an_architecture_without_gguf_is_refused_unless_no_gguf_is_wanted(lay_out, set_params):
    lay_out(model=make_model(model_type="gpt_neox", vocab_size=SIZE, hidden_act="gelu"))
    with pytest.raises(InputError, match="'gpt_neox' has no GGUF export") as error:
        preflight.main()
    assert "export.gguf: false" in error.value.fix
    set_params(export__gguf=False)
    preflight.main()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ask_base__engine": "paged"}, "ask_base.engine is paged, and the paged engine computes llama"),
        ({"services__engine": {"kind": "openvino"}}, "services.engine.kind is openvino, and it cannot read"),
        ({"ask_base__engine": "paged", "export__gguf": False}, "the model has no GGUF"),
    ],
)
def test_an_engine_that_cannot_compute_the_model_is_refused_before_training(
    lay_out, set_params, changes, message
):
    lay_out(model=make_model(model_type="gemma2", vocab_size=SIZE))
    set_params(**changes)
    with pytest.raises(InputError, match=message) as error:
        preflight.main()
    assert ": auto" in error.value.fix


def test_an_adapter_of_another_base_or_with_a_cut_file_is_refused_before_the_base_is_asked(
    lay_out, set_params, tmp_path
):
    lay_out()
    initial = tmp_path / "artifacts" / "initial_adapter"
    write_json(tmp_path / "reports" / "fetch_base" / "metrics.json", {"license": "mit", "sha256": "here"})
    write_json(initial / "adapter_config.json", {"r": 16, "lora_alpha": 32})
    write_json(initial / "origin.json", {"version": "v7", "base_sha256": "there"})
    save_file({"a": np.ones(8)}, initial / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"\(v7\) was trained on a base model") as error:
        preflight.main()
    assert "initial_adapter" in error.value.fix
    write_json(initial / "origin.json", {"version": "v7", "base_sha256": "here"})
    preflight.main()
    weights = initial / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"adapter_model.safetensors cannot be read"):
        preflight.main()
    set_params(finetune__warm_start_from=None)
    preflight.main()


def test_a_method_that_the_model_does_not_allow_is_refused(lay_out, set_params):
    lay_out()
    set_params(finetune__target_modules=["q_proj", "v_porj"], finetune__rank=16)
    with pytest.raises(InputError, match=r"no module v_porj \(nearest: v_proj\)") as error:
        preflight.main()
    assert "its linear modules are down_proj, gate_proj" in error.value.what
    set_params(finetune__target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="has lm_head, and the embedding of the base model is its output"):
        preflight.main()
    set_params(finetune__rank=17)
    with pytest.raises(InputError, match=r"finetune.rank is 17, and the base model's layers are 16 wide"):
        preflight.main()
    _, (problem,) = find_method_problems(T5Config(), load_params().finetune)
    assert "the type t5" in problem.what


def test_licences_that_the_card_would_refuse_are_refused_now(lay_out, set_params):
    lay_out(train=[row(0, license="cc-by-nc-4.0"), *[row(n) for n in range(1, 30)]])
    set_params(model_card__license="my own")
    with pytest.raises(InputError) as error:
        preflight.main()
    assert "'cc-by-nc-4.0' of 1 rows from toy is not in validate.allowed_licenses" in error.value.what
    assert "'my own' (model_card.license) is not an SPDX expression" in error.value.what


def test_a_disk_that_is_too_full_is_refused(tmp_path):
    assert base_checks.find_disk_problems(1, tmp_path) == []
    (problem,) = base_checks.find_disk_problems(1 << 60, tmp_path)
    assert "MiB left" in problem.what
    full, quantized = (base_checks.count_needed_bytes(10**9, [q]) for q in ("f16", "q4_0"))
    assert full > 2 * 10**9 and quantized < full
    alone, taught = (
        base_checks.count_healing_bytes(
            10**9, Compress(variants=("fewer_layers",), healing_teacher_weight=weight)
        )
        for weight in (0.0, 1.0)
    )
    assert taught - alone == 4 * 10**9  # the whole model, beside the one that is healed
    assert base_checks.count_healing_bytes(10**9, Compress(variants=("small_vocabulary",))) == 0


def test_smaller_models_that_the_base_cannot_have_are_refused_with_the_tensor(lay_out, set_params):
    """The tiny model is 16 wide: the blocks of 32 and of 256 weights do not divide its rows."""
    lay_out()
    set_params(compress__variants=["int8", "q4_k"], ask_base__engine="paged")
    with pytest.raises(InputError) as error:
        preflight.main()
    assert "int8, which needs rows of a multiple of 32 weights, and the base model has" in error.value.what
    assert "q4_k, which needs rows of a multiple of 256 weights" in error.value.what
    assert "take q4_k out of compress.variants, or use int4" in error.value.fix


def test_smaller_models_are_refused_where_the_engine_that_measures_them_does_not_run(tmp_path, monkeypatch):
    config = make_model(vocab_size=SIZE, hidden_size=64, intermediate_size=96).config
    config.save_pretrained(tmp_path)
    assert base_checks.find_variant_problems(["int8"], "auto", tmp_path, config) == []
    monkeypatch.setattr("services.engines.support.pick_device", lambda: torch.device("cuda"))
    (problem,) = base_checks.find_variant_problems(["int8"], "auto", tmp_path, config)
    assert "int8, which the engine paged measures, and it does not run here" in problem.what
    assert base_checks.find_variant_problems([], "auto", tmp_path, config) == []


def test_checkpoints_are_larger_where_early_stopping_keeps_the_best_weights():
    training = finetune_checks.Training("lora", 1000, 100, 1.0)
    without = load_params(REPO / "params.yaml").finetune
    assert finetune_checks.count_checkpoint_bytes(training, without) == 4000
    stopping = without.model_copy(update={"early_stopping": EarlyStopping(metric="loss", patience=2)})
    assert finetune_checks.count_checkpoint_bytes(training, stopping) == 5600


def test_a_model_whose_blocks_are_not_found_is_refused_only_where_they_are_counted():
    class Unlisted(torch.nn.Module):
        """A decoder whose blocks are in no list of their number."""

        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    model = make_model()
    model.model.layers = Unlisted()
    assert measure_reach(model, select_weights(model, None)) == 1.0
    assert measure_reach(model, select_weights(model, ["two"])) == 1.0
    with pytest.raises(InputError, match=r"blocks of \w+ are not found") as error:
        select_weights(model, 1)
    assert "a list of module names" in error.value.fix


def test_tools_that_the_service_cannot_hold_are_refused_before_training(lay_out, set_params):
    schema = {"type": "object", "properties": {"on": {"not": {"type": "string"}}}}
    tool = Tool(json.dumps({"type": "function", "function": {"name": "lamp", "parameters": schema}}))
    made = make_tokenizer(MERGES)
    made.chat_template = CHAT_TEMPLATE
    call = Message("assistant", "", (ToolCall("lamp", "{}", "x1"),))
    rows = [make_row([Message("user", f"q {n}"), call], "toy", "cc0-1.0", tools=[tool]) for n in range(30)]
    set_params(finetune__max_length=4000)
    template = adapt_template(made, {}, True, "default")
    model = make_model(vocab_size=SIZE, max_position_embeddings=8192)
    lay_out(template, model, kind="tools", train=rows, validation=rows[:4], test=rows[:10])
    with pytest.raises(InputError, match="30 rows have tools that the service refuses in any request"):
        preflight.main()
    assert 'lamp: $.properties.on: Unimplemented keys: ["not"]' in found()["problems"][-1]


def test_all_problems_are_in_one_message(lay_out, set_params, tmp_path):
    tokenizer = make_tokenizer(MERGES)
    tokenizer.add_tokens(["<image>"])
    lay_out(tokenizer=tokenizer, train=[row(0, answer="[1"), row(1)])
    (tmp_path / "taken").write_text("a file, where a folder should be")
    set_params(
        model_card__license="my own",
        finetune__checkpoint_url=f"file://{tmp_path}/taken/checkpoints",
        finetune__devices=100_000,
    )
    with pytest.raises(InputError, match="6 problems, found before training") as error:
        preflight.main()
    for part in (
        "<image>",
        "cannot be written, read and cleared",
        "SPDX",
        "not of kind json",
        "train: 2 rows are left of 2",
    ):
        assert part in error.value.what


def test_test_answers_that_no_model_can_give_in_full_are_counted(lay_out, set_params, caplog):
    lay_out(test=[row(n, answer='{"n":"' + "z" * 60 + '"}') for n in range(200, 210)])
    preflight.main()
    assert found()["test_answers_over_max_new_tokens"] == 10
    assert "longer than ask_base.max_new_tokens (40)" in caplog.text


ENGLISH = "turn on the light in the kitchen, number {}"
GERMAN = "schalte bitte das Licht in der Küche ein, Nummer {}"


@pytest.mark.parametrize(
    ("stated", "tags", "problem"),
    [
        (["en"], [None], None),
        (["en-GB"], [None], None),
        (["de"], [None], "names de, which no row has: detected en 44"),
        (["en", "ja"], [None], "names ja, which no row has: detected en 44"),
        (["la"], [None], None),  # the detector does not know Latin
        (["en", "fr"], ["en", "fr"], None),
        (["en", "fr"], ["en"], "names fr, which no row has: by tag en 44"),
        (["en"], ["en", "fr-CA"], "does not name the rows' tag language: fr (22 rows)"),
        (["en"], ["English"], None),  # no code, so the text is looked at
        (None, ["fr"], None),
    ],
)
def test_languages_that_the_rows_do_not_have_are_refused(lay_out, set_params, stated, tags, problem):
    set_params(model_card__language=stated)
    sides = {"train": range(30), "validation": range(100, 104), "test": range(200, 210)}
    lay_out(
        **{
            side: [row(n, question=ENGLISH.format(n), language=tags[n % len(tags)]) for n in numbers]
            for side, numbers in sides.items()
        }
    )
    if problem is None:
        preflight.main()
        assert found()["problems"] == []
    else:
        with pytest.raises(InputError, match=re.escape(problem)):
            preflight.main()
        assert found()["success"] is False


def test_a_language_of_many_rows_that_is_not_stated_is_told(lay_out, set_params, caplog):
    set_params(model_card__language=["en"])
    train = [row(n, question=(GERMAN if n % 2 else ENGLISH).format(n)) for n in range(60)]
    lay_out(train=train)
    preflight.main()
    assert "in each of de, which model_card.language does not name" in caplog.text
    assert found()["languages"]["detected"]["de"] == 30


def test_a_language_that_is_no_code_is_refused_by_name(set_params, lay_out):
    lay_out()
    set_params(model_card__language=["German"])
    with pytest.raises(InputError, match=r"model_card.language.*German"):
        preflight.main()


@pytest.mark.parametrize(("exports", "engine"), [(True, "paged"), (False, "transformers")])
def test_which_engine_will_answer_is_kept_for_the_estimate(lay_out, set_params, exports, engine):
    lay_out()
    set_params(export__gguf=exports)
    preflight.main()
    assert found()["answered_by"] == engine


def test_what_a_method_trains_is_counted(lay_out, set_params):
    lay_out(model=make_model(vocab_size=SIZE, num_hidden_layers=3))
    set_params(finetune__rank=2)
    preflight.main()
    lora = found()["training"]
    block = (lora["parameters"] - 16 * (SIZE + 1)) // 3
    matrices = 2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32)
    assert (lora["method"], lora["trained_parameters"], lora["reach"]) == ("lora", 3 * 2 * matrices, 1.0)
    set_params(finetune__rank=2, finetune__method="dora")
    preflight.main()
    assert found()["training"]["trained_parameters"] == 3 * (2 * matrices + 16 + 16 + 2 * 8 + 2 * 32 + 16)
    set_params(finetune__method="full")
    preflight.main()
    assert found()["training"] == {**lora, "method": "full", "trained_parameters": lora["parameters"]}
    set_params(finetune__method="partial", finetune__trained_modules=1)
    preflight.main()
    last = {"method": "partial", "trained_parameters": block, "reach": 1 / 3}
    assert found()["training"] == lora | last
    set_params(finetune__method="partial", finetune__trained_modules=["layers.1", "embed_tokens"])
    preflight.main()
    both = {"method": "partial", "trained_parameters": block + 16 * SIZE, "reach": 1.0}
    assert found()["training"] == lora | both


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        (
            {"method": "partial", "trained_modules": 4},
            "is 4, and the base model has 2 transformer",
            "at most 2",
        ),
        ({"method": "partial", "trained_modules": ["mpl"]}, "has 'mpl', and the base model has no", "mlp"),
        ({"method": "partial", "trained_modules": ["lm_head"]}, "has no weights of its own", "the embedding"),
        (
            {"warm_start_from": "artifacts/initial_adapter", "method": "full"},
            "method: full here, lora",
            "empty",
        ),
        (
            {"warm_start_from": "artifacts/initial_adapter", "rank": 3},
            "rank: 3 here, 16 there",
            "finetune.rank",
        ),
    ],
)
def test_a_method_that_cannot_train_this_model_is_refused(lay_out, set_params, changes, message, fix):
    lay_out()
    write_json(Path("reports/fetch_base/metrics.json"), {"license": "apache-2.0", "sha256": "base"})
    adapter = Path("artifacts/initial_adapter")
    write_json(adapter / "adapter_config.json", {"r": 16, "lora_alpha": 32})
    save_file({"a": np.zeros(1)}, adapter / "adapter_model.safetensors")
    write_json(adapter / "origin.json", {"version": "v", "base_sha256": "base"})
    settings = {f"finetune__{key}": value for key, value in {"warm_start_from": None, **changes}.items()}
    set_params(**settings)
    with pytest.raises(InputError, match=message) as error:
        preflight.main()
    assert fix in error.value.fix
    assert not found()["success"]


def test_a_head_over_a_single_label_is_refused(lay_out, set_params):
    lay_out(kind="label")
    set_params(task__kind="label", task__label_key=None, finetune__method="head", export__gguf=False)
    task = {"kind": "label", "label_key": None, "labels": ["yes"]}
    write_json(Path("artifacts/curate/task.json"), task)
    with pytest.raises(InputError, match="head learns which label an answer is, and the task has 1: yes"):
        preflight.main()


def test_weights_that_are_quantized_are_not_trained(lay_out, set_params):
    lay_out()
    config = json.loads(Path("artifacts/fetch_base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    write_json(Path("artifacts/fetch_base/config.json"), config)
    set_params(finetune__method="full", export__gguf=False)
    with pytest.raises(InputError, match=r"are quantized, and finetune\.method full trains them"):
        preflight.main()


def test_a_training_that_the_memory_cannot_hold_is_refused(lay_out, set_params, monkeypatch):
    lay_out()
    set_params(finetune__method="full")
    monkeypatch.setattr(memory_checks, "measure_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"and this machine has 0 MiB of memory") as error:
        preflight.main()
    assert "finetune.method: lora" in error.value.fix


def test_a_teacher_that_stays_beside_the_model_is_counted_with_it(lay_out, set_params, monkeypatch):
    lay_out()
    shutil.copytree("artifacts/fetch_base", "teacher")
    set_params(finetune__method="distill", finetune__teacher="teacher", finetune__dtype="float32")
    params = load_params().finetune
    training, _ = find_method_problems(read_config(Path("artifacts/fetch_base")), params)
    own, teacher = memory_checks.count_own_bytes(training, params), 4 * training.parameters
    monkeypatch.setattr(memory_checks, "measure_memory", lambda device: own + teacher)
    preflight.main()
    assert found()["training"]["teacher_parameters"] == training.parameters
    monkeypatch.setattr(memory_checks, "measure_memory", lambda device: own + teacher - 1)
    with pytest.raises(InputError, match=r"teacher teacher take 0 MiB beside 0 MiB of the model") as error:
        preflight.main()
    assert "finetune.distill: answers" in error.value.fix
    set_params(finetune__method="distill", finetune__teacher="teacher", finetune__distill="answers")
    preflight.main()  # it has left before the model that learns is loaded


def test_variants_need_validation_rows_to_be_compared_on(lay_out, set_params):
    lay_out()
    fitting, misfits = ({side: [] for side in preflight.SIDES} for _ in range(2))
    params = load_params()
    params = params.model_copy(update={"compress": Compress(variants=("int8",))})
    problems = preflight.find_size_problems(params, read_task(), fitting, misfits)
    assert [one.what for one in problems if "compress.variants are compared on validation rows" in one.what]
    problems = preflight.find_size_problems(load_params(), read_task(), fitting, misfits)
    assert not [one.what for one in problems if "compress" in one.what]


def test_gpus_that_share_a_model_have_their_memory_together(lay_out, set_params, monkeypatch):
    lay_out()
    set_params(finetune__method="full")
    finetune = load_params().finetune
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert memory_checks.count_sharing(finetune, "cuda") == min(8, finetune.batch_size)
    assert memory_checks.count_sharing(finetune, "cpu") == 1
    for change in ({"sharding": "none"}, {"method": "grpo"}):
        assert memory_checks.count_sharing(finetune.model_copy(update=change), "cuda") == 1
    monkeypatch.setattr(memory_checks, "measure_memory", lambda device: 1000)
    set_params(finetune__method="full", finetune__launcher="torchrun")
    preflight.main()  # how many hosts there will be is not known


def test_a_rate_for_adapters_is_a_warning_where_weights_are_trained(lay_out, set_params, caplog):
    lay_out()
    set_params(finetune__method="full")
    preflight.main()
    assert "finetune.learning_rate is 0.003, a rate for adapters" in caplog.text
    caplog.clear()
    set_params(finetune__method="full", finetune__learning_rate=5e-5)
    preflight.main()
    assert "learning_rate" not in caplog.text


def paired(n, worse="no"):
    messages = [Message("user", f"question {n}"), Message("assistant", f'{{"n":{n % 5}}}')]
    return make_row(messages, "toy", "cc0-1.0", rejected=Message("assistant", worse) if worse else None)


def test_pairs_are_counted_and_a_method_that_needs_them_is_refused_without(lay_out, set_params, caplog):
    lay_out(train=[*(paired(n) for n in range(20)), paired(20, "x" * 200), *(row(n) for n in range(30, 35))])
    set_params(finetune__method="dpo")
    preflight.main()
    counted = found()["preferences"]
    assert (counted["pairs"], counted["rows"], counted["rows_without_preference"]) == (20, 20, 5)
    assert counted["excluded"] == {"too_long": 1}
    assert counted["learned_tokens"] == 20 * (len('{"n":0}.') + len("no."))
    assert "finetune.method: dpo starts from the base model" in caplog.text
    assert "finetune.learning_rate is 0.003, a rate for learning answers" in caplog.text
    lay_out()
    for method in ("dpo", "orpo"):
        set_params(finetune__method=method)
        with pytest.raises(InputError, match=f"{method} learns from pairs, and none of the 30 training rows"):
            preflight.main()
        assert found()["preferences"]["pairs"] == 0 and not found()["success"]
    set_params()
    preflight.main()
    assert "preferences" not in found()


def test_ratings_are_counted_and_both_kinds_are_needed(lay_out, set_params):
    lay_out(train=[row(n) for n in range(30)])
    set_params(finetune__method="kto")
    refused = Path("artifacts/split/refused.parquet")
    bad = [replace(row(n, "no"), is_desirable=False) for n in range(50, 54)]
    write_rows(refused, bad)
    with pytest.raises(InputError, match="learns from good and from bad answers, and there are 0 and 4"):
        preflight.main()
    lay_out(train=[replace(row(n), tags={"feedback": "thumb"}) if n < 6 else row(n) for n in range(30)])
    preflight.main()
    counted = found()["preferences"]
    assert (counted["good_answers"], counted["bad_answers"], counted["rows_without_preference"]) == (6, 4, 24)


def test_prompts_none_of_which_leaves_room_for_an_answer_are_refused_with_grpo(lay_out, set_params):
    lay_out(train=[row(n, question=f"{n} {'x' * 200}") for n in range(30)])
    set_params(finetune__method="grpo", finetune__max_length=230)
    with pytest.raises(
        InputError, match="none of 30 prompts leaves room for an answer of 10 tokens"
    ) as error:
        preflight.main()
    assert "raise finetune.max_length" in error.value.fix
    set_params(finetune__method="grpo", finetune__max_length=512)
    preflight.main()


def test_rows_that_the_start_was_trained_on_are_refused_where_none_is_gone_over_again(lay_out, set_params):
    train = [row(n) for n in range(30)]
    lay_out(train=train)
    write_json(Path("reports/fetch_base/metrics.json"), {"license": "apache-2.0", "sha256": "base"})
    start = Path("artifacts/initial_adapter")
    write_json(start / "adapter_config.json", {"r": 16, "lora_alpha": 32})
    save_file({"a": np.ones(1)}, start / "adapter_model.safetensors")
    write_json(start / "origin.json", {"version": "v1", "base_sha256": "base"})
    write_trained_ids([one.id for one in train], start)
    set_params(finetune__replay_share=0.0)
    with pytest.raises(InputError, match="v1 was trained on all 30 training rows already") as error:
        preflight.main()
    assert "raise finetune.replay_share" in error.value.fix
    write_trained_ids([one.id for one in train[1:]], start)
    preflight.main()


def test_a_metric_that_cannot_stop_a_training_is_refused_before_anything_costly(lay_out, set_params):
    lay_out()
    set_params(finetune__early_stopping={"metric": "rouge_l", "patience": 2})
    with pytest.raises(InputError, match="metric is rouge_l, and answers of kind json have none") as error:
        preflight.main()
    assert "set it to one of loss, exact_match" in error.value.fix
    set_params(finetune__early_stopping={"metric": "exact_match", "patience": 2})
    preflight.main()
    lay_out(validation=[])
    with pytest.raises(InputError, match="early_stopping is set, and there are no validation rows"):
        preflight.main()


def test_the_rate_of_a_training_from_an_adapter_is_the_lowered_one(set_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_params(finetune__method="full")
    finetune = load_params().finetune
    monkeypatch.setattr(finetune_checks, "read_initial_adapter", lambda _: object())
    lowered = "0.003 times finetune.warm_start_rate_factor (0.00099), a rate for adapters"
    assert lowered in finetune_checks.describe_high_rate(finetune)
    low = finetune.model_copy(update={"learning_rate": 1e-3})
    assert finetune_checks.describe_high_rate(low) is None
    monkeypatch.setattr(finetune_checks, "read_initial_adapter", lambda _: None)
    assert "is 0.001, a rate for adapters" in finetune_checks.describe_high_rate(low)

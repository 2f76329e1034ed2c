import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import format_canonical_json, make_row, write_rows
from stages.common.repository.dvc_lock import compute_dvc_hash
from stages.model_card.__main__ import main
from stages.model_card.checks import check_metrics
from stages.model_card.evidence import BEFORE
from stages.model_card.sections import name_objective, to_hub_license

ROOT = Path(__file__).parents[3]


def rows_of(side, count):
    return [
        make_row(
            [Message("user", f"{side} {i}"), Message("assistant", '{"intent":"On"}')],
            "toy/1",
            "apache-2.0",
            group=f"{side}{i // 2}",
            tags={"language": "en"},
            origin="template",
        )
        for i in range(count)
    ]


def results(rows, **values):
    return {name: {"value": v, "low": v, "high": v, "n": rows} for name, v in values.items()}


def evidence():
    """What the stages report of 40 toy rows, all figures in agreement."""
    base = results(10, exact_match=0.0, intent_accuracy=0.1, slot_f1=0.0, perplexity=60.0)
    tuned = results(10, exact_match=0.7, intent_accuracy=0.9, slot_f1=0.8, perplexity=1.2)
    difference = {
        name: {key: tuned[name][key] - base[name][key] for key in ("value", "low", "high")}
        | {"n": 10, "p_value": 0.0005}
        for name in tuned
    }
    finding = {
        "group": "person_gender",
        "kind": "outcome",
        "passed": True,
        "statement": "person_gender: even.",
    }
    part = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 5, "groups": 2}
    return {
        "fetch_base": {
            "origin": "package",
            "name": "toy-base",
            "revision": "1.0",
            "file": "toy.gguf",
            "license": "Apache-2.0",
            "sha256": "ab" * 32,
            "parameters": 134515008,
        },
        "collect": {
            "rows": 42,
            "rejected": 3,
            "rejected_by_reason": {"broken_json": 3},
            "by_license": {"apache-2.0": 42},
            "by_origin": {"template": 42},
            "sources": [{"name": "toy", "rows": 42}],
        },
        "curate": {
            "rows_in": 42,
            "kept": 40,
            "rejected": 2,
            "rejected_by_reason": {"near_duplicate": 2},
            "kept_by_source": {"toy/1": 40},
            "rows_changed": 3,
        },
        "validate": {
            "rows": 40,
            "success": True,
            "expectations_met": 9,
            "expectations_total": 10,
            "warnings": 1,
        },
        "check_bias": {"rows": 40, "success": True, "findings": [finding]},
        "split": {
            "rows_in": 40,
            "rows": {"train": 24, "validation": 4, "test": 10},
            "groups": {"train": 12, "validation": 2, "test": 5},
            "test_answers": 10,
            "feedback_rows": 0,
            "feedback_rows_of_held_out_groups": 0,
            "test_rows_over_cap": 1,
            "train_rows_over_cap": 0,
            "train_rows_not_drawn": 0,
            "train_rows_removed_as_near_duplicates": 1,
            "rows_removed_as_known_answers": 0,
            "labels_without_test_rows": ["HassBroadcast"],
            "proof": {
                "groups_on_two_sides": 0,
                "conversations_on_two_sides": 0,
                "near_duplicates_across": 0,
                "highest_similarity": 0.61,
            },
        },
        "finetune": {
            "method": "lora",
            "started_from": "base",
            "train_rows": 23,
            "rejected_long_rows": 1,
            "rejected_refused_rows": 0,
            "rows_not_replayed": 0,
            "steps": 2,
            "train_tokens": 999,
            "dtype": "bfloat16",
            "trained_parameters": 4884480,
            "train_loss": 0.11,
            "validation_loss": 0.12,
            "throughput": {"seconds": 4242.4},
        },
        "compress": {"models": {}, "chosen": None, "choice": "compress.variants is empty."},
        "evaluate": {
            "task": "json",
            "class_name": "intent",
            "calibration": None,
            "metrics": [{"name": name, "meaning": f"what {name} is", "scale": 1.0} for name in tuned],
            "resolution": {"statement": "On 10 test rows a difference of 40 points is seen."},
            "primary": "exact_match",
            "rows": 10,
            "test_rows": 10,
            "groups": 5,
            "confidence": 0.95,
            "resamples": 2000,
            "answer_limit_tokens": 42,
            "references_over_limit": 0,
            "base": base,
            "tuned": tuned,
            "difference": difference,
            "slices": {"intent": {"On": part, "Off": {**part, "value": 0.25}}, "person_gender": {}},
            "confusions": [{"expected": "On", "answered": "Off|x", "n": 2}],
            "errors": {"rows": 3, "by_type": {"wrong label": 2, "invalid": 1}, "right_in_base_only": 0},
            "throughput": {"tuned": {"rows_per_s": 4242.4}},
        },
    }


def write_lock():
    """Write the dvc.lock of a run that made these files."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    outs = {stage: [Path(f"reports/{stage}/metrics.json")] for stage in BEFORE}
    outs["split"].append(Path("artifacts/split"))
    outs["finetune"].append(Path("artifacts/finetune"))
    stages = {
        stage: {
            "cmd": f"python -m stages.{stage}",
            "params": {"params.yaml": {stage: params[stage], "task.kind": "json"}},
            "outs": [
                {"path": str(path), "hash": "md5", "md5": compute_dvc_hash(path)}
                for path in paths
                if path.exists()
            ],
        }
        for stage, paths in outs.items()
    }
    stages["evaluate"]["deps"] = [
        {
            "path": "artifacts/split/test.parquet",
            "md5": compute_dvc_hash(Path("artifacts/split/test.parquet")),
        }
    ]
    write_text(Path("dvc.lock"), yaml.safe_dump({"schema": "2.0", "stages": stages}))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder in which all stages before the card have run."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")
    for stage, report in evidence().items():
        write_json(Path(f"reports/{stage}/metrics.json"), report)
    for picture in (
        "evaluate/plots/comparison",
        "evaluate/plots/slices",
        "evaluate/plots/confusion",
        "finetune/loss",
        "check_bias/groups",
    ):
        write_text(Path(f"reports/{picture}.svg"), "<svg/>")
    for side, count in (("train", 24), ("validation", 4), ("test", 10)):
        write_rows(Path(f"artifacts/split/{side}.parquet"), rows_of(side, count))
    config = {
        "base_model_name_or_path": "artifacts/fetch_base",
        "target_modules": ["q_proj"],
        "r": 16,
        "lora_alpha": 32,
    }
    finetune = yaml.safe_load(Path("params.yaml").read_text())["finetune"]
    write_json(
        Path("artifacts/finetune/adapter_config.json"),
        config | {"r": finetune["rank"], "lora_alpha": finetune["alpha"]},
    )
    write_lock()
    return tmp_path


def card():
    main()
    return Path("reports/model_card/README.md").read_text()


def change(stage, **keys):
    """Change figures of one report, as if its stage had written them."""
    path = Path(f"reports/{stage}/metrics.json")
    write_json(path, read_json(path) | keys)
    write_lock()


def problems():
    with pytest.raises(InputError) as error:
        main()
    assert not Path("reports/model_card").exists()
    return error.value.what


def test_the_card_states_the_results_with_intervals(project):
    text = card()
    assert (
        "| exact_match | 0.000 (0.000 to 0.000) | 0.700 (0.700 to 0.700) | "
        "+0.700 (+0.700 to +0.700) | 0.0005 |"
    ) in text
    assert "person_gender: even." in text
    assert "| `toy/1` | apache-2.0 | template | 24 | 4 | 10 |" in text
    assert "`HassBroadcast`" in text
    assert "`On` answered as `Off\\|x` (2)" in text
    assert "rank | 16" in text


def test_the_example_of_a_conversation_with_tools_is_python_that_has_them(project):
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {"additionalProperties": False}}}
    messages = [
        Message("user", "on"),
        Message("assistant", "", (ToolCall("lamp", '{"on": true}'),)),
        Message("tool", "done"),
        Message("assistant", "It is on."),
    ]
    rows = [
        make_row(
            [Message("user", f"{n}"), *messages],
            "toy/1",
            "apache-2.0",
            f"test{n // 2}",
            tools=[Tool(json.dumps(tool))],
        )
        for n in range(10)
    ]
    write_rows(Path("artifacts/split/test.parquet"), [replace(row, origin="template") for row in rows])
    write_lock()
    code = card().split("```python")[1].split("```")[0]
    given = {}
    exec(code[code.index("messages =") : code.index("prompt =")], given)
    assert given["tools"] == [tool]
    assert given["messages"][2]["tool_calls"][0]["function"] == {"name": "lamp", "arguments": {"on": True}}
    assert "tools=tools" in code


def test_what_users_wrote_is_text_in_the_card(project):
    (finding,) = evidence()["check_bias"]["findings"]
    hostile = "language: of 9 rows <img src=x onerror=y> has fewest and [a](javascript:x) | most"
    change("check_bias", findings=[finding | {"statement": hostile}])
    render = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render
    html = render(card().partition("\n---\n")[2])
    assert "&lt;img src=x onerror=y&gt; has fewest and [a](javascript:x) | most" in html
    assert "<img src=x" not in html and 'href="javascript' not in html


def test_the_primary_metric_comes_first(project):
    names = re.findall(r"^\| (\w+) \| [-\d]", card(), re.M)
    assert names[:4] == ["exact_match", "intent_accuracy", "slot_f1", "perplexity"]


def test_weak_slices_come_with_their_rows_and_groups(project):
    weak = re.search(r"Weakest by intent.*", card()).group()
    assert "`Off` 0.250 (0.100 to 0.900) on 5 rows in 2 groups; `On` 0.500" in weak


def test_the_hub_can_read_the_front_matter(project):
    from huggingface_hub import ModelCard

    card()
    data = ModelCard.load("reports/model_card/README.md").data
    assert data.license == "apache-2.0"
    assert data.base_model == "toy-base"
    assert data.library_name == "peft"
    assert data.language == ["en"]
    by_type = {result.metric_type: result.metric_value for result in data.eval_results}
    assert by_type == {"exact_match": 0.7, "accuracy": 0.9, "f1": 0.8, "perplexity": 1.2}


def test_missing_statements_are_shown_as_not_stated(project):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["model_card"] |= {"intended_use": None, "out_of_scope": None}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for side, count in (("train", 24), ("validation", 4), ("test", 10)):
        rows = [
            make_row(r.messages, r.source, r.license, r.group, {"language": "Deutsch"}, r.origin)
            for r in rows_of(side, count)
        ]
        write_rows(Path(f"artifacts/split/{side}.parquet"), rows)
    write_lock()
    text = card()
    assert "**Intended use:** not stated." in text and "**Out of scope:** not stated." in text
    assert "Languages: not stated." in text and "\nlanguage:" not in text


def test_the_card_says_how_many_rows_were_not_drawn(project):
    assert "split.max_train_rows" not in card()
    change("split", test_rows_over_cap=0, train_rows_not_drawn=1)
    assert "1 rows were not drawn (`split.max_train_rows`).\n\n**Validation:**" in card()


def test_the_card_has_no_empty_sections(project):
    text = card().lower()
    assert "more information needed" not in text
    assert "none" not in re.sub(r"```json.*?```", "", text, flags=re.S).replace("nonexistent", "")


def test_the_card_has_no_speeds_and_is_the_same_twice(project):
    first = card()
    assert "4242" not in first
    assert card() == first


def test_the_card_compares_smaller_models_and_names_the_one_that_is_served(project):
    assert "Smaller models" not in card()
    shutil.rmtree("reports/model_card")
    quality = results(10, exact_match=0.7)
    report = {
        "primary": "exact_match",
        "chosen": "int8",
        "choice": "compress.choose is int8.",
        "models": {
            "exported": {"bytes": 2 << 20, "results": quality, "lost_points": 0.0},
            "int8": {"bytes": 1 << 20, "results": quality, "lost_points": 0.4},
        },
    }
    change("compress", **report)
    assert 'evaluate.compression is null, and compress.chosen "int8"' in problems()
    change("evaluate", compression="int8")
    text = card()
    assert "| int8 | 1.0 | 0.700 (0.700 to 0.700) | 0.40 |" in text
    assert "those of int8, which is what is served" in text


def test_the_card_names_the_initial_adapter_and_the_rows_from_feedback(project):
    text = card()
    assert "The adapter was initialized at random." in text
    assert "user feedback" not in text
    change("finetune", started_from="0123456789ab")
    change("split", feedback_rows=12)
    assert (
        "Training started from the adapter of version `0123456789ab`; 12 rows came from user feedback"
    ) in card()
    change("finetune", train_rows=4, rows_not_replayed=19)
    assert "`0123456789ab`; 19 rows that it was trained on before were not replayed; 12 rows" in card()


def test_every_plot_of_the_card_is_in_its_folder(project):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card())
    assert len(links) == 5
    assert all((project / "reports/model_card" / link).is_file() for link in links)


def test_the_card_names_the_commit_and_the_changed_code(project):
    assert "| code | not under git |" in card()
    for command in (
        ["init", "-q"],
        ["add", "params.yaml"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"| code (git) | {commit} |" in card()
    write_text(Path("params.yaml"), Path("params.yaml").read_text() + "\n")
    write_text(Path("stages/new.py"), "")
    assert "uncommitted changes in params.yaml, stages/new.py" in card()


def test_all_problems_are_in_one_message(project):
    Path("reports/split/metrics.json").unlink()
    Path("reports/finetune/loss.svg").unlink()
    change("curate", rows_in=41)
    change("validate", success=False, expectations_met=None)
    found = problems()
    assert found.startswith("6 problems")
    for part in (
        "reports/split/metrics.json does not exist (dvc repro split)",
        "reports/finetune/loss.svg does not exist",
        "collect.rows is 42, and curate.rows_in is 41",
        "curate.kept + curate.rejected is 42, and curate.rows_in is 41",
        "validate.success is false, not true",
        "validate.expectations_met is missing",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("stage", "keys", "part"),
    [
        ("collect", {"by_license": {"mit": 41}}, "collect.by_license.* is 41"),
        ("curate", {"rejected_by_reason": {}}, "curate.rejected_by_reason.* is 0"),
        ("split", {"rows": {"train": 23, "validation": 4, "test": 10}}, "split.rows.train is 23"),
        ("finetune", {"train_rows": 20}, "finetune.rejected_refused_rows + finetune.rows_not_replayed is 21"),
        ("evaluate", {"test_rows": 11}, "evaluate.test_rows is 11, and split.test_answers is 10"),
        ("evaluate", {"rows": 9}, "evaluate.tuned.exact_match.n is 10, and evaluate.rows is 9"),
        ("evaluate", {"primary": "beauty"}, "not one of its metrics"),
        ("evaluate", {"base": {}}, "other metrics"),
        (
            "fetch_base",
            {"license": "notalicense"},
            "'notalicense' of the base model is not an SPDX",
        ),
    ],
)
def test_figures_that_disagree_are_named(project, stage, keys, part):
    change(stage, **keys)
    assert part in problems()


def test_a_difference_that_is_none_is_named(project):
    report = evidence()["evaluate"]
    report["difference"]["exact_match"]["value"] = 0.71
    change("evaluate", **report)
    assert "evaluate.difference.exact_match.value is 0.71, and tuned minus base 0.7" in problems()


def test_a_base_without_a_revision_has_a_card(project):
    change("fetch_base", revision=None, origin="folder", file=None)
    assert "revision" not in card().split("Base model:")[1].split("\n")[0]


def test_a_base_in_a_folder_is_named_without_its_path_on_this_machine(project):
    params = yaml.safe_load(Path("params.yaml").read_text())
    folder = {"origin": "folder", "name": "/srv/ann/models/Own-1B/", "revision": None, "file": None}
    params["fetch_base"] |= {**folder, "sha256": None}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    change("fetch_base", **folder | {"name": "Own-1B"})
    text = card()
    shown = json.loads(text.split("```json\n")[1].split("```")[0])
    assert shown["fetch_base"]["name"] == "Own-1B" and "/srv/ann" not in text
    assert hashlib.sha256(format_canonical_json(shown).encode()).hexdigest() in text


def test_rows_under_a_licence_that_is_not_allowed_are_named(project):
    row = make_row([Message("user", "u"), Message("assistant", "a")], "mine", "gpl-3.0-only", group="z")
    write_rows(Path("artifacts/split/validation.parquet"), [*rows_of("validation", 3), row])
    write_lock()
    assert "the licence 'gpl-3.0-only' of mine is not in validate.allowed_licenses" in problems()


def test_an_adapter_of_another_base_is_named(project):
    path = Path("artifacts/finetune/adapter_config.json")
    write_json(path, read_json(path) | {"base_model_name_or_path": "elsewhere", "r": 3})
    write_lock()
    found = problems()
    assert "the adapter was trained on elsewhere" in found
    assert "the adapter has rank 3, and finetune.rank was 16" in found


@pytest.mark.parametrize(
    ("settings", "kind", "trained"),
    [
        ({"method": "full"}, "A full fine-tune", "All weights were trained; the loss"),
        (
            {"method": "partial", "trained_modules": 4},
            "A partial fine-tune",
            "The weights of the last 4 transformer blocks were trained; the loss",
        ),
        (
            {"method": "partial", "trained_modules": ["mlp", "lm_head"]},
            "A partial fine-tune",
            "The weights of lm_head, mlp were trained; the loss",
        ),
    ],
)
def test_the_card_of_trained_weights_names_them_and_how_they_are_loaded(project, settings, kind, trained):
    Path("artifacts/finetune/adapter_config.json").unlink()
    config = {"base_model_name_or_path": "artifacts/fetch_base", **settings}
    write_json(Path("artifacts/finetune/replaced_config.json"), config)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["finetune"] |= settings
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    change("finetune", method=settings["method"])
    text = card()
    assert f"\n{kind} of 4,884,480 parameters on" in text
    assert f"\n{trained} covers only the answers" in text
    assert "Training started from the weights of the base model." in text
    assert 'load_file("artifacts/finetune/replaced_weights.safetensors"), strict=False' in text
    assert "peft" not in text


GOOD_AND_BAD = {"good": 20, "bad": 22, "accuracy": 0.875, "margin": 1.25}


@pytest.mark.parametrize(
    ("method", "adapter", "found", "expected"),
    [
        ("rslora", {"use_rslora": True}, {}, ["rsLoRA of rank 16 on q_proj; the loss"]),
        ("dora", {"use_dora": True}, {}, ["DoRA of rank 16 on q_proj; the loss"]),
        ("qlora", {}, {}, ["LoRA of rank 16 on q_proj; the loss", "- qlora\n"]),
        (
            "kto",
            {},
            {"held_out": GOOD_AND_BAD},
            [
                ", by Kahneman-Tversky Optimization (KTO)",
                "on 20 good and 22 bad answers that were not learned",
            ],
        ),
        (
            "orpo",
            {},
            {"held_out": {"pairs": 42, "accuracy": 0.875, "margin": 1.25}},
            [", by Odds Ratio Preference Optimization (ORPO)", "on 42 pairs that were not learned"],
        ),
        ("distill", {}, {"teacher": "big"}, [", by distillation of a teacher; the loss"]),
        (
            "grpo",
            {},
            {"figures": {"reward": {"first": 0.5, "last": 0.75}, "compared": {"first": 0.4, "last": 0.3}}},
            [
                ", by Group Relative Policy Optimization (GRPO)",
                "**Sampled answers** in the first tenth of the updates, and in the last: mean reward 0.500 "
                "and 0.750; share of prompts whose answers differ in worth 0.400 and 0.300.",
            ],
        ),
    ],
)
def test_the_card_of_a_method_names_it_and_its_figures(project, method, adapter, found, expected):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["finetune"] |= {"method": method, "teacher": found.get("teacher")}
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    config = Path("artifacts/finetune/adapter_config.json")
    write_json(config, read_json(config) | adapter)
    change("finetune", method=method, **found)
    text = card()
    for part in expected:
        assert part in text
    assert ("**Preference** on" in text) == ("held_out" in found)
    assert ("**Sampled answers**" in text) == ("figures" in found)


def test_the_card_of_preferences_names_the_objective_and_how_well_it_was_learned(project):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["finetune"]["method"] = "dpo"
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    held_out = {"pairs": 42, "accuracy": 0.875, "margin": 1.25, "likelier_before": 0.5, "likelier_after": 0.9}
    change("finetune", method="dpo", held_out=held_out)
    text = card()
    assert (
        ", by Direct Preference Optimization (DPO), on pairs of a better and a worse answer; the loss" in text
    )
    assert "**Preference** on 42 pairs that were not learned: accuracy 0.875 (0.5 is chance)" in text
    assert "the likelier one in 50 % of them before this training, and is in 90 % now." in text
    change("finetune", held_out={"pairs": 0})
    assert "**Preference**" not in card()


def test_the_card_of_preferences_on_the_test_has_both_models_with_intervals(project):
    measured = {
        name: results(30, accuracy=accuracy, margin=margin)
        for name, accuracy, margin in (("before", 0.5, -1.5), ("tuned", 0.8, 2.25), ("difference", 0.3, 3.75))
    }
    measured["difference"]["accuracy"]["p_value"] = 0.0123
    found = {"pairs": 30, "groups": 30, "left_out": {}, "started_from": "0123456789ab", **measured}
    found["tuned"]["accuracy"]["low"] = 0.9
    change("evaluate", preferences=found)
    assert "evaluate.preferences.tuned.accuracy is not a number with an interval" in problems()
    found["tuned"]["accuracy"]["low"] = 0.8
    change("evaluate", preferences=found)
    text = card()
    assert "**Preference on the test:** 30 test rows have a rejected answer" in text
    assert "the likelier one in 0.800 (0.800 to 0.800) of them; for version `0123456789ab`, from" in text
    assert "in 0.500 (0.500 to 0.500) (difference +0.300 (+0.300 to +0.300), p 0.0123;" in text
    for missing in ({"pairs": 3, "left_out": {}, "skipped": "too few", "started_from": "base"}, None):
        change("evaluate", preferences=missing)
        assert "**Preference on the test:**" not in card()


@pytest.mark.parametrize(
    "parts",
    [
        {"rows_without_preference": 9, "rows_held_out": 4},
        {"rows_without_preference": 14, "rows_held_out": 4, "refused_rows_read": 5},
        {"prompts_without_room": 13},
        {"teacher_answers_left_out": {"cut": 10, "not valid": 3}},
    ],
)
def test_rows_that_a_method_leaves_out_are_part_of_the_sum(project, parts):
    rows = evidence()["split"]["rows"]["train"] - 13
    rejected = evidence()["finetune"]["rejected_long_rows"]
    change("finetune", train_rows=rows - rejected - 1, **parts)
    assert f"finetune.{next(iter(parts))}" in problems()
    change("finetune", train_rows=rows - rejected, **parts)
    assert card()


def set_finetune(kind="json", **settings):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["task"] |= {"kind": kind, "label_key": None, "stratify_by": None}
    params["finetune"] |= settings
    params["export"]["gguf"] = False
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    change("finetune", method=settings["method"])


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"method": "prompt_tuning"}, "at random"),
        ({"method": "prompt_tuning", "prompt_tuning_init": "sample_vocab"}, "with words drawn at random"),
        (
            {"method": "prompt_tuning", "prompt_tuning_init": "text", "prompt_tuning_init_text": "Say `yes`"},
            "with the words `` Say `yes` ``",
        ),
        ({"method": "prefix_tuning", "prefix_tuning_init": "zero"}, "with zeros"),
    ],
)
def test_the_card_of_virtual_tokens_says_how_many_and_how_they_began(project, settings, start):
    name = settings["method"].replace("_", " ")
    config = {"peft_type": settings["method"].upper(), "num_virtual_tokens": 20}
    base = {"base_model_name_or_path": "artifacts/fetch_base"}
    write_json(Path("artifacts/finetune/adapter_config.json"), base | config)
    set_finetune(**settings)
    text = card()
    assert f"\nAn adapter by {name} of 4,884,480 parameters on" in text
    assert f"\n{name.capitalize()}: 20 virtual tokens before every text; the loss covers" in text
    assert f"The adapter was initialized {start}." in text
    assert "PeftModel.from_pretrained" in text
    write_json(Path("artifacts/finetune/adapter_config.json"), base | config | {"num_virtual_tokens": 5})
    write_lock()
    shutil.rmtree("reports/model_card")
    assert "num_virtual_tokens 5, and finetune.num_virtual_tokens was 20" in problems()


def test_the_example_of_a_head_answers_with_a_label(project):
    Path("artifacts/finetune/adapter_config.json").unlink()
    config = {"base_model_name_or_path": "artifacts/fetch_base", "method": "head", "labels": ["a'b", "c"]}
    write_json(Path("artifacts/finetune/replaced_config.json"), config)
    set_finetune("label", method="head")
    text = card()
    assert "A linear layer over 2 labels was trained on the prompt's last hidden state; the loss" in text
    assert "The adapter was initialized with zeros." in text and "pipeline_tag: text-classification" in text
    code = text.split("```python")[1].split("```")[0]
    assert "generate" not in code and "peft" not in code
    compile(code, "example", "exec")
    line = next(one for one in code.splitlines() if one.startswith("labels = "))
    given = {}
    exec(line, given)
    assert given["labels"] == ["a'b", "c"]


def test_a_card_is_refused_where_the_adapter_is_of_another_method_than_was_run(project):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["finetune"]["method"] = "dora"
    write_text(Path("params.yaml"), yaml.safe_dump(params))
    write_lock()
    assert "the adapter has method lora, and finetune.method was dora" in problems()


@pytest.mark.parametrize("path", ["artifacts/split/test.parquet", "reports/evaluate/metrics.json"])
def test_a_file_that_dvc_did_not_record_is_named(project, path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data + b" ")
    assert f"{path} has the hash" in problems()


def test_without_dvc_lock_the_error_has_the_fix(project):
    Path("dvc.lock").unlink()
    with pytest.raises(InputError, match=r"DVC did not write the files here \(dvc repro model_card\)"):
        main()


def test_a_stage_that_dvc_has_not_run_is_named(project):
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    del lock["stages"]["check_bias"]
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    assert "dvc.lock has no entry for check_bias (dvc repro check_bias)" in problems()


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None)),
        ("LicenseRef-Llama3.2", ("other", "llama3.2")),
        ("MIT OR Apache-2.0", ("other", "mit-or-apache-2.0")),
    ],
)
def test_licences_are_spelled_as_on_the_hub(license, expected):
    assert to_hub_license(license) == expected


def test_needed_figures_are_those_of_the_toy_reports():
    """So that a figure added to NEEDED is also added here."""
    reports = evidence()
    assert check_metrics(reports) == []
    assert json.dumps(reports)


def test_the_card_names_what_was_learned_besides_the_answers_of_the_rows():
    assert name_objective({"method": "lora"}) is None
    assert name_objective({"method": "full", "teacher": "big"}) == "distillation of a teacher"
    found = name_objective({"method": "lora", "federated": {"clients": 4, "rounds": 12}})
    assert found == "federated averaging of 4 clients over 12 rounds"

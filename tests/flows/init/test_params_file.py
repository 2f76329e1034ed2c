import difflib
from pathlib import Path

import pytest
import yaml

from flows.init.params_file import edit_params
from stages.common.errors import ParamsError

SHIPPED = (Path(__file__).parents[3] / "params.yaml").read_text(encoding="utf-8")
ENTRY = {
    "kind": "file",
    "path": "data/a.csv",
    "license": "mit",
    "prompt_column": "q: a",
    "tag_columns": ["b"],
}
CHANGES = {
    "collect": {"sources": [ENTRY]},
    "validate": {"allowed_licenses": ["mit", "cc-by-sa-4.0"], "max_label_share": 0.9},
    "check_bias": {"groups": {"person_gender": {"min_representation_ratio": None, "max_cramers_v": 0.2}}},
    "model_card": {"name": "a", "language": ["de"], "intended_use": "Answer questions. " * 20 + "End."},
}


def changed_lines(old, new):
    return [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]


def test_the_values_are_in_the_file_and_all_others_stay():
    new = yaml.safe_load(edit_params(SHIPPED, CHANGES))
    old = yaml.safe_load(SHIPPED)
    feedback = old["collect"]["sources"][-1]
    assert new["collect"].pop("sources") == [ENTRY, feedback]
    assert new["model_card"]["intended_use"] == CHANGES["model_card"]["intended_use"]
    assert new["check_bias"]["groups"] == CHANGES["check_bias"]["groups"]
    for name, values in CHANGES.items():
        for key, value in values.items():
            if key != "sources":
                assert new[name].pop(key) == value
            old[name].pop(key)
    assert new == old


WORDS = (
    "no",
    "on",
    "y",
    "NULL",
    "~",
    "12:30",
    "1_000",
    "2026-01-01",
    "0x1f",
    "=",
    "<<",
    "a: b",
    "#1",
    "it's",
    " ",
    "-",
)


@pytest.mark.parametrize("word", WORDS)
def test_a_text_is_read_as_the_text_that_it_is(word):
    """`no` is Norwegian, and the name of a column; YAML 1.1 reads it as false."""
    entry = ENTRY | {"prompt_column": word, "tag_columns": [word]}
    groups = {word: {"min_representation_ratio": None, "max_cramers_v": None}}
    changes = {
        "collect": {"sources": [entry]},
        "check_bias": {"groups": groups},
        "model_card": {"language": ["en", word], "intended_use": word},
    }
    once = edit_params(SHIPPED, changes)
    new = yaml.safe_load(once)
    assert new["collect"]["sources"][0] == entry and new["check_bias"]["groups"] == groups
    assert new["model_card"]["language"] == ["en", word] and new["model_card"]["intended_use"] == word
    assert edit_params(once, changes) == once


def test_no_comment_of_a_key_that_stays_is_lost():
    new = edit_params(SHIPPED, CHANGES)
    stay = [line for line in SHIPPED.splitlines() if "#" in line and "home" not in line]
    comments = {line[line.index("#") :] for line in stay}
    kept = {line[line.index("#") :] for line in new.splitlines() if "#" in line}
    gone = comments - kept
    entry = SHIPPED[SHIPPED.index("- kind: home_intents") : SHIPPED.index("- kind: feedback")]
    groups = SHIPPED[SHIPPED.index("    person_gender") : SHIPPED.index("  min_rows: 50")]
    assert all(comment in entry + groups for comment in gone)


def test_nothing_outside_the_keys_is_touched():
    text = SHIPPED.replace("seed: 7 #", "seed:   7   #")  # a spelling that a YAML library would not keep
    lines = changed_lines(text, edit_params(text, {"model_card": {"name": "mine"}}))
    assert len(lines) == 2
    assert lines[1].startswith("+   name: mine # ")


def test_the_same_changes_twice_are_the_same_bytes():
    once = edit_params(SHIPPED, CHANGES)
    assert edit_params(once, CHANGES) == once
    assert edit_params(SHIPPED, {"model_card": {}}) == SHIPPED


def test_a_file_without_a_feedback_source_gets_one():
    text = edit_params(SHIPPED.replace("kind: feedback", "kind: file\n      license: mit"), CHANGES)
    assert yaml.safe_load(text)["collect"]["sources"][-1] == {
        "kind": "feedback",
        "path": "data/feedback/rows.jsonl",
    }


def test_a_missing_section_is_named():
    with pytest.raises(ParamsError, match="no section model_card"):
        edit_params("collect:\n  sources: []\n", {"collect": {}, "model_card": {"name": "a"}})


def test_other_yaml_of_the_process_is_written_as_before():
    """DVC writes its lock with the same library; a null there has no word."""
    from dvc.utils.serialize import dumps_yaml

    before = dumps_yaml({"limit": None})
    assert ": null" in edit_params(SHIPPED, CHANGES)
    assert dumps_yaml({"limit": None}) == before == "limit:\n"

"""What `benchmarks.bfcl` adds to BFCL's own files and checker: reading, converting, asking, counting."""

import json
import sys

import pytest

from benchmarks import bfcl
from services.engines.paged.engine import PagedEngine
from stages.common.model.loading import load_tokenizer
from tests.services.tool_models import tool_files

TYPES = {"dict": "object", "integer": "integer", "string": "string", "float": "number", "tuple": "array"}
LAMP = {
    "name": "home.lamp",
    "description": "Set a lamp.",
    "parameters": {
        "type": "dict",
        "properties": {
            "room": {"type": "string", "enum": ["hall"], "default": "hall"},
            "points": {"type": "tuple", "items": {"type": "float"}, "description": "where"},
            "more": {"type": "dict"},
        },
        "required": ["room"],
    },
}
# The interface of the wheel's checker: here calls are right if they are equal.
CHECKER = """
import enum
class Language(enum.Enum):
    PYTHON = "python"
def ast_checker(functions, calls, right, language, category, model):
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING
    assert language is Language.PYTHON and MODEL_CONFIG_MAPPING[model].underscore_to_dot
    return {"valid": calls == right, "error": []}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder laid out as that of the wheel, with two questions."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("bfcl_eval")]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "bfcl_eval"
    checker = package / "eval_checker" / "ast_eval"
    for place in (package, package / "constants", package / "eval_checker", checker):
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text("")
    (checker / "ast_checker.py").write_text(CHECKER)
    (package / "constants" / "type_mappings.py").write_text(f"GORILLA_TO_OPENAPI = {TYPES!r}")
    data = package / "data"
    (data / "possible_answer").mkdir(parents=True)
    asked = [
        {"id": f"simple_{n}", "question": [[{"role": "user", "content": f"lamp {n}"}]], "function": [LAMP]}
        for n in range(2)
    ]
    right = [{"id": one["id"], "ground_truth": [{"home.lamp": {"room": ["hall"]}}]} for one in asked]
    for place, rows in ((data, asked), (data / "possible_answer", right)):
        (place / "BFCL_v4_simple_python.json").write_text("\n".join(map(json.dumps, rows)))
    (data / "BFCL_v4_irrelevance.json").write_text(json.dumps({**asked[0], "id": "irrelevance_0"}))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("bfcl_eval")]:
        del sys.modules[name]


def test_questions_are_drawn_with_their_right_calls_and_irrelevant_ones_have_none(folder):
    (one,) = bfcl.read_questions(folder, "simple_python", 1)
    assert one.category == "simple_python" and one.messages[0].content in ("lamp 0", "lamp 1")
    assert one.right == [{"home.lamp": {"room": ["hall"]}}]
    assert [q.messages for q in bfcl.read_questions(folder, "simple_python", 1)] == [one.messages]
    assert len(bfcl.read_questions(folder, "simple_python", 400)) == 2
    (none,) = bfcl.read_questions(folder, "irrelevance", 5)
    assert none.right == () and none.functions == [LAMP]


def test_a_function_becomes_a_tool_of_openai_with_json_types():
    about = json.loads(bfcl.convert_tool(LAMP, TYPES).text)["function"]
    assert about["name"] == "home_lamp" and about["description"] == "Set a lamp."
    assert about["parameters"] == {
        "type": "object",
        "required": ["room"],
        "properties": {
            "room": {"type": "string", "enum": ["hall"]},
            "points": {"type": "array", "items": {"type": "number"}, "description": "where"},
            "more": {"type": "object", "additionalProperties": True},
        },
    }


def test_calls_are_judged_by_the_checker_of_the_folder_and_irrelevant_questions_by_silence(folder):
    scorer = bfcl.Scorer(folder)
    (question,) = bfcl.read_questions(folder, "simple_python", 1)
    assert scorer.types == TYPES
    assert scorer.is_right(question, [{"home.lamp": {"room": ["hall"]}}])
    assert not scorer.is_right(question, [{"home.lamp": {"room": ["cellar"]}}])
    (irrelevant,) = bfcl.read_questions(folder, "irrelevance", 1)
    assert scorer.is_right(irrelevant, []) and not scorer.is_right(irrelevant, [{"home.lamp": {}}])


def test_a_folder_without_the_wheel_is_refused_with_the_command_that_installs_it(tmp_path):
    with pytest.raises(SystemExit, match=r"has no bfcl_eval; pip install --no-deps --target"):
        bfcl.Scorer(tmp_path)


def test_an_engine_is_asked_and_its_answers_are_judged(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bfcl, "MAX_TOKENS", 24)
    files = tool_files(tmp_path / "model")
    tokenizer = load_tokenizer(files.tokenizer)
    questions = [q for name in ("simple_python", "irrelevance") for q in bfcl.read_questions(folder, name, 2)]
    engine = PagedEngine(files.gguf, tokenizer, kv_cache_mib=16, max_running=8, threads=1)
    try:
        right = bfcl.ask(engine, tokenizer, questions, bfcl.Scorer(folder))
    finally:
        engine.close()
    assert right == [False, False, True]  # a random model calls nothing, which is right for the last


def test_shares_of_right_answers_have_intervals_and_a_line_for_all():
    categories = {name: [True, False] for name in bfcl.CATEGORIES}
    table = bfcl.format_table({"base": categories, "tuned": {name: [True, True] for name in categories}})
    lines = table.splitlines()
    assert lines[0] == "| category | questions | base | tuned |"
    assert lines[2].startswith("| simple_python | 2 | 0.500 (0.095 to 0.905) | 1.000 (")
    assert lines[-1].startswith("| all | 10 | 0.500 (")

"""The set of 300 questions in BFCL's shape: what it has, how it is scored, and a run on a tiny model."""

from collections import Counter

import pytest

from benchmarks.call_set import COUNTS, FUNCTIONS, Case, is_right, measure_calls, write_cases
from stages.common.chat.tools_template import adapt_template
from stages.common.messages import ToolCall, format_arguments, format_calls, format_malformed
from stages.common.model.loading import load_tokenizer
from stages.common.sources.home_tools.tools import read_tools
from tests.tiny import make_model, save_model


def answer(*calls):
    return format_calls("", [ToolCall(name, format_arguments(values)) for name, values in calls])


def right_answer(case: Case):
    calls = [
        (name, {key: choices[0] for key, choices in accepted.items()}) for name, accepted in case.expected
    ]
    return answer(*calls) if calls else "I cannot help with that."


def test_the_set_has_300_questions_about_tools_of_its_own():
    cases = write_cases()
    assert Counter(case.category for case in cases) == COUNTS and sum(COUNTS.values()) == 300
    assert cases == write_cases() != write_cases(seed=8)
    assert not {tool.name for tool in read_tools()} & {function.name for function in FUNCTIONS}
    for case in cases:
        assert is_right(case, right_answer(case)), case
        assert "{" not in case.question
        names = {tool.name for tool in case.tools}
        assert {name for name, _ in case.expected} <= names
        assert not is_right(case, format_malformed("<tool_call>{")) and not is_right(case, "")
    assert {len(case.expected) for case in cases if case.category == "parallel"} == {2, 3}
    assert {len(case.tools) for case in cases if case.category == "multiple"} == {4}


def find(category, name):
    return next(
        c
        for c in write_cases()
        if c.category == category and c.expected and all(one[0] == name for one in c.expected)
    )


def test_a_wrong_call_is_not_right():
    case = find("simple", "convert_currency")
    values = {key: choices[0] for key, choices in case.expected[0][1].items()}
    assert is_right(case, answer(("convert_currency", dict(reversed(values.items())))))
    assert is_right(case, answer(("convert_currency", {**values, "source": f" {values['source'].lower()}."})))
    for wrong in (
        {**values, "amount": values["amount"] + 1},
        {**values, "amount": str(values["amount"])},
        {**values, "amount": float(values["amount"])},
        {**values, "amount": True},
        {**values, "when": "now"},
        {key: value for key, value in values.items() if key != "target"},
    ):
        assert not is_right(case, answer(("convert_currency", wrong))), wrong
    assert not is_right(case, answer(("convert", values)))
    assert not is_right(case, answer(*[("convert_currency", values)] * 2))
    assert not is_right(case, "It is 7.")


def test_a_default_may_be_left_out_and_parallel_calls_have_no_order():
    case = next(
        c for c in write_cases() if None in dict(c.expected[0][1] if c.expected else {}).get("days", ())
    )
    city = case.expected[0][1]["city"][0]
    for values, is_fine in (({"city": city}, True), ({"city": city, "days": 1}, True), ({"days": 1}, False)):
        assert is_right(case, answer(("get_forecast", values))) == is_fine
    parallel = find("parallel", "track_parcel")
    calls = [
        (name, {key: choices[0] for key, choices in accepted.items()}) for name, accepted in parallel.expected
    ]
    assert is_right(parallel, answer(*reversed(calls)))
    assert not is_right(parallel, answer(*[calls[0]] * len(calls)))


def test_a_question_that_no_tool_covers_gets_text():
    case = next(c for c in write_cases() if c.category == "irrelevance")
    assert is_right(case, "No tool can do that.")
    assert not is_right(case, answer((case.tools[0].name, {})))


@pytest.mark.timeout(900)
def test_base_and_tuned_are_scored_with_intervals(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    base = save_model(tmp_path / "artifacts/fetch_base", max_position_embeddings=4096)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = adapt_template(tokenizer, {}, True, "auto")
    tokenizer.save_pretrained(base)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_model(max_position_embeddings=4096), config).save_pretrained(
        tmp_path / "artifacts/finetune"
    )
    counts = dict.fromkeys(COUNTS, 3)
    found = measure_calls(load_tokenizer(base), write_cases(counts))
    for name in ("base", "tuned"):
        assert {category: part["n"] for category, part in found[name].items()} == {**counts, "all": 12}
        for part in found[name].values():
            assert 0 <= part["low"] <= part["share"] <= part["high"] <= 1 and part["high"] > part["low"]
        assert found[name]["simple"]["right"] == 0  # random weights call nothing

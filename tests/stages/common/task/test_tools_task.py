import json
import random

import pytest

from stages.common.messages import Message, ToolCall, format_malformed
from stages.common.task.tool_answers import read_tool_answer, score_tools
from stages.common.task.tools_task import ToolsTask

TASK = ToolsTask()


def call(tool, /, **arguments):
    return ToolCall(tool, json.dumps(arguments))


def turn(*calls, text=""):
    return Message("assistant", text, tuple(calls)).answer


ON = call("turn_on", area="kitchen", brightness=5)
OFF = call("turn_off", area="hall")
BROKEN = format_malformed('<tool_call>{"name": "turn_on", "arg')


def value(name, *pairs):
    answers, references = zip(*pairs, strict=True)
    return TASK.score(answers, references)[name].value()


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (turn(ON), turn(ON), True),
        (turn(call("turn_on", brightness=5.0, area="kitchen")), turn(ON), True),
        (turn(ON, text="Sure."), turn(ON), True),
        (turn(OFF, ON), turn(ON, OFF), True),
        (turn(ON, ON), turn(ON), False),
        (turn(ON), turn(ON, OFF), False),
        (turn(call("turn_on", area="Kitchen", brightness=5)), turn(ON), False),
        (turn(call("turn_on", area="kitchen", brightness="5")), turn(ON), False),
        (
            turn(call("turn_on", area="kitchen", brightness=True)),
            turn(call("turn_on", area="kitchen", brightness=1)),
            False,
        ),
        (turn(call("turn_on", area="kitchen")), turn(ON), False),
        (turn(call("f", items=[1, 2])), turn(call("f", items=[2, 1])), False),
        (turn(call("f", box={"a": 1, "b": 2})), turn(call("f", box={"b": 2, "a": 1})), True),
        ("It is on.", turn(ON), False),
        (BROKEN, turn(ON), False),
        ("Which room?", "In which room?", True),
        (turn(ON), "In which room?", False),
        (BROKEN, "In which room?", False),
        ("  ", "In which room?", False),
        ("", turn(ON), False),
    ],
)
def test_a_turn_is_right_if_it_calls_what_the_reference_calls(answer, reference, right):
    assert value("call_match", (answer, reference)) == float(right)


def test_the_tools_count_without_their_arguments_and_without_how_often():
    pairs = [
        (turn(call("turn_on", area="attic")), turn(ON)),  # right
        (turn(ON, ON), turn(ON)),  # right
        (turn(ON, OFF), turn(ON)),  # one too many
        (turn(OFF), turn(ON)),
        ("On.", turn(ON)),
        (BROKEN, turn(ON)),
        ("Hello.", "Hi."),  # not counted
    ]
    assert value("tool_chosen", *pairs) == pytest.approx(2 / 6)


def test_argument_f1_counts_tool_key_and_value_over_all_turns():
    pairs = [
        (turn(call("turn_on", area="kitchen", brightness=6, name="lamp")), turn(ON)),  # 1 of 3, of 2
        (turn(call("turn_off", area="kitchen")), turn(ON)),  # another tool: 0 of 1, of 2
        (turn(OFF, OFF), turn(OFF)),  # 1 of 2, of 1
        (BROKEN, turn(OFF)),  # 0 of 0, of 1
        (turn(OFF), "Which room?"),  # 0 of 1, of 0
        ("Which room?", "Which room?"),
    ]
    given, wanted, right = 3 + 1 + 2 + 0 + 1, 2 + 2 + 1 + 1 + 0, 1 + 0 + 1
    assert value("argument_f1", *pairs) == pytest.approx(2 * right / (given + wanted))


def test_missing_needless_and_malformed_calls_are_shares_of_the_turns_they_can_occur_in():
    pairs = [
        ("On.", turn(ON)),
        ("", turn(ON)),
        (BROKEN, turn(ON)),
        (turn(ON), turn(ON)),
        (turn(ON), "Which room?"),
        ("Which room?", "Which room?"),
        (BROKEN, "Which room?"),
    ]
    assert value("missing_call", *pairs) == pytest.approx(2 / 4)
    assert value("needless_call", *pairs) == pytest.approx(1 / 3)
    assert value("malformed_call", *pairs) == pytest.approx(2 / 7)
    assert value("call_match", *pairs) == pytest.approx(2 / 7)


def test_text_counts_where_no_call_is_due():
    from sacrebleu.metrics import CHRF

    pairs = [
        ("It is 20 degrees there.", "It is 21 degrees."),
        (turn(ON, text="It is"), "It is off."),  # what it writes next to the call
        (BROKEN, "Done."),
        ("It is on.", turn(ON, text="It is on.")),  # not counted
    ]
    wanted = CHRF().corpus_score(
        ["It is 20 degrees there.", "It is", ""], [["It is 21 degrees.", "It is off.", "Done."]]
    )
    assert value("text_chrf", *pairs) == pytest.approx(wanted.score)


def test_a_metric_that_no_turn_concerns_is_left_out():
    assert set(TASK.score([turn(ON)], [turn(ON)])) == {
        *("call_match", "tool_chosen", "argument_f1", "missing_call", "malformed_call"),
    }
    assert set(TASK.score(["a"], ["a"])) == {"call_match", "needless_call", "malformed_call", "text_chrf"}


def test_a_resample_without_the_turns_of_an_error_has_none_of_it():
    metric = TASK.score([turn(ON), "a"], [turn(ON), "a"])["needless_call"]
    assert list(metric.by_row()) == [0.0, 0.0]


def test_the_metrics_keep_the_order_of_their_meanings():
    metrics = TASK.score([turn(ON), "a"], [turn(ON), "a"])
    assert list(metrics) == list(TASK.meanings)


@pytest.mark.parametrize(
    ("answer", "reference", "errors"),
    [
        (turn(OFF, ON), turn(ON, OFF), {}),
        ("Which room? ", "Which room?", {}),
        (BROKEN, turn(ON), ["malformed call"]),
        ("On.", turn(ON), {"missing call": 'turn_on(area="kitchen", brightness=5)'}),
        (turn(OFF), "Which room?", {"needless call": 'turn_off(area="hall")'}),
        (turn(OFF), turn(ON), {"wrong tool": "turn_off, not turn_on"}),
        (
            turn(ON, OFF),
            turn(ON),
            {"wrong tool": "turn_off+turn_on, not turn_on"},
        ),
        (
            turn(call("turn_on", brightness=6, name="lamp")),
            turn(ON),
            {
                "missing argument": 'turn_on.area="kitchen"',
                "wrong value": "turn_on.brightness=6, not 5",
                "extra argument": 'turn_on.name="lamp"',
            },
        ),
        (turn(ON, ON), turn(ON), {"wrong number of calls": "turn_on 2 times, not 1"}),
        ("", "Which room?", {"other text": "no text"}),
        ("Which?", "Which room?", ["other text"]),
    ],
)
def test_what_is_wrong_is_named(answer, reference, errors):
    found = TASK.find_errors(answer, reference)
    assert found == errors if isinstance(errors, dict) else list(found) == errors
    assert TASK.is_right(answer, reference) is not bool(found)


def test_parallel_calls_are_compared_with_those_that_are_most_alike():
    wanted = turn(call("light", area="hall", on=True), call("light", area="attic", on=True))
    given = turn(call("light", area="attic", on=False), call("light", area="hall", on=True))
    assert TASK.find_errors(given, wanted) == {"wrong value": "light.on=false, not true"}


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (turn(ON), "turn_on"),
        (turn(ON, OFF, ON), "turn_off+turn_on"),
        ("Which room?", "(text)"),
        (BROKEN, None),
        (" ", None),
    ],
)
def test_the_class_of_an_answer_is_the_tool(answer, name):
    assert TASK.read_class(answer) == name


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (turn(ON), None),
        ("Which room?", None),
        ('{"a": 1}', None),
        ('{"tool_calls": [{"name": "f", "arguments": {}}]}', None),
        (" ", "is empty"),
        (BROKEN, "begins a call that is none"),
        ('{"tool_calls":[{"name":"f","arguments":{"a":1,"a":2}}]}', "begins a call that is none"),
        ('{"tool_calls":[{"name":"f","arguments":{"a":NaN}}]}', "without NaN"),
        ('{"tool_calls":[{"name":" ","arguments":{}}]}', "names no tool"),
        (
            '{"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}',
            "begins a call that is none: calls are",
        ),
        ('{"tool_calls": []}', "begins a call that is none: calls are"),
        ('{"tool_calls": [{"name": "f", "arguments": {},}]}', "begins a call that is none"),
    ],
)
def test_an_answer_that_cannot_be_learned_is_refused(answer, problem):
    found = TASK.find_problem(answer)
    assert (found is None) if problem is None else (problem in found)


def test_a_correction_by_hand_is_rewritten_as_the_model_is_judged():
    by_hand = '{ "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": [2]}}], "content": null }\n'
    assert TASK.rewrite(by_hand, None, (", ", ": ")) == turn(ToolCall("f", '{"b":1,"a":[2]}'))
    assert TASK.rewrite(" Which room? ", None, (",", ":")) == "Which room?"


def test_calls_that_mean_the_same_have_one_canonical_text():
    same = [turn(ON, OFF), turn(OFF, call("turn_on", brightness=5.0, area="kitchen"), text="Yes.")]
    assert len(set(map(TASK.canonical, same))) == 1
    assert TASK.canonical(TASK.canonical(same[0])) == TASK.canonical(same[0])
    assert TASK.canonical(turn(ON)) != TASK.canonical(turn(ON, ON))


def make_value(rng, depth=0):
    makers = [
        lambda: rng.choice([None, True, False, 0, 1, -7, 0.5, 2**60]),
        lambda: "".join(rng.choices('ab "\\{}é漢🙂,', k=rng.randrange(5))),
    ]
    if depth < 3:
        makers.append(lambda: [make_value(rng, depth + 1) for _ in range(rng.randrange(3))])
        makers.append(lambda: {k: make_value(rng, depth + 1) for k in rng.sample("abcd", rng.randrange(4))})
    return rng.choice(makers)()


def shuffled(rng, found):
    if isinstance(found, dict):
        pairs = [(key, shuffled(rng, inner)) for key, inner in found.items()]
        return dict(rng.sample(pairs, len(pairs)))
    return [shuffled(rng, one) for one in found] if isinstance(found, list) else found


@pytest.mark.parametrize("seed", range(50))
def test_neither_the_order_of_keys_nor_that_of_calls_counts(seed):
    rng = random.Random(seed)
    calls = [
        (rng.choice("fgh"), {key: make_value(rng) for key in rng.sample("abcd", rng.randrange(4))})
        for _ in range(rng.randrange(1, 5))
    ]
    reference = turn(*(ToolCall(name, json.dumps(values)) for name, values in calls))
    again = rng.sample([(name, shuffled(rng, values)) for name, values in calls], len(calls))
    answer = turn(*(ToolCall(name, json.dumps(values)) for name, values in again), text=rng.choice(["", "x"]))
    metrics = TASK.score([answer], [reference])
    assert [metrics[name].value() for name in ("call_match", "tool_chosen", "argument_f1")] == [1.0] * 3
    assert TASK.find_errors(answer, reference) == {} and TASK.is_right(answer, reference)
    assert TASK.read_class(answer) == TASK.read_class(reference)


@pytest.mark.parametrize("seed", range(20))
def test_no_text_makes_judging_fail(seed):
    rng = random.Random(seed)
    parts = [
        *('{"tool_calls":[', '{"name":"f","arguments":{', "}}", "]}", '{"content":"', '"a":', "NaN", "1e999"),
        *(
            '{"malformed_call":"',
            '"',
            "\\ud800",
            "\ud800",
            "[" * 3000,
            "9" * 4400,
            ",",
            "é",
            "\0",
            " ",
            "null",
        ),
    ]
    answers = ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(20)]
    references = [rng.choice([turn(ON), turn(ON, OFF), "Which room?"]) for _ in answers]
    metrics = TASK.score(answers, references)
    assert all(metric.value() >= 0.0 for metric in metrics.values())
    for answer, reference in zip(answers, references, strict=True):
        found = TASK.find_errors(answer, reference)
        assert bool(found) is not TASK.is_right(answer, reference)
        assert set(found) <= set(TASK.error_types)
        TASK.find_problem(answer), TASK.read_class(answer), TASK.rewrite(answer, None, (",", ":"))
        assert 0.0 <= TASK.nearness(answer, reference) <= 100.0


def test_a_right_answer_is_never_worse_than_any_other():
    references = [turn(ON), turn(ON, OFF), "Which room?"]
    turns = [read_tool_answer(text) for text in references]
    best = score_tools(turns, turns)
    assert {name: metric.value() for name, metric in best.items()} == {
        "call_match": 1.0,
        "tool_chosen": 1.0,
        "argument_f1": 1.0,
        "missing_call": 0.0,
        "needless_call": 0.0,
        "malformed_call": 0.0,
        "text_chrf": pytest.approx(100.0),
    }

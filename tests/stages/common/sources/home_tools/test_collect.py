"""The packaged conversations, on the package itself: every call, every follow-up and every group."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import jsonschema
import pytest

from stages.common.errors import InputError
from stages.common.messages import find_conversation_problem
from stages.common.params.loading import load_params
from stages.common.params.stages import HomeTools
from stages.common.sources.home_intents.grammar import load_grammar
from stages.common.sources.home_intents.recognition import build_name_lists, find_best_answers, recognize
from stages.common.sources.home_tools.collect import collect_home_tools
from stages.common.sources.home_tools.families import make_plan
from stages.common.sources.home_tools.follow_ups import KINDS, OPPOSITE, read_follow_ups
from stages.common.sources.home_tools.phrases import read_words
from stages.common.sources.home_tools.tools import make_call, read_tools

ROOT = Path(__file__).parents[5]
SHIPPED = next(
    source
    for source in load_params(ROOT / "params.tools.yaml").collect.sources
    if isinstance(source, HomeTools)
)
SEED = 7


def collect():
    """A few rows of each shape: all templates in some seconds."""
    return collect_home_tools(SHIPPED.version, 9, 1, 6, SEED, "You control a smart home.")


@cache
def few():
    return collect()


@cache
def grammar():
    return load_grammar("en")


@cache
def plan():
    return make_plan(grammar().templates, read_follow_ups(), SEED)


def steps(row):
    """The user's turns with the calls, results and answer of each."""
    found = []
    for message in row.messages:
        if message.role == "user":
            found.append((message.content, [], [], []))
        elif message.role == "assistant":
            found[-1][1].extend(message.tool_calls)
            found[-1][3].append(message.content)
        elif message.role == "tool":
            found[-1][2].append(json.loads(message.content))
    return found


def rows_of(shape):
    return [row for row in few().rows if row.tags["shape"] == shape]


def test_every_call_fits_the_schema_of_its_tool_and_every_tool_is_called():
    schemas = {tool.name: tool.parameters for tool in read_tools()}
    calls = [call for row in few().rows for message in row.messages for call in message.tool_calls]
    for call in calls:
        jsonschema.validate(call.values, schemas[call.name], cls=jsonschema.Draft202012Validator)
        assert set(call.values) <= set(schemas[call.name]["properties"])
    assert {call.name for call in calls} == set(schemas)


def test_schemas_are_valid_and_a_call_outside_them_is_none():
    for tool in read_tools():
        jsonschema.Draft202012Validator.check_schema(tool.parameters)
    assert make_call("set_state", {"state": "on", "kind": "light"}) is not None
    assert make_call("set_state", {"state": "ajar"}) is None
    assert make_call("set_state", {"kind": "light"}) is None
    assert make_call("set_light", {"brightness": 20, "mood": "calm"}) is None
    assert make_call("timer", {"minutes": 2, "action": "add"}).arguments == '{"action":"add","minutes":2}'


def test_all_rows_are_conversations_with_the_same_tools():
    for row in few().rows:
        assert row.tools == read_tools() and find_conversation_problem(row.messages) is None
        assert row.messages[0].role == "system" and row.messages[-1].content
        assert all(message.content or message.tool_calls for message in row.messages)


def test_first_requests_are_read_by_the_recogniser_as_their_calls():
    """The recogniser's answer to the text, of all templates at once, has the values of the call."""
    checked = 0
    for row in rows_of("single")[::3] + rows_of("follow_ups")[::7]:
        text, calls, _, _ = steps(row)[0]
        (answer,) = find_best_answers(
            recognize(text, grammar().intents, build_name_lists(read_words(), text))
        )
        slots = json.loads(answer)
        intent = slots.pop("intent")
        said = set(map(str, calls[0].values.values()))
        kept = {
            str(value)
            for name, value in slots.items()
            if name not in ("domain", "media_class", "volume_step")
        }
        assert kept <= said, (text, answer, calls)
        if intent == "HassTurnOn":
            assert calls[0].values["state"] in ("on", "open", "locked")
        if intent == "HassTurnOff":
            assert calls[0].values["state"] in ("off", "closed", "unlocked")
        checked += 1
    assert checked > 30


def test_two_requests_in_a_sentence_are_two_calls_with_two_results_and_both_answers():
    for row in rows_of("parallel"):
        ((text, calls, results, (_, answer)),) = steps(row)
        assert len(calls) == len(results) == 2 and " and " in text
        assert calls[0].name != calls[1].name and answer.count(".") >= 2


# What each kind of follow-up keeps of the call before it.
INHERITED = {
    "also_area": {"state", "kind", "brightness", "kelvin", "color", "degrees"},
    "ask_area": {"state", "kind"},
    "not_area": {"state", "kind", "brightness", "kelvin", "color", "degrees", "name"},
    "not_name": {"state", "brightness", "kelvin", "color", "degrees", "area"},
    "only_name": {"state", "area"},
    "brightness": {"name", "area"},
    "color": {"name", "area"},
    "degrees": {"name", "area"},
    "undo": {"kind", "name", "area"},
    "ask_temperature": {"area"},
    "ask_state": {"state", "kind", "name", "area"},
    "and_item": {"list"},
    "remove_again": {"item", "list"},
    "check_off": {"item", "list"},
    "other_list": {"item"},
    "timer_more": {"name"},
    "timer_less": {"name"},
    **{f"timer_{what}": {"name"} for what in ("pause", "resume", "cancel", "left")},
    **{kind: {"name", "area"} for kind, found in KINDS.items() if found.theme == "media"},
}


def follow_ups():
    """Each follow-up with the call before it: kind, text, last call, call."""
    for row in rows_of("follow_ups"):
        last = None
        for kind, (text, calls, _, _) in zip(row.tags["follow_ups"].split(), steps(row)[1:], strict=True):
            last = last or steps(row)[0][1][0]
            if calls:
                yield kind, text, last, calls[0]
                last = calls[0]
            else:
                assert kind in ("thanks", "no_tool")


def test_a_follow_up_inherits_what_it_does_not_mention():
    seen = Counter()
    for kind, text, last, call in follow_ups():
        before, now = last.values, call.values
        for key in INHERITED[kind]:
            assert now.get(key) == before.get(key), (kind, text, last, call)
        assert call != last
        seen[kind] += 1
    assert set(seen) == set(KINDS)


def test_a_follow_up_changes_what_it_mentions():
    for kind, text, last, call in follow_ups():
        before, now = last.values, call.values
        changed = {"also_area": "area", "ask_area": "area", "not_area": "area", "not_name": "name"}
        changed |= {"only_name": "name", "and_item": "item", "other_list": "list", "color": "color"}
        if kind in changed:
            assert str(now[changed[kind]]) in text and now[changed[kind]] != before.get(changed[kind])
        if kind in ("brightness", "volume", "degrees", "timer_more", "timer_less"):
            key = {"volume": "percent"}.get(kind, kind if kind in now else "minutes")
            assert str(now[key]) in text.split() or f"{now[key]}" in text
        if kind == "undo":
            assert now["state"] == OPPOSITE[before["state"]]
        if kind == "only_name":
            assert "kind" in before and "kind" not in now
        if kind in ("timer_resume", "media_resume"):
            assert before["action"] == "pause"


def test_answers_tell_the_result_that_the_tool_gave():
    told = Counter()
    for row in few().rows:
        for _text, calls, results, answers in steps(row):
            for call, result in zip(calls, results, strict=True):
                if "temperature" in result:
                    assert f"{result['temperature']:g} degrees" in answers[-1]
                    told["temperature"] += 1
                for device in result.get("devices", ()):
                    assert device in answers[-1]
                    told["devices"] += 1
                if "state" in result:
                    yes = result["state"] == call.values["state"]
                    assert answers[-1].startswith("Yes" if yes else "No") and result["state"] in answers[-1]
                    told[str(yes)] += 1
                if "error" in result:
                    assert call.values["name"] in answers[-1]
                    told["error"] += 1
    assert all(told[what] for what in ("temperature", "devices", "True", "False", "error"))


def test_thanks_and_what_no_tool_covers_get_words_and_no_call():
    for row in rows_of("no_call"):
        ((_, calls, _, (answer,)),) = steps(row)
        assert not calls and answer
    answers = {row.answer for row in rows_of("follow_ups") if row.tags["follow_ups"].endswith("thanks")}
    assert len(answers) == 1 and answers != {row.answer for row in rows_of("no_call")}


def test_no_prompt_has_two_answers():
    answers = defaultdict(set)
    for row in few().rows:
        for place, message in enumerate(row.messages):
            if message.role == "assistant":
                answers[row.messages[:place]].add(message.answer)
    assert all(len(found) == 1 for found in answers.values())
    assert len({row.id for row in few().rows}) == len(few().rows)


def test_each_template_is_in_one_group_only():
    """So a split by group keeps each phrasing, of requests and of follow-ups, on one side."""
    groups = defaultdict(set)
    for tool in plan().single.values():
        for name, templates in tool.items():
            for template in templates:
                groups[template.group].add(name)
    for pair in plan().pairs:
        for template in pair:
            groups[template.group].add("+".join(one.group for one in pair))
    for family in plan().families:
        for template in family.requests:
            groups[template.group].add(family.name)
        for one in family.follow_ups:
            groups[one.text].add(family.name)
    for one in plan().uncovered:
        groups[one.text].add(f"no_tool/{one.text}")
    assert all(len(found) == 1 for found in groups.values())
    assert {row.group for row in few().rows} <= set.union(*groups.values())
    assert {one.text for one in read_follow_ups()} <= set(groups)


def test_no_wording_of_a_follow_up_is_in_two_groups():
    """Slots apart: a template whose words another one can have, too, would be known to the model."""
    groups = defaultdict(set)
    for row in rows_of("follow_ups"):
        kinds = row.tags["follow_ups"].split()
        for kind, (text, calls, _, _) in zip(kinds, steps(row)[1:], strict=True):
            for value in sorted(map(str, calls[0].values.values() if calls else ()), key=len, reverse=True):
                text = text.replace(value, "…")
            groups[kind, text].add(row.group)
    assert not {key: found for key, found in groups.items() if len(found) > 1}


def test_tools_are_called_about_equally_often():
    calls = Counter(call.name for row in few().rows for m in row.messages for call in m.tool_calls)
    assert max(calls.values()) <= 6 * min(calls.values()), calls


def test_conversations_have_one_to_four_turns_of_the_user():
    turns = Counter(row.tags["user_turns"] for row in few().rows)
    assert set(turns) == {"1", "2", "3", "4"} and min(turns.values()) > 20
    assert set(Counter(row.tags["shape"] for row in few().rows)) == {
        "single",
        "parallel",
        "follow_ups",
        "no_call",
    }


@pytest.mark.slow  # it writes all of them again
def test_rows_are_the_same_in_another_process():
    code = (
        "import sys; from tests.stages.common.sources.home_tools.test_collect import collect;"
        "sys.stdout.write(' '.join(row.id for row in collect().rows))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "3"},
    )
    ids = [row.id for row in few().rows]
    assert done.stdout.split() == ids


def test_another_seed_puts_the_templates_in_other_groups():
    other = make_plan(grammar().templates, read_follow_ups(), SEED + 1)
    assert other.pairs != plan().pairs and other.families != plan().families


def test_another_version_of_the_package_is_refused():
    with pytest.raises(InputError, match=r"is installed, but collect\.sources asks for version 2020"):
        collect_home_tools("2020.1.1", 1, 1, 1, 7, None)

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from monitoring.feedback.label_rules import find_highest_limit
from monitoring.feedback.labels import (
    REASONS,
    ExcludedFeedbackError,
    ServedTask,
    hash_prompt,
    label_of,
    normalise_text,
    read_served_task,
)
from monitoring.feedback.rows import (
    HELD_OUT,
    HELD_OUT_PROMPTS,
    REPORT,
    ROWS,
    format_report,
    label_rows,
    read_held_out_before,
    read_labelled,
    summarise_exclusions,
    write_labelled,
)
from monitoring.feedback.sides import is_held_out
from services.events import Feedback, open_store
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.params.loading import load_params
from stages.common.params.loop import FeedbackSettings
from stages.common.task.json_task import JsonTask
from stages.common.task.text_task import TextTask
from tests.monitoring import store

ROOT = Path(__file__).parents[3]
SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": ["Off", "On"]}, "area": {"type": "string"}, "ids": {"type": "array"}},
    "additionalProperties": False,
    "required": ["intent"],
}
TASK = ServedTask(JsonTask("intent"), SCHEMA, "Answer with one intent as JSON.", 100, 200)
TEXT = replace(TASK, answers=TextTask(), answer_schema=None)
SETTINGS = FeedbackSettings(
    license="cc0-1.0",
    thumbs_up_as_label=True,
    min_agreement=0.6,
    max_rows_per_user=50,
    max_share_per_key=0.25,
    max_rows=1000,
    on_suspicion="drop",
    holdout_share=0.3,
    seed=7,
)
FEW_A_USER = SETTINGS.model_copy(update={"max_rows_per_user": 1})  # the share of a key alone decides
ON, OFF = '{"intent":"On"}', '{"intent":"Off"}'
EXCHANGE = replace(
    store.EXCHANGE,
    request_id="r",
    messages="[]",
    parameters='{"json_schema": null}',
    answer=ON,
    decisions='{"prompt_injection": [true, null], "schema": [true, null]}',
)


class Events:
    """A store being filled: exchanges, and feedback on them, one second apart."""

    def __init__(self, folder):
        self.url = f"sqlite:///{folder}/events.db"
        self.events, self.asked = [], 0

    def add_exchange(self, question="lamp please", correction=None, thumb=None, **changes):
        """Add an exchange, with feedback if any is given."""
        self.asked += 1
        request_id = f"r{self.asked:05}"
        messages = json.dumps([{"role": "user", "content": question}])
        exchange = replace(
            EXCHANGE,
            **{"request_id": request_id, "messages": messages, "received_at": 1000.0 + self.asked, **changes},
        )
        self.events.append(exchange)
        if correction is not None or thumb is not None:
            self.add_feedback(correction, thumb, key_id=exchange.key_id)
        return request_id

    def add_feedback(self, correction=None, thumb=None, key_id=None, request_id=None, given_at=None):
        at = 5000.0 + len(self.events) if given_at is None else given_at
        change = request_id or f"r{self.asked:05}"
        self.events.append(Feedback(f"f{len(self.events):05}", change, at, key_id, thumb, correction, None))

    def rows(self, settings=SETTINGS, task=TASK, held_out=frozenset()):
        if self.events:
            self.store()
        return label_rows(self.url, 0.0, 1e12, settings, task, held_out)

    def store(self):
        store = open_store(self.url, queue_size=100_000, group_rows=5000, group_wait_s=0.0)

        async def record():
            await asyncio.gather(*(store.record(event) for event in self.events))

        asyncio.run(record())
        store.close()
        self.events = []


@pytest.fixture
def events(tmp_path):
    return Events(tmp_path)


def labels(labelled):
    """Question and answer of all rows, held out or not."""
    return {row.question: row.answer for row in (*labelled.train, *labelled.holdout)}


def test_a_correction_is_a_label_and_so_is_an_answer_found_right(events):
    events.add_exchange("lamp off", correction='{"intent": "Off"}', thumb=-1)
    events.add_exchange("lamp on", thumb=1)
    events.add_exchange("unclear", thumb=-1)
    events.add_exchange("no feedback on this")
    labelled = events.rows()
    assert labels(labelled) == {"lamp off": OFF, "lamp on": ON}
    by_question = {row.question: row for row in (*labelled.train, *labelled.holdout)}
    row = by_question["lamp off"]
    assert row.tags == {"feedback": "correction", "intent": "Off"}
    assert by_question["lamp on"].tags == {"feedback": "thumb", "intent": "On"}
    assert (row.source, row.license, row.origin) == ("feedback", "cc0-1.0", "feedback")
    assert row.group == f"feedback/{hash_prompt([Message('user', 'lamp off')])}"
    report = labelled.report
    assert (report["exchanges"], report["given"], report["labelled_rows"]) == (4, 3, 2)
    assert report["excluded"] == {"no_label": 1}
    assert report["by_kind"] == {"correction": 1, "thumb": 1}
    assert report["by_label"] == {"Off": 1, "On": 1}


def test_the_newest_feedback_on_an_answer_counts(events):
    events.add_exchange("a", correction=ON)
    events.add_feedback(correction=OFF)
    events.add_exchange("b", thumb=1)
    events.add_feedback(thumb=-1)
    labelled = events.rows()
    assert labels(labelled) == {"a": OFF}
    assert labelled.report["excluded"] == {"no_label": 1}


def test_feedback_after_the_end_of_the_time_does_not_count(events):
    events.add_exchange("a", correction=ON)
    events.add_feedback(correction=OFF, given_at=9000.0)
    events.add_exchange("b")
    events.add_feedback(thumb=1, given_at=9000.0)
    events.store()
    early = label_rows(events.url, 0.0, 9000.0, SETTINGS, TASK)
    assert (labels(early), early.report["given"]) == ({"a": ON}, 1)
    assert labels(label_rows(events.url, 0.0, 9001.0, SETTINGS, TASK)) == {"a": OFF, "b": ON}


def test_thumbs_are_no_labels_where_the_settings_say_so(events):
    events.add_exchange("a", thumb=1)
    assert labels(events.rows(SETTINGS.model_copy(update={"thumbs_up_as_label": False}))) == {}


def test_the_challengers_answers_count_and_a_shadows_do_not(events):
    events.add_exchange("a", correction=OFF, role="challenger")
    events.add_exchange("b", correction=OFF, role="shadow", shadow_of="r00001")
    labelled = events.rows()
    assert labels(labelled) == {"a": OFF}
    assert labelled.report["given"] == 1


def test_the_conversation_goes_with_the_label_and_the_systems_words_of_the_task_do_not(events):
    turns = [
        {"role": "system", "content": "Answer with one intent as JSON. "},
        {"role": "user", "content": "the lamp"},
        {"role": "assistant", "content": ON},
        {"role": "user", "content": "no, off"},
    ]
    events.add_exchange(messages=json.dumps(turns), correction=OFF)
    labelled = events.rows()
    (row,) = (*labelled.train, *labelled.holdout)
    assert [(m.role, m.content) for m in row.messages] == [
        ("user", "the lamp"),
        ("assistant", ON),
        ("user", "no, off"),
        ("assistant", OFF),
    ]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("empty", {"question": "  ", "correction": ON}),
        ("empty", {"correction": " \n"}),
        ("too_long", {"question": "x" * 101, "correction": ON}),
        ("too_long", {"correction": json.dumps({"intent": "On", "area": "x" * 200})}),
        ("redacted", {"question": "call [phone] now", "correction": ON}),
        ("redacted", {"correction": '{"intent":"On","area":"[email]"}'}),
        ("redacted", {"question": "my key is [secret]", "correction": ON}),
        ("private", {"question": "my key is perennial-" + "a" * 43, "correction": ON}),
        ("private", {"correction": '{"intent":"On","area":"ann@perennial-mail.net"}'}),
        ("invalid", {"correction": "turn it off"}),
        ("invalid", {"correction": '["On"]'}),
        ("invalid", {"correction": '{"intent":"On","area":NaN}'}),
        ("invalid", {"correction": '{"intent":"On","area":1e999}'}),
        ("invalid", {"correction": "[" * 9000}),
        ("too_long", {"correction": "{" * 900}),
        ("outside_schema", {"correction": '{"intent":"Explode"}'}),
        ("outside_schema", {"correction": '{"intent":"On","colour":"red"}'}),
        ("invalid", {"correction": '{"area":"kitchen"}'}),
        ("outside_schema", {"correction": '{"intent":"On","ids":[1]}'}),
        ("suspicious", {"correction": ON, "decisions": '{"prompt_injection": [false, "prompt_injection"]}'}),
        ("suspicious", {"correction": ON, "decisions": '{"toxicity": [false, "toxicity"]}'}),
        ("suspicious", {"correction": ON, "decisions": "no JSON"}),
        ("suspicious", {"thumb": 1, "decisions": '{"secrets": [false, "secret_aws"]}'}),
        ("unfinished", {"thumb": 1, "finish_reason": "length"}),
        ("unfinished", {"thumb": 1, "status": 503}),
        ("raw_prompt", {"correction": ON, "route": "/v1/completions"}),
        ("own_schema", {"correction": ON, "parameters": '{"json_schema": "{}"}'}),
        ("corrupt", {"correction": ON, "messages": '{"role": "user"}'}),
        ("corrupt", {"correction": ON, "messages": "[1]"}),
        ("corrupt", {"correction": ON, "messages": "["}),
        ("corrupt", {"correction": ON, "messages": '[{"role": "user", "content": [1]}]'}),
        ("corrupt", {"correction": ON, "messages": '[{"role": "system", "content": "x"}]'}),
        ("corrupt", {"correction": ON, "messages": '[{"role": "tool", "content": "x"}]'}),
        ("corrupt", {"correction": ON, "parameters": "[]"}),
        ("invalid", {"correction": r'{"intent":"On","area":"\ud83d"}'}),
        ("invalid", {"thumb": 1, "answer": r'{"intent":"On","area":"\udfff"}'}),
        ("corrupt", {"correction": ON, "messages": r'[{"role": "user", "content": "lamp \ud83d"}]'}),
        (
            "other_system_prompt",
            {
                "correction": ON,
                "messages": '[{"role": "system", "content": "Obey me."}, {"role": "user", "content": "x"}]',
            },
        ),
    ],
)
def test_what_cannot_be_learned_is_excluded_with_its_reason(reason, changes):
    words = {
        "given_at": 2000.0,
        "thumb": changes.pop("thumb", None),
        "correction": changes.pop("correction", None),
    }
    asked = [{"role": "user", "content": changes.pop("question", "lamp please")}]
    exchange = asdict(replace(EXCHANGE, **{"messages": json.dumps(asked), **changes}))
    task = TASK if len(words["correction"] or "") < 5000 else replace(TASK, max_answer_chars=10_000)
    with pytest.raises(ExcludedFeedbackError, match=f"^{reason}$"):
        label_of(exchange, [words], None, None, SETTINGS, task)
    assert reason in REASONS


def test_what_is_excluded_is_counted_by_reason_and_the_rest_goes_on(events):
    events.add_exchange("call [phone] now", correction=ON)
    events.add_exchange("a", correction="no JSON", role="challenger")
    events.add_exchange("b", correction="none either")
    events.add_exchange("c", correction=ON, messages="[")
    events.add_exchange("this is right", correction=ON)
    labelled = events.rows()
    assert labels(labelled) == {"this is right": ON}
    assert labelled.report["excluded"] == {"corrupt": 1, "redacted": 1, "invalid": 2}


def test_half_of_a_surrogate_pair_in_an_event_costs_that_event_only(events, tmp_path):
    events.add_exchange("a", correction=r'{"intent":"On","area":"\ud83d"}')
    events.add_exchange("b", correction=ON, messages=r'[{"role": "user", "content": "lamp \ude00"}]')
    events.add_exchange("this is right", correction=ON)
    labelled = events.rows()
    assert labels(labelled) == {"this is right": ON}
    assert labelled.report["excluded"] == {"corrupt": 1, "invalid": 1}
    write_labelled(tmp_path, labelled)
    text = events.rows(task=TEXT)
    assert set(labels(text)) == {"a", "this is right"}  # as text it is a backslash and five letters
    write_labelled(tmp_path, text)


class Failing(JsonTask):
    """A task with a bug: it fails on one answer."""

    def canonical(self, answer):
        if "attic" in answer:
            raise RuntimeError("a bug")
        return super().canonical(answer)


def test_a_label_that_fails_in_an_unforeseen_way_costs_that_label_only(events):
    events.add_exchange("a", correction='{"intent":"On","area":"attic"}')
    events.add_exchange("b", correction=ON)
    labelled = events.rows(task=replace(TASK, answers=Failing("intent")))
    assert labels(labelled) == {"b": ON}
    assert labelled.report["excluded"] == {"corrupt": 1}


def test_suspicious_rows_and_new_labels_stay_where_the_settings_keep_them(events):
    events.add_exchange(
        "a", correction='{"mood":1, "intent":"Explode"}', decisions='{"toxicity": [false, "x"]}'
    )
    keeps = SETTINGS.model_copy(update={"on_suspicion": "keep"})
    assert labels(events.rows(keeps)) == {"a": '{"intent":"Explode","mood":1}'}


def test_a_correction_that_the_guard_rejects_is_no_label_and_the_settings_can_keep_it(events):
    events.add_exchange("a", correction='{"intent":"On","area":"attic"}')
    events.add_exchange("b", correction=ON)
    task = replace(TASK, is_rejected=lambda correction: "attic" in correction)
    labelled = events.rows(task=task)
    assert labels(labelled) == {"b": ON} and labelled.report["excluded"] == {"suspicious": 1}
    assert set(labels(events.rows(SETTINGS.model_copy(update={"on_suspicion": "keep"}), task))) == {"a", "b"}


def test_a_guard_decision_on_the_answer_does_not_count_against_its_correction(events):
    events.add_exchange(
        "a", correction=OFF, decisions='{"secrets": [false, "secret_aws"], "schema": [false, "x"]}'
    )
    assert labels(events.rows()) == {"a": OFF}


@pytest.mark.parametrize(
    ("answer", "label"),
    [(ON, '{"intent":"On","area":"attic"}'), ('{"intent": "On"}', '{"intent": "On", "area": "attic"}')],
)
def test_a_json_label_is_written_as_the_model_writes_its_answers(events, answer, label):
    events.add_exchange("a", correction='{ "area":"attic",\n"intent" :"On"}', answer=answer)
    events.add_exchange("b", thumb=1, answer=answer)
    assert labels(events.rows())["a"] == label


def test_labels_of_a_text_task_are_taken_as_they_are(events):
    events.add_exchange("a", correction=" Well, maybe. ")
    assert labels(events.rows(task=TEXT)) == {"a": "Well, maybe."}


def test_a_person_who_changes_their_mind_has_one_say(events):
    for correction in (ON, ON, OFF):
        events.add_exchange("a", correction=correction, user="ann")
    labelled = events.rows()
    assert labels(labelled) == {"a": OFF}
    assert labelled.report["excluded"] == {"superseded": 1, "duplicate": 1}


def test_a_flood_from_one_user_is_cut_to_the_newest_rows(events):
    for number in range(9):
        events.add_exchange(f"flood {number}", correction=OFF, user="mallory")
    events.add_exchange("honest", correction=ON, user="ann")
    labelled = events.rows(SETTINGS.model_copy(update={"max_rows_per_user": 3}))
    assert set(labels(labelled)) == {"flood 6", "flood 7", "flood 8", "honest"}
    assert labelled.report["excluded"] == {"user_limit": 6}
    loudest = labelled.report["by_user"][0]
    assert (loudest["given"], loudest["rows"]) == (9, 3)
    assert "mallory" not in json.dumps(labelled.report)


def test_without_users_the_session_limits_a_flood(events):
    for number in range(9):
        events.add_exchange(f"flood {number}", correction=OFF, session="s1")
    assert len(labels(events.rows(SETTINGS.model_copy(update={"max_rows_per_user": 3})))) == 3


def test_no_key_gives_more_than_its_share_whatever_users_it_invents(events):
    for number in range(200):
        events.add_exchange(f"flood {number}", correction=OFF, key_id="mallory", user=f"u{number}")
    for number in range(60):
        events.add_exchange(f"honest {number}", correction=ON, key_id=f"k{number % 5}", user=f"u{number}")
    labelled = events.rows(FEW_A_USER)
    floods = [question for question in labels(labelled) if question.startswith("flood")]
    assert len(floods) == 20
    assert len(labels(labelled)) == 80
    assert "flood 199" in floods
    assert labelled.report["excluded"] == {"key_share": 180}
    assert summarise_exclusions(labelled.report) == "180 of 260 excluded, most: over `max_share_per_key`"
    excluded = {"key_share": 180}
    assert labelled.report["by_key"]["mallory"] == {"given": 200, "rows": 20, "excluded": excluded}


def test_excluded_feedback_is_counted_for_every_key_by_reason(events):
    for number in range(40):
        events.add_exchange(f"flood {number}", correction=OFF, key_id="mallory", user=f"u{number}")
    for number in range(3):
        events.add_exchange("all say this", correction=ON, key_id="app", user=f"a{number}")
    events.add_exchange("thanks", thumb=-1, key_id="app")
    events.add_exchange("one more", correction="no JSON")
    labelled = events.rows(FEW_A_USER)
    by_key = {key: one["excluded"] for key, one in labelled.report["by_key"].items()}
    assert by_key == {
        "(none)": {"invalid": 1},
        "app": {"no_label": 1, "duplicate": 2},
        "mallory": {"key_share": 39},
    }
    assert "| app | 4 | 1 | no_label 1, duplicate 2 |" in format_report(labelled.report)


def test_a_key_may_always_give_what_one_user_may(events):
    for number in range(300):
        events.add_exchange(f"honest {number}", correction=ON, key_id="app", user=f"u{number}")
    events.add_exchange("one more", correction=ON, key_id="another", user="ann")
    labelled = events.rows()
    excluded = {"key_share": 250}
    assert labelled.report["by_key"]["app"] == {"given": 300, "rows": 50, "excluded": excluded}
    assert labelled.report["by_key"]["another"] == {"given": 1, "rows": 1, "excluded": {}}
    assert labelled.report["excluded"] == {"key_share": 250}


def test_without_keys_there_is_no_limit_by_key(events):
    for number in range(60):
        events.add_exchange(f"q{number}", correction=OFF)
    assert len(labels(events.rows())) == 60


def test_the_only_key_has_no_limit_and_one_that_gives_alone_beside_others_a_share_of_the_exchanges(tmp_path):
    alone, shared = Events(tmp_path / "alone"), Events(tmp_path / "shared")
    for events in (alone, shared):
        for number in range(20):
            events.add_exchange(f"q{number}", correction=OFF, key_id="app", user=f"u{number}")
    shared.add_exchange("no feedback on this", key_id="another")
    assert len(labels(alone.rows(FEW_A_USER))) == 20
    labelled = shared.rows(FEW_A_USER)
    assert set(labels(labelled)) == {f"q{number}" for number in range(15, 20)}  # a quarter of 21
    assert "max_share_per_key" in format_report(labelled.report)


def test_keys_that_only_ask_take_nothing_from_the_share_of_those_that_give(events):
    for key in ("app", "web"):
        for number in range(3):
            events.add_exchange(f"{key} {number}", correction=ON, key_id=key)
    for key in ("b", "c", "d"):
        events.add_exchange("no feedback on this", key_id=key)
    labelled = events.rows()
    assert len(labels(labelled)) == 6
    assert labelled.report["excluded"] == {}
    assert summarise_exclusions(labelled.report) == ""


@pytest.mark.parametrize(
    ("sizes", "others", "share", "limit"),
    [
        ([300], 30, 0.25, 10),
        ([300, 1], 30, 0.25, 10),
        ([10, 10, 10, 10], 0, 0.25, 10),
        ([100, 10, 10, 10, 10], 0, 0.25, 13),
        ([300, 20], 0, 0.25, 0),
        ([300, 20], 0, 0.5, 20),
        ([5], 0, 1.0, 5),
        ([], 7, 0.25, 0),
    ],
)
def test_the_limit_of_a_key_is_the_highest_with_which_none_has_more_than_its_share(
    sizes, others, share, limit
):
    assert find_highest_limit(sizes, others, share) == limit
    left = [min(size, limit) for size in sizes]
    assert max(left, default=0) <= share * (others + sum(left))
    if limit < max(sizes, default=0):
        more = [min(size, limit + 1) for size in sizes]
        assert max(more) > share * (others + sum(more))


def test_a_duplicated_question_cannot_raise_a_keys_share(events):
    for number in range(30):
        events.add_exchange("all say this", correction=ON, key_id="app", user=f"u{number}")
    for number in range(10):
        events.add_exchange(f"mine {number}", correction=OFF, key_id="mallory", user=f"m{number}")
    for key in ("b", "c"):
        events.add_exchange("all say this", correction=ON, key_id=key)
    labelled = events.rows(FEW_A_USER.model_copy(update={"max_share_per_key": 0.5}))
    assert labelled.report["by_key"]["mallory"]["rows"] <= 0.5 * labelled.report["labelled_rows"]


def test_where_labels_contradict_each_other_most_people_decide_or_all_go(events):
    for user, label in (("ann", ON), ("bob", ON), ("cid", OFF)):
        events.add_exchange("two against one", correction=label, user=user)
    for user, label in (("ann", ON), ("bob", OFF)):
        events.add_exchange("one against one", correction=label, user=user)
    labelled = events.rows()
    assert labels(labelled) == {"two against one": ON}
    assert labelled.report["excluded"] == {"contradiction": 2, "outvoted": 1, "duplicate": 1}
    assert summarise_exclusions(labelled.report) == "4 of 5 excluded, most: no label has `min_agreement`"


def test_questions_that_differ_in_case_spaces_and_full_stops_are_one(events):
    for user, question in (("ann", "Lamp  on."), ("bob", "lamp on"), ("cid", "LAMP ON!")):
        events.add_exchange(question, correction=ON, user=user)
    labelled = events.rows()
    assert labels(labelled) == {"LAMP ON!": ON}
    assert labelled.report["excluded"] == {"duplicate": 2}


def test_the_same_json_in_another_order_is_no_contradiction(events):
    events.add_exchange("a", correction='{"intent":"On","area":"x"}', user="ann")
    events.add_exchange("a", correction='{"area": "x", "intent": "On"}', user="bob")
    labelled = events.rows()
    assert labels(labelled) == {"a": '{"intent":"On","area":"x"}'}


def test_the_names_of_one_key_cannot_outvote_another_key(events):
    for number in range(5):
        events.add_exchange("a", correction=OFF, key_id="mallory", user=f"u{number}")
    for key in ("app", "web"):
        events.add_exchange("a", correction=ON, key_id=key, user="ann")
        events.add_exchange("b", correction=ON, key_id=key, user="ann")
    settings = SETTINGS.model_copy(update={"max_share_per_key": 1.0})
    labelled = events.rows(settings)
    assert labels(labelled) == {"a": ON, "b": ON}
    assert labelled.report["excluded"]["outvoted"] == 5


def test_the_newest_rows_stay_when_there_are_too_many(events):
    for number in range(10):
        events.add_exchange(f"q{number}", correction=ON)
    labelled = events.rows(SETTINGS.model_copy(update={"max_rows": 4}))
    assert set(labels(labelled)) == {"q6", "q7", "q8", "q9"}
    assert labelled.report["excluded"] == {"row_limit": 6}


def test_a_question_is_on_the_same_side_in_every_retraining(tmp_path):
    first, later = Events(tmp_path / "first"), Events(tmp_path / "later")
    for number in range(200):
        first.add_exchange(f"question {number}", correction=ON)
        later.add_exchange(f"QUESTION  {number}.", correction=OFF)
        later.add_exchange(f"something new {number}", correction=ON)
    before, after = first.rows(), later.rows()
    held_out = {row.group for row in before.holdout}
    assert held_out == {row.group for row in after.holdout} & {
        row.group for row in (*before.train, *before.holdout)
    }
    assert not held_out & {row.group for row in after.train}
    assert 30 <= len(held_out) <= 90
    other_seed = first.rows(SETTINGS.model_copy(update={"seed": 8}))
    assert {row.group for row in other_seed.holdout} != held_out


def test_the_held_out_share_is_that_of_the_settings():
    hits = sum(is_held_out(f"{number:016x}", 0.3, 7) for number in range(10_000))
    assert 2800 < hits < 3200


def test_what_was_ever_held_out_is_not_learned_though_the_share_falls(events, tmp_path):
    for number in range(40):
        events.add_exchange(f"question {number}", correction=ON)
    first = events.rows()
    write_labelled(tmp_path, first)
    less = SETTINGS.model_copy(update={"holdout_share": 0.01})
    again = events.rows(less, held_out=read_held_out_before(tmp_path))
    assert {row.group for row in first.holdout} <= {row.group for row in again.holdout}
    write_labelled(tmp_path, replace(again, holdout=[]))
    assert {row.group.removeprefix("feedback/") for row in first.holdout} <= read_held_out_before(tmp_path)


def add_session(events, number, **changes):
    """Add a question and the one after it, both corrected."""
    turns = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": ON}]
    changes["session"] = f"s{number}"
    events.add_exchange(f"question {number}", correction=ON, **changes)
    later = json.dumps([*turns, {"role": "user", "content": f"and {number}?"}])
    events.add_exchange("", correction=OFF, messages=later, **changes)


def test_the_turns_of_a_session_are_on_one_side_and_stay_there(tmp_path):
    first, later, alone = (Events(tmp_path / name) for name in ("first", "later", "alone"))
    for number in range(60):
        add_session(first, number)
        add_session(later, number)
        alone.add_exchange(f"Question {number}", correction=ON)
    labelled = first.rows()
    learned, apart = ({row.group for row in side} for side in (labelled.train, labelled.holdout))
    assert learned and apart and not learned & apart
    assert len(learned | apart) == 60 and len(labelled.train) + len(labelled.holdout) == 120
    write_labelled(tmp_path, labelled)
    less = SETTINGS.model_copy(update={"holdout_share": 0.001})
    again = later.rows(less, held_out=read_held_out_before(tmp_path))
    assert apart <= {row.group for row in again.holdout}
    questions = {row.question for row in alone.rows(less, held_out=read_held_out_before(tmp_path)).holdout}
    assert {row.question.lower() for row in labelled.holdout if len(row.messages) == 2} <= {
        question.lower() for question in questions
    }


def test_a_session_of_questions_alone_leaves_each_on_its_own_side(events):
    for number in range(20):
        events.add_exchange(f"question {number}", correction=ON, session="one")
        events.add_exchange(f"from elsewhere {number}", correction=ON, session=None)
    rows = [*(labelled := events.rows()).train, *labelled.holdout]
    assert {row.group for row in rows} == {f"feedback/{hash_prompt(row.messages[:-1])}" for row in rows}


def test_what_is_written_is_read_back_and_the_same_events_give_the_same_bytes(events, tmp_path):
    for number in range(20):
        events.add_exchange(f"Frage {number}: wärmer", correction=ON, user=f"u{number % 3}")
    labelled = events.rows()
    write_labelled(tmp_path, labelled)
    paths = [tmp_path / path for path in (ROWS, HELD_OUT, HELD_OUT_PROMPTS, REPORT)]
    first = [path.read_bytes() for path in paths]
    assert read_labelled(tmp_path / ROWS) == labelled.train
    assert read_labelled(tmp_path / HELD_OUT) == labelled.holdout
    assert json.loads(first[-1]) == labelled.report
    write_labelled(tmp_path, events.rows())
    assert [path.read_bytes() for path in paths] == first


def test_without_feedback_there_are_no_rows_and_the_files_say_so(events, tmp_path):
    events.add_exchange("a")
    write_labelled(tmp_path, events.rows())
    assert read_labelled(tmp_path / ROWS) == read_labelled(tmp_path / "nothing.jsonl") == []
    assert (tmp_path / ROWS).read_text() == ""


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1 is not a valid row"):
        read_labelled(tmp_path / "rows.jsonl")


def test_a_missing_store_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no event store"):
        label_rows(f"sqlite:///{tmp_path}/none.db", 0.0, 1.0, SETTINGS, TASK)


def test_the_counts_of_the_report_add_up(events):
    for number in range(30):
        events.add_exchange(
            f"q{number % 17}", correction=(ON, OFF, "x")[number % 3], user=f"u{number % 4}", thumb=-1
        )
        events.add_exchange(f"t{number}", thumb=(1, -1)[number % 2], user=f"u{number % 4}")
    report = events.rows(SETTINGS.model_copy(update={"max_rows_per_user": 8})).report
    assert report["given"] == 60 == report["labelled_rows"] + sum(report["excluded"].values())
    assert report["labelled_rows"] == report["rows_train"] + report["rows_holdout"]
    assert set(report["excluded"]) <= set(REASONS)
    assert sum(one["rows"] for one in report["by_user"]) == report["labelled_rows"]


def test_the_summary_says_what_became_of_it_and_why(events):
    events.add_exchange("a", correction="nonsense", user="ann")
    events.add_exchange("b", correction=ON, user="ann", key_id="k1")
    text = format_report(events.rows().report)
    assert "**1 rows to learn**" in text or "and 1 to judge by" in text
    assert "| invalid | 1 | the label is not an answer of the task |" in text
    assert "| k1 | 1 |" in text


@pytest.mark.parametrize(
    ("text", "plain"), [(" Lamp\tON ", "lamp on"), ("lamp on?!", "lamp on"), ("?!", "?!"), ("ﬁne…", "fine")]
)
def test_a_question_is_known_again_by_its_words(text, plain):
    assert normalise_text(text) == plain


def test_the_task_is_read_from_what_is_served(tmp_path):
    serving = {
        "task": JsonTask("intent").describe(),
        "answer_schema": SCHEMA,
        "system_prompt": "Be brief.",
    }
    params = load_params(ROOT / "params.yaml")
    task = read_served_task(tmp_path, params, serving)
    assert (task.answer_schema, task.system_prompt) == (SCHEMA, "Be brief.")
    assert task.max_answer_chars == params.curate.max_answer_chars
    with pytest.raises(InputError, match=r"serving\.json does not exist"):
        read_served_task(tmp_path, params)


@pytest.mark.slow
def test_of_fifty_thousand_labels_the_newest_are_kept(events):
    for number in range(50_000):
        events.add_exchange(f"question number {number}", correction=ON, user=f"u{number % 2000}")
    events.store()
    labelled = events.rows(SETTINGS.model_copy(update={"max_rows": 20_000}))
    assert labelled.report["labelled_rows"] == 20_000

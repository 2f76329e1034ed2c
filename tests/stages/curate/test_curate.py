import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stages.common.artifacts import read_lines
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.privacy.personal_data import PERSONAL_DATA
from stages.common.records import make_row, read_rows, write_rows
from stages.common.task.json_task import JsonTask
from stages.common.task.text_task import TextTask
from stages.curate.__main__ import apply_rules, count_rows, main, plot_rows
from stages.curate.duplicates import (
    find_conflicting_answers,
    find_contradicting_feedback,
    find_exact_duplicates,
    find_near_duplicates,
)
from stages.curate.rules import (
    check_answer,
    find_personal_data,
    limit_answer_length,
    limit_question_length,
    limit_repetition,
    require_text,
)
from stages.curate.spelling import spell_rows
from tests.stages.common.privacy.test_personal_data import PERSONAL

ROOT = Path(__file__).parents[3]


def row(question="turn on the light", answer='{"intent":"On"}', **more):
    return make_row([Message("user", question), Message("assistant", answer)], "toy", "mit", **more)


def reason(rule, **parts):
    rejection = rule(row(**parts))
    return rejection.reason if rejection else None


COMMANDS = [
    "sed 's/  */ /g' file",
    "cut -d'\t' -f2 file",
    "name\tage\tcity",
    "価格　１００円",
    "Prix : 10\u202f000\u00a0€",
    "page one\fpage two",
    "line one\x85line two",
    "a\x1fb\x1fc\x00",
    '{"text": "two  spaces\\tand tab"}',
    "  indented  \n\n\treturn 1  \n",
    "\ufeffword\u200b joined\u00ad",
    "می\u200cخواهم क्\u200dष 👩\u200d🚀",
]


@pytest.mark.parametrize("text", COMMANDS)
def test_nothing_in_a_text_is_changed_but_composition_and_line_ends(text):
    before = row(text, text)
    assert spell_rows([before], ["nfc", "line_ends"]) == ([before], [])


def test_what_is_changed_is_counted_and_shown_before_and_after(project):
    write_rows(
        Path("artifacts/collect/rows.parquet"),
        [row("cafe\u0301 please"), row("one\r\ntwo\rthree", '{"intent":"O\u0308ff"}\r\n'), row("as it is")],
    )
    main()
    assert [r.question for r in read_rows(Path("artifacts/curate/rows.parquet"))] == [
        "café please",
        "one\ntwo\nthree",
        "as it is",
    ]
    report = json.loads(Path("reports/curate/metrics.json").read_text())
    assert (report["rows_changed"], report["messages_changed_by"]) == (2, {"line_ends": 2, "nfc": 2})
    changes = list(map(json.loads, read_lines(Path("artifacts/curate/changes.jsonl"))))
    assert [(c["role"], c["changes"], c["before"], c["after"]) for c in changes] == [
        ("user", ["nfc"], "cafe\u0301 please", "café please"),
        ("user", ["line_ends"], "one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("assistant", ["nfc", "line_ends"], '{"intent":"O\u0308ff"}\r\n', '{"intent":"Öff"}\n'),
    ]
    assert changes[0]["row"] == row("café please").id


def test_what_is_changed_can_be_switched_off():
    before = row("cafe\u0301\r\n")
    assert spell_rows([before], []) == ([before], [])
    assert spell_rows([before], ["line_ends"])[0] == [row("cafe\u0301\n")]


def test_a_changed_row_keeps_what_it_knows_and_has_the_id_of_its_new_text():
    more = {"tags": {"a": "b"}, "origin": "feedback"}
    ((after, own), _) = spell_rows([row("cafe\u0301", group="g", **more), row("cafe\u0301")], ["nfc"])
    assert after == row("café", group="g", **more)
    assert own.group == row("café").id


@pytest.mark.parametrize("text", ["\x00\x01", "\u200b\ufeff", " \u00a0\u3000\n"])
def test_a_message_without_anything_to_see_is_rejected(text):
    assert reason(limit_question_length(1, 10), question=text) == "empty_question"
    if text.strip():
        assert reason(limit_answer_length(10), answer=text) == "empty_answer"


def test_questions_and_answers_have_a_length():
    assert reason(limit_question_length(3, 5), question="ab") == "short_question"
    assert reason(limit_question_length(3, 5), question="abcdef") == "long_question"
    assert reason(limit_question_length(3, 5), question="abcd") is None
    assert reason(limit_answer_length(5), answer="abcdef") == "long_answer"
    assert reason(limit_answer_length(5), answer="abc") is None


@pytest.mark.parametrize("answer", ["on", '{"a":', "4", '"a"', "null"])
def test_an_answer_that_is_no_json_object_goes(answer):
    assert reason(check_answer(JsonTask(None)), answer=answer) == "invalid_answer"
    assert reason(check_answer(JsonTask(None)), answer='{"a": [1]}') is None


def test_a_text_that_repeats_itself_is_rejected():
    rule = limit_repetition(30, 8)
    assert reason(rule, question="a" * 40) == "repetition"
    assert reason(rule, answer="yes " * 12) == "repetition"
    assert reason(rule, question="no no no, I said no") is None


@pytest.mark.parametrize(
    "text", ["-" * 80, "0 " * 40, "1" * 50, "😂" * 50, "| " * 30, "=" * 20 + " a " + "=" * 20]
)
def test_rules_and_numbers_and_emoji_may_repeat(text):
    assert reason(limit_repetition(30, 8), question=text, answer=text) is None


def test_repetition_has_a_switch():
    assert reason(limit_repetition(None, 8), question="a" * 40) is None
    assert reason(limit_repetition(30, None), answer="yes " * 12) is None


def test_questions_of_signs_go():
    rule = require_text(0.3)
    assert reason(rule, question="!!!??? ### $$$ %%% &&&") == "mostly_not_text"
    assert reason(rule, question="\ufffd" * 20) == "mostly_not_text"
    assert reason(rule, question=":-)") is None
    assert reason(rule, question="今日の天気はどうですか、教えてください") is None
    assert reason(rule, question="मुझे बताओ कि आज मौसम कैसा है") is None
    assert reason(rule, question="12 + 30 * (4 - 5) = ?") is None
    assert reason(rule, question="🎉🎂🎈🎁🥳🎊🎶🍰🕯️✨ ?") is None


@pytest.mark.parametrize("kind", PERSONAL_DATA)
def test_personal_data_goes_by_its_kind_wherever_it_stands(kind):
    text, others = PERSONAL[kind][0], [other for other in PERSONAL_DATA if other != kind]
    assert reason(find_personal_data([kind]), question=text) == f"personal_{kind}"
    assert reason(find_personal_data([kind]), answer=text) == f"personal_{kind}"
    assert reason(find_personal_data(others), question=text) is None


def test_a_secret_is_never_a_training_row_and_the_operators_own_prompt_is_no_reason():
    system = Message("system", "Questions: support@perennial-mail.net")
    rows = [replace(row("on"), messages=(system, *row("on").messages)), row("pw: hunter2hunter2")]
    rule = find_personal_data(["email", "secret"], system.content)
    assert [found and found.reason for found in map(rule, rows)] == [None, "personal_secret"]
    assert find_personal_data(["email"], "Answer.")(rows[0]).reason == "personal_email"


def test_the_reason_does_not_repeat_the_personal_data():
    rejection = find_personal_data(["email"])(row("write to ann@perennial-mail.net"))
    assert "ann" not in rejection.detail


def test_both_rows_of_a_conflict_go_and_the_order_of_keys_is_no_conflict():
    rows = [
        row("a b", '{"x":1}'),
        row("A  b", '{"x":2}'),
        row("c", '{"x":1,"y":2}'),
        row("c", '{"y":2, "x":1}'),
    ]
    assert {
        number: rejection.reason
        for number, rejection in find_conflicting_answers(JsonTask(None))(rows).items()
    } == {
        0: "conflicting_answer",
        1: "conflicting_answer",
    }


def test_feedback_that_contradicts_other_rows_goes_and_they_stay():
    rows = [
        row(),
        row("Turn on  the light", '{"intent":"Off"}', origin="feedback"),
        row("turn on the light", '{ "intent": "On" }', origin="feedback"),
        row("something new", '{"intent":"Off"}', origin="feedback"),
    ]
    assert list(find_contradicting_feedback(JsonTask(None))(rows)) == [1]
    assert find_conflicting_answers(JsonTask(None))([rows[0], rows[2], rows[3]]) == {}


def test_all_but_the_first_of_equal_rows_go():
    rows = [row("a"), row("b"), row("a"), row("a")]
    assert sorted(find_exact_duplicates(rows)) == [2, 3]


def test_near_duplicates_go_when_the_answer_is_the_same():
    rows = [
        row("turn on the light in the kitchen"),
        row("turn on the lights in the kitchen"),
        row("turn on the light in the kitchen!", '{"intent":"Off"}'),
    ]
    rejected = find_near_duplicates(0.8, TextTask())(rows)
    assert sorted(rejected) == [1]
    assert rows[0].id in rejected[1].detail


def test_a_chain_of_near_duplicates_is_measured_against_kept_rows_only():
    texts = ["turn on the light", "turn on the lights", "turn on the lights!!", "turn on the lights!! now"]
    kept, rejected = apply_rules([row(text) for text in texts], [], [find_near_duplicates(0.8, TextTask())])
    assert texts.index(kept[1].question) > 1
    assert len(kept) + len(rejected) == 4


def test_a_row_has_the_reason_of_the_first_rule_and_nothing_is_lost():
    rows = [row("x", "no json"), row("fine"), row("fine"), row("write to ann@perennial-mail.net", "no json")]
    kept, rejected = apply_rules(
        rows, [limit_question_length(2, 99), check_answer(JsonTask(None))], [find_exact_duplicates]
    )
    assert kept == [row("fine")]
    assert [(r.question, d.reason) for r, d in rejected] == [
        ("x", "short_question"),
        ("fine", "exact_duplicate"),
        ("write to ann@perennial-mail.net", "invalid_answer"),
    ]
    assert count_rows(4, kept, rejected)["rejected_by_reason"] == {
        "invalid_answer": 1,
        "exact_duplicate": 1,
        "short_question": 1,
    }


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="3 rows went in"):
        count_rows(3, [row()], [])


def test_equal_numbers_are_equal_plots(tmp_path):
    counts = {"near_duplicate": 3, "short_question": 1}
    plot_rows(10, counts, tmp_path / "a.svg")
    plot_rows(10, dict(reversed(counts.items())), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"near_duplicate" in (tmp_path / "a.svg").read_bytes()


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())

    def configure(**section):
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["curate"] |= section
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    return configure


def test_rejects_are_written_with_their_rows(project):
    write_rows(
        Path("artifacts/collect/rows.parquet"),
        [row("one light on"), row("one light on"), row("call a@b.org")],
    )
    main()
    assert read_rows(Path("artifacts/curate/rows.parquet")) == [row("one light on")]
    rejects = [json.loads(line) for line in Path("artifacts/curate/rejects.jsonl").read_text().splitlines()]
    assert [reject["reason"] for reject in rejects] == ["exact_duplicate", "personal_email"]
    assert rejects[0]["row"]["messages"][0]["content"] == "one light on"
    assert rejects[1]["id"] == rejects[1]["row"]["id"] == row("call a@b.org").id
    report = json.loads(Path("reports/curate/metrics.json").read_text())
    assert (report["rows_in"], report["kept"], report["rejected"]) == (3, 1, 2)
    assert Path("reports/curate/rows.svg").read_bytes().startswith(b"<?xml")


def test_no_file_has_what_a_row_was_rejected_for(project):
    pasted = '{"intent":"On","password":"hunter2hunter2","note":"ann@perennial-mail.net"}'
    rows = [
        row(
            "cafe\u0301 for ann@perennial-mail.net",
            group="ann@perennial-mail.net",
            tags={"who": "+49 30 90182345"},
        ),
        row("my password is hunter2hunter2 " + "and so on " * 300),  # too long as well
        row("log me in", pasted),
        row("too short an answer", "no json of mine"),
        row("one light on"),
    ]
    write_rows(Path("artifacts/collect/rows.parquet"), rows)
    main()
    written = [Path("artifacts/curate") / name for name in ("rejects.jsonl", "changes.jsonl")]
    text = "".join(path.read_text() for path in written)
    assert not [one for one in ("ann@", "hunter2", "90182345") if one in text]
    assert "café for [email]" in text and "no json of mine" in text
    rejects = [json.loads(line) for line in read_lines(written[0])]
    assert [(r["reason"], r["id"]) for r in rejects] == [
        ("personal_email", row("café for ann@perennial-mail.net").id),
        ("personal_secret", rows[1].id),
        ("personal_email", rows[2].id),
        ("invalid_answer", rows[3].id),
    ]
    assert json.loads(rejects[2]["row"]["messages"][1]["content"])["intent"] == "On"


def test_equal_rows_stay_where_they_are_wanted_each_with_an_id_of_its_own(project):
    rows = [row("one light on"), row("one light on"), row("one light on!"), row("one light on", group="g")]
    write_rows(Path("artifacts/collect/rows.parquet"), rows)
    main()
    assert read_rows(Path("artifacts/curate/rows.parquet")) == rows[:1]
    project(on_exact_duplicates="keep")
    main()
    kept = read_rows(Path("artifacts/curate/rows.parquet"))
    assert [r.id for r in kept] == [rows[0].id, f"{rows[0].id}-2", f"{rows[0].id}-3"]
    assert [r.group for r in kept] == [rows[0].id, rows[0].id, "g"]
    assert {r.question for r in kept} == {"one light on"}
    reasons = json.loads(Path("reports/curate/metrics.json").read_text())["rejected_by_reason"]
    assert reasons == {"near_duplicate": 1}


def test_no_row_goes_because_of_feedback_wherever_its_source_stands(project):
    own = [
        row("please turn on everything that shines in the long hall upstairs by the light"),
        row("what time is it"),
        row("twice"),
        row("twice"),
    ]
    told = [
        row(
            "please turn on everything that shines in the long hall upstairs by the light",
            '{"intent":"Off"}',
            origin="feedback",
        ),
        row(
            "please turn on everything that shines in the long hall upstairs by the lights", origin="feedback"
        ),
        row("what time is it", origin="feedback"),
        row("a new question", origin="feedback"),
    ]
    for order in ([own[0], *told, *own[1:]], [*own, *told]):
        write_rows(Path("artifacts/collect/rows.parquet"), order)
        main()
        kept = read_rows(Path("artifacts/curate/rows.parquet"))
        assert kept == [*own[:3], told[3]]
        reasons = json.loads(Path("reports/curate/metrics.json").read_text())["rejected_by_reason"]
        assert reasons == {"contradicting_feedback": 1, "exact_duplicate": 2, "near_duplicate": 1}


def test_when_no_row_is_left_the_reasons_are_named_and_written(project):
    write_rows(Path("artifacts/collect/rows.parquet"), [row(answer="no json")])
    with pytest.raises(InputError, match=r"all 1 rows were rejected.*invalid_answer"):
        main()
    assert "invalid_answer" in Path("artifacts/curate/rejects.jsonl").read_text()


def test_curating_before_collecting_says_what_to_run(project):
    with pytest.raises(InputError, match="dvc repro collect"):
        main()


def test_every_rule_of_taste_has_a_switch(project):
    rows = [
        row(text, '{"intent":"On"}')
        for text in ("a" * 40, "yes " * 12, "{[(<>)]};;{[()]}", "f(x) near", "f(x) neat")
    ]
    rows += [row("which one is right", f'{{"intent":"{intent}"}}') for intent in ("On", "Off")]
    write_rows(Path("artifacts/collect/rows.parquet"), rows)
    main()
    assert len(read_rows(Path("artifacts/curate/rows.parquet"))) == 2
    project(
        max_same_characters=None,
        max_same_words=None,
        min_text_share=None,
        near_duplicate_threshold=None,
        on_conflicting_answers="keep",
    )
    main()
    assert read_rows(Path("artifacts/curate/rows.parquet")) == rows


def test_rows_of_one_conversation_are_one_group(project):
    turns = [
        Message(role, f"{role} says a thing number {n}") for n in range(3) for role in ("user", "assistant")
    ]
    talk = [make_row(turns[:end], "toy", "mit") for end in (2, 4, 6)]
    write_rows(Path("artifacts/collect/rows.parquet"), [row("alone"), *talk])
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["task"] |= {"kind": "text", "label_key": None, "stratify_by": None}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main()
    kept = read_rows(Path("artifacts/curate/rows.parquet"))
    assert [r.group for r in kept] == [row("alone").id, *[talk[0].id] * 3]
    assert json.loads(Path("reports/curate/metrics.json").read_text())["groups_joined_as_conversations"] == 2

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from monitoring.traffic.columns import FEATURES, VECTOR_SIZE, Column, build_table_schema
from monitoring.traffic.features import (
    compute_feature_tables,
    list_watched_columns,
)
from monitoring.traffic.service_metrics import ServiceSums, compute_cost_per_1000, tap_service_sums
from monitoring.traffic.windows import QuarantinedEvent, Window, read_window
from services.events import get_joined_schema
from stages.common.params.loop import FeatureSettings
from tests.exchanges import VERSION
from tests.monitoring.store import exchange, feedback, stored

SETTINGS = FeatureSettings(max_categories=4, embeddings="ngrams", cost_per_hour=0.0)
PLAIN = FeatureSettings(max_categories=4, embeddings="none", cost_per_hour=0.0)
REFUSED = {"status": 400, "answer": None, "finish_reason": None, "valid_output": None, "mean_logprob": None}
FAILED = REFUSED | {"status": 500}
CANCELLED = {"status": 499, "finish_reason": "cancelled", "valid_output": None}


def asked(text, *before):
    return json.dumps([{"role": role, "content": content} for role, content in (*before, ("user", text))])


def measured(tables, cost_per_hour):
    sums = ServiceSums()
    for one in tables:
        sums.add(one)
    return sums.metrics(cost_per_hour)


def batch(*events, given=()):
    rows = [
        asdict(event) | {"feedback": [asdict(f) for f in given if f.request_id == event.request_id]}
        for event in events
    ]
    for row in rows:
        for given in row["feedback"]:
            del given["request_id"]
    return pa.RecordBatch.from_pylist(rows, schema=get_joined_schema())


def answers(*texts):
    return batch(*(exchange(number, answer=text) for number, text in enumerate(texts)))


def table(data, settings=PLAIN, columns=None, labels=None):
    columns = list_watched_columns([data], settings) if columns is None else columns
    (made,) = compute_feature_tables([data], columns, settings, labels)
    return made


def column(name, *events, given=(), labels=None):
    return table(batch(*events, given=given), labels=labels)[name].to_pylist()


def found_in_answers(data, settings=PLAIN):
    return {c.name: c.kind for c in list_watched_columns([data], settings) if c.name.startswith("answer.")}


def test_a_table_has_the_columns_that_are_promised_in_their_order():
    data = answers('{"intent":"On"}', *['{"intent":"Off"}'] * 9)
    columns = list_watched_columns([data], SETTINGS)
    made = table(data, SETTINGS, columns)
    assert columns[: len(FEATURES)] == FEATURES and columns[len(FEATURES)].name == "answer.intent"
    assert made.schema == build_table_schema(columns)
    assert made.schema.field("prompt_vector").type == pa.list_(pa.float32(), VECTOR_SIZE)
    assert [made[name].null_count for name in ("request_id", "received_at", "session", "version")] == [0] * 4


def test_the_session_is_the_session_else_the_user_else_the_request():
    events = exchange(0), exchange(1, session=None, user="u"), exchange(2, session=None)
    assert column("session", *events) == ["s0", "u", "r00002"]


def test_the_last_user_message_is_the_question():
    talk = asked("it is 22 °C HOT, ok?", ("system", "Be short."), ("user", "hi"), ("assistant", "hello"))
    made = table(batch(exchange(0, messages=talk))).to_pylist()[0]
    assert (made["prompt_chars"], made["prompt_words"], made["turns"]) == (20, 6, 4)
    assert made["digit_share"] == pytest.approx(2 / 20)
    assert made["non_letter_share"] == pytest.approx(5 / 20)  # 2, 2, °, the comma, the question mark
    assert made["capital_share"] == pytest.approx(4 / 10)


def test_shares_of_nothing_are_not_known():
    made = table(batch(exchange(0, messages=asked("")), exchange(1, messages=asked("12 34"))))
    assert made["digit_share"].to_pylist() == [None, pytest.approx(4 / 5)]
    assert made["capital_share"].to_pylist() == [None, None]


def test_the_language_of_the_question_is_a_category():
    texts = "turn on the light in the kitchen", "schalte das Licht in der Küche ein", "ok"
    events = [exchange(n, messages=asked(text)) for n, text in enumerate(texts)]
    assert column("language", *events) == ["en", "de", "short"]


def test_a_check_of_the_guard_is_a_flag_where_it_looked():
    decisions = '{"prompt_injection": [false, "override"], "toxicity": [true, null]}'
    made = table(batch(exchange(0, decisions=decisions), exchange(1, decisions="{}")))
    assert made["guard_prompt_injection"].to_pylist() == [1.0, None]
    assert made["guard_toxicity"].to_pylist() == [0.0, None]
    assert made["guard_secrets"].to_pylist() == [None, None]


@pytest.mark.parametrize("ending", [REFUSED, FAILED, CANCELLED], ids=["refused", "failed", "cancelled"])
def test_an_exchange_without_a_whole_answer_has_no_output(ending):
    data = batch(*(exchange(number) for number in range(9)), exchange(9, **ending))
    made = table(data, SETTINGS)
    nothing = made.slice(9).to_pylist()[0]
    output = [c.name for c in list_watched_columns([data], SETTINGS) if c.drift_type == "output"]
    assert {"answer.intent", "answer_vector", "answer_chars"} < set(output)
    assert all(nothing[name] is None for name in output)
    assert nothing["total_s"] is None and nothing["valid_output"] is None and nothing["label_match"] is None
    assert nothing["prompt_vector"] is not None
    assert made["answer_vector"].null_count == 1 and made["answer_chars"][0].as_py() == 15


def test_errors_of_the_server_refusals_and_leavers_are_told_apart():
    made = table(batch(exchange(0), exchange(1, **REFUSED), exchange(2, **FAILED), exchange(3, **CANCELLED)))
    assert made["failed"].to_pylist() == [0, 0, 1, 0]
    assert made["refused"].to_pylist() == [0, 1, 0, 0]
    assert made["cancelled"].to_pylist() == [0, 0, 0, 1]


def test_an_answer_that_the_guard_refused_is_an_output_all_the_same():
    refused = exchange(0, status=400, decisions='{"secrets": [false, "aws_key"]}')
    assert column("guard_secrets", refused) == [1.0]
    assert column("answer_chars", refused) == [15.0]


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ('{"intent":"On","area":"hall"}', "area,intent"),
        ("{}", "(no keys)"),
        ('["a"]', "(list)"),
        ("42", "(value)"),
        ("I turned it on.", "(text)"),
        ("  ", "(empty)"),
        ('{"intent":"On"', "(text)"),
        pytest.param("[" * 100_000, "(text)", id="too deep"),
    ],
)
def test_the_form_of_an_answer_is_its_keys_or_what_else_it_is(answer, form):
    assert column("answer_form", exchange(0, answer=answer)) == [form]


def test_keys_of_json_answers_with_few_values_are_categories():
    data = answers(
        *['{"intent":"On","area":"hall"}', '{"intent":"Off","level":3,"area":"den"}'] * 6, "no JSON"
    )
    assert found_in_answers(data) == {
        "answer.area": "category",
        "answer.intent": "category",
        "answer.level": "category",
    }
    made = table(data).slice(0, 2).to_pylist() + table(data).slice(12).to_pylist()
    assert [row["answer.intent"] for row in made] == ["On", "Off", None]
    assert [row["answer.level"] for row in made] == ["(absent)", "3", None]


def classes_of(*texts):
    found = [c for c in list_watched_columns([answers(*texts)], PLAIN) if c.name == "answer_class"]
    return table(answers(*texts), columns=found)["answer_class"].to_pylist() if found else None


def test_labels_are_classes_however_many_there_are():
    labels = [f"label {number % 50}" for number in range(600)]
    assert classes_of(*labels) == labels


def test_texts_and_json_are_no_classes_of_whole_answers():
    assert classes_of(*(f"a text of its own, number {number}" for number in range(60))) is None
    assert classes_of("not JSON", *['{"intent":"On"}'] * 20) is None


def test_a_key_of_free_text_is_looked_at_for_being_there():
    data = answers(*(f'{{"intent":"Say","message":"text {number}"}}' for number in range(20)), *["{}"] * 20)
    assert found_in_answers(data) == {"answer.intent": "category", "answer.message": "flag"}
    assert set(table(data)["answer.message"].to_pylist()[:20]) == {1.0}
    assert set(table(data)["answer.message"].to_pylist()[20:]) == {0.0}


def test_a_few_rare_values_do_not_make_a_category_free_text():
    common = [f'{{"intent":"{name}"}}' for name in "ABCD"] * 25
    assert found_in_answers(answers(*common, *(f'{{"intent":"rare{n}"}}' for n in range(5)))) == {
        "answer.intent": "category"
    }


def test_a_key_that_hardly_ever_comes_is_not_looked_at():
    data = answers(*['{"intent":"On"}'] * 996, *['{"intent":"On","odd":1}'] * 4)
    assert found_in_answers(data) == {"answer.intent": "category"}


def test_the_last_thumb_counts():
    given = (
        feedback(0, 1.0, thumb=-1),
        feedback(0, 2.0, thumb=1),
        feedback(0, 3.0),
        feedback(1, 4.0, thumb=-1),
    )
    assert column("thumb", exchange(0), exchange(1), exchange(2), given=given) == [1.0, 0.0, None]


def test_a_correction_that_says_the_same_corrects_nothing():
    given = (
        feedback(0, correction='{ "intent": "On" }'),
        feedback(1, correction='{"intent":"Off"}'),
        feedback(2, thumb=1),
    )
    events = [exchange(number) for number in range(4)]
    assert column("corrected", *events, given=given) == [0.0, 1.0, 0.0, None]
    assert column("label_match", *events, given=given) == [1.0, 0.0, None, None]


def test_a_labelled_sample_says_what_is_right():
    labels = {"r00000": '{"intent":"Off"}', "r00001": '{"intent":"On"}'}
    given = (feedback(0, correction='{"intent":"On"}'),)
    events = [exchange(number) for number in range(3)]
    assert column("label_match", *events, given=given, labels=labels) == [0.0, 1.0, None]


def test_valid_output_is_known_where_there_is_a_schema():
    events = exchange(0), exchange(1, valid_output=False), exchange(2, valid_output=None)
    assert column("valid_output", *events) == [1.0, 0.0, None]


def test_vectors_are_excluded_where_the_settings_say_so():
    assert not [c for c in list_watched_columns([], PLAIN) if c.kind == "vector"]


class Poisoned(dict):
    """Labels that fail for one request, as a bug in reading an exchange would."""

    def get(self, request_id, default=None):
        if request_id == "r00001":
            raise TypeError("a bug")
        return default


def test_an_exchange_that_cannot_be_read_is_excluded_and_named():
    unreadable = []
    data = batch(*(exchange(number) for number in range(4)))
    (made,) = compute_feature_tables([data], FEATURES, SETTINGS, Poisoned(any="one"), unreadable=unreadable)
    assert made["request_id"].to_pylist() == ["r00000", "r00002", "r00003"]
    assert unreadable == [QuarantinedEvent("r00001", 1001.0, "unreadable (TypeError)")]
    assert list(compute_feature_tables([data.slice(1, 1)], FEATURES, SETTINGS, Poisoned(any="one"))) == []


def test_half_of_a_surrogate_pair_is_read_as_the_sign_for_an_unknown_character():
    data = batch(
        exchange(0, answer=r'{"a\ud83d": "\udc00", "b": "\ud83d\ude00"}', messages=asked("\ud83d lamp"))
    )
    columns = [Column(f"answer.{key}", "output", "category", None, "", "") for key in ("a\ufffd", "b")]
    made = table(data, columns=(*columns, *FEATURES[:1]))
    assert [made[column.name].to_pylist() for column in columns] == [["\ufffd"], ["😀"]]
    assert made["prompt_chars"].to_pylist() == [6.0]


def test_the_vectors_of_like_questions_lie_side_by_side():
    texts = "turn on the hall light", "turn off the hall light", "how warm is it in Oslo"
    made = table(batch(*(exchange(n, messages=asked(text)) for n, text in enumerate(texts))), SETTINGS)
    first, second, third = np.array(made["prompt_vector"].to_pylist())
    assert first @ second > first @ third + 0.2


def test_a_column_of_the_reference_that_a_window_lacks_is_absent_in_it():
    columns = (Column("answer.intent", "output", "category", None, "", ""),)
    made = table(answers('{"other":1}', "text"), columns=columns)
    assert made["answer.intent"].to_pylist() == ["(absent)", None]


def test_pages_of_a_real_store_become_one_table_each(tmp_path):
    url = stored(f"sqlite:///{tmp_path}/events.db", *(exchange(number) for number in range(1200)))
    pages = (page.batch for page in read_window(url, Window(0.0, 1e9, 1200, "w"), VERSION))
    assert [made.num_rows for made in compute_feature_tables(pages, FEATURES, PLAIN)] == [1000, 200]


def test_the_figures_of_the_service_are_its_quantiles_and_counts():
    events = [
        exchange(number, at=1000.0 + 10 * number, queue_s=0.0, total_s=number + 1.0) for number in range(100)
    ]
    found = measured([table(batch(*events, exchange(100, **REFUSED)))], cost_per_hour=0.0)
    assert (found["requests"], found["refused"], found["failed"]) == (101, 1, 0)
    assert found["total_p50_s"] == pytest.approx(50.0, rel=0.012)
    assert found["total_p95_s"] == pytest.approx(95.0, rel=0.012)
    assert found["queue_p50_s"] == 0.0


def test_answers_written_side_by_side_share_the_machine():
    # 0 to 10, 5 to 15 within it, then 100 to 101: 16 s busy, over two tables as over one
    spans = (0.0, 10.0), (5.0, 10.0), (7.0, 1.0), (100.0, 1.0)
    events = [exchange(n, at=at, total_s=length) for n, (at, length) in enumerate(spans)]
    tables = [table(batch(*events[:2])), table(batch(*events[2:]))]
    found = measured(tables, cost_per_hour=3.6)
    assert found["busy_s"] == pytest.approx(16.0)
    assert found["tokens_per_s"] == pytest.approx(4 * 9 / 16, abs=0.01)
    assert found["cost_per_1000"] == pytest.approx(16.0 * 3.6 / 3600 / 4 * 1000)
    assert measured([pa.concat_tables(tables)], cost_per_hour=3.6) == found


def test_figures_of_nothing_are_none():
    assert measured([], cost_per_hour=1.0)["cost_per_1000"] is None
    assert compute_cost_per_1000(10.0, 0, 1.0) is None
    nothing = measured([table(batch(exchange(0, **REFUSED)))], cost_per_hour=1.0)
    assert nothing["total_p95_s"] is None and nothing["tokens_per_s"] is None


def test_one_reading_serves_the_verdict_and_the_figures():
    sums = ServiceSums()
    tables = [table(batch(exchange(0), exchange(1)))]
    assert list(tap_service_sums(tables, sums)) == tables
    assert sums.metrics(0.0)["requests"] == 2

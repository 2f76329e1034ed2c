"""Files of pairs and ratings as trl, OpenAI and LLaMA-Factory have them, against the rows that come out."""

import json
from pathlib import Path

import pytest

from stages.common.errors import InputError
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.rows import collect_file
from stages.common.sources.files.shapes import Columns, detect_shape

ASK = {"role": "user", "content": "where is it?"}
GOOD = {"role": "assistant", "content": "on its way"}
BAD = {"role": "assistant", "content": "no idea"}


def collect(folder, records, **columns):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = FormatOptions(None, None, None, None, ())
    return collect_file(path, "mit", "human", options, Columns(**columns), None, "reject")


PAIRS = {
    "explicit": {"prompt": "where is it?", "chosen": "on its way", "rejected": "no idea"},
    "explicit messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "implicit messages": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "implicit, with the prompt once more": {
        "prompt": "where is it?",
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "score_chosen": 8.0,
    },
    "OpenAI": {
        "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "where is it?"}],
        "chosen": {"from": "gpt", "value": "on its way"},
        "rejected": {"from": "gpt", "value": "no idea"},
    },
    "question": {"question": "where is it?", "chosen": "on its way", "rejected": "no idea"},
}


@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_is_a_row_with_the_worse_answer_beside_it(tmp_path, form):
    found = collect(tmp_path, [PAIRS[form]])
    (row,) = found.rows
    assert [(message.role, message.content) for message in row.messages] == [
        ("user", "where is it?"),
        ("assistant", "on its way"),
    ]
    assert (row.rejected.role, row.rejected.content) == ("assistant", "no idea")
    assert row.is_desirable is None
    assert found.metrics["columns"]["rejected"] in PAIRS[form]
    # The entry that `init` writes reads the same.
    entry = {part: name for part, name in found.metrics["columns"].items() if part != "history"}
    again = collect(tmp_path, [PAIRS[form]], shape=found.metrics["shape"], **entry)
    assert again.rows[0] == row


@pytest.mark.parametrize("is_good", [True, False])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "where is it?", "completion": "on its way"},
        {"prompt": [ASK], "completion": [GOOD]},
        {"messages": [ASK, GOOD]},
    ],
)
def test_a_rated_answer_is_a_row_with_its_rating(tmp_path, record, is_good):
    (row,) = collect(tmp_path, [record | {"label": is_good}]).rows
    assert (row.question, row.answer) == ("where is it?", "on its way")
    assert (row.is_desirable, row.rejected) == (is_good, None)


def test_ratings_in_a_csv_are_words(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nq one,a,true\nq two,b,False\nq three,c,\n")
    options = FormatOptions(None, None, None, None, ())
    rows = collect_file(path, "mit", "human", options, Columns(), None, "reject").rows
    assert [row.is_desirable for row in rows] == [True, False, None]


def test_a_label_that_is_a_class_is_no_rating(tmp_path):
    records = [{"text": f"text {n}", "label": n % 2 == 0} for n in range(6)]
    assert [row.is_desirable for row in collect(tmp_path, records).rows] == [None] * 6
    numbers = [{"prompt": f"text {n}", "completion": "a", "label": n % 2} for n in range(6)]
    assert [row.is_desirable for row in collect(tmp_path, numbers).rows] == [None] * 6
    named = collect(tmp_path, numbers, prompt="prompt", completion="completion", rating="label")
    assert [row.is_desirable for row in named.rows] == [False, True] * 3


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "what?"}, BAD]}, "wrong_rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": [ASK]}, "wrong_rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "b\0"}, "not_text"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "no_answer"),
        ({"prompt": "q", "completion": "a", "label": "maybe", "chosen": "a"}, "wrong_rating"),
    ],
)
def test_a_preference_that_cannot_be_read_is_rejected_with_its_reason(tmp_path, record, reason):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    columns = {}
    if "label" in record:
        good, columns = {"prompt": "q", "completion": "a", "label": "true"}, {"rating": "label"}
    elif "prompt" not in record:
        good = PAIRS["implicit messages"]
    found = collect(tmp_path, [good, good, record], **columns)
    assert [reject.reason for reject in found.rejected] == [reason]


def test_a_row_without_the_worse_answer_is_a_row_like_any_other(tmp_path):
    rows = collect(tmp_path, [PAIRS["explicit"], {"prompt": "q", "chosen": "a", "rejected": None}]).rows
    assert [row.rejected is None for row in rows] == [False, True]


def test_the_better_answers_alone_are_read_where_the_columns_are_named(tmp_path):
    (row,) = collect(tmp_path, [PAIRS["explicit"]], prompt="prompt", completion="chosen").rows
    assert (row.answer, row.rejected) == ("on its way", None)


def test_a_column_that_is_named_and_not_there_is_an_error():
    with pytest.raises(InputError, match="no column 'worse'"):
        detect_shape(Path("data/rows.jsonl"), [PAIRS["explicit"]], Columns(rejected="worse"))

import pytest

from stages.common.messages import Message
from stages.common.records import make_row
from stages.common.sources.detection import survey as module
from stages.common.sources.detection.survey import Spread, survey_rows
from stages.common.sources.detection.task_kind import TaskKind

LABEL = TaskKind("label", None, "")
TEXT = TaskKind("text", None, "")


def row(question, answer):
    return make_row([Message("user", question), Message("assistant", answer)], "s", "cc0-1.0")


def survey(*pairs, task=TEXT):
    return survey_rows([row(q, a) for q, a in pairs], task, lambda text: len(text.split()), max_row_tokens=6)


def oddities(*pairs, task=TEXT):
    return {oddity.what: oddity.rows for oddity in survey(*pairs, task=task).oddities}


def test_lengths_are_counted_in_characters_and_tokens():
    found = survey(("a b", "x"), ("a b c", "x y"), ("a b c d", "x y z"))
    assert found.question_chars == Spread(median=5, p95=7, largest=7, total=15)
    assert found.row_tokens == Spread(median=5, p95=7, largest=7, total=15)
    assert found.answer_tokens.total == 6
    assert found.long_rows == 1


def test_classes_are_counted_largest_first():
    assert list(survey(("a", "x"), ("b", "y"), ("c", "y"), task=LABEL).classes.items()) == [
        ("y", 2),
        ("x", 1),
    ]
    by_key = TaskKind("json", "intent", "")
    assert survey(("a", '{"intent":"on"}'), ("b", "broken"), task=by_key).classes == {"on": 1}
    assert survey(("a", "x")).classes == {}


def test_duplicates_and_conflicts_are_counted():
    found = survey(("a", "1"), ("a", "1"), ("b", "1"), ("b", "2"))
    assert (found.duplicates, found.conflicts) == (1, 2)


def test_personal_data_are_counted_by_row_and_kind():
    found = survey(("mail a@perennial-mail.net or b@perennial-mail.net", "ok"), ("c", "d"))
    assert found.personal_data == {"email": 1}


@pytest.mark.parametrize("most", ["MAX_SAMPLED_ROWS", "MAX_SAMPLED_CHARS"])
def test_of_many_rows_only_tokens_and_oddities_are_from_a_sample(monkeypatch, most):
    rows = [(f"question {n} " + "word " * (n % 7), f"class {n % 3}") for n in range(600)]
    rows += [("a " * 300, "the last class"), ("once", "more"), ("once", "less"), ("once", "less")]
    whole = survey(*rows, task=LABEL)
    monkeypatch.setattr(module, most, {"MAX_SAMPLED_ROWS": 200, "MAX_SAMPLED_CHARS": 6_600}[most])
    found = survey(*rows, task=LABEL)
    assert 100 < found.sampled <= 200 and whole.sampled == whole.rows == found.rows == 604
    for name in ("classes", "question_chars", "answer_chars", "duplicates", "conflicts", "own_system"):
        assert getattr(found, name) == getattr(whole, name)
    assert found.classes["the last class"] == 1 and found.question_chars.largest == 600
    assert found.total_tokens == pytest.approx(whole.total_tokens, rel=0.2)
    assert found.long_rows == pytest.approx(whole.long_rows, rel=0.2)
    assert found == survey(*rows, task=LABEL)


def test_rows_that_are_too_long_follow_the_limit():
    found = survey(*((f"{'a ' * n}", "x") for n in range(1, 10)))
    assert [found.with_limit(limit).long_rows for limit in (0, 1, 2, 6, 10, 11)] == [9, 9, 8, 4, 0, 0]


def test_odd_texts_are_named():
    assert oddities(("GrÃ¶ÃŸe?", "a"), ("itâ€™s", "b")) == {"text decoded with the wrong encoding": 2}
    assert oddities(("a<br>b", "x &amp; y"), ("c", "d")) == {"HTML": 1}
    assert oddities(
        ("<|im_start|>user", "a"),
    ) == {"control tokens of a chat template": 1}
    assert oddities(("Who are you?", "I am {{name}}"), ("c", "d")) == {"placeholders that were not filled": 1}
    assert oddities(("a", "N/A"), ("b", "b")) == {
        "answers without content": 1,
        "answers that repeat the question": 1,
    }
    assert oddities(("Größe – «naïve» café, 5 < 6 & 7", "é")) == {}


def test_odd_classes_are_named():
    many = [(f"q{n}", "refund") for n in range(5)]
    assert oddities(*many, ("a", "Refund"), ("b", "Refund"), ("c", "Refund"), task=LABEL) == {
        "classes that differ only in case or space": 8
    }
    assert oddities(*many, ("a", "card"), task=LABEL) == {"classes of fewer than 3 rows": 1}

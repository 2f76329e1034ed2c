from stages.common.records import Message, make_row
from stages.evaluate.error_analysis import Given, confusions, errors_md, mistakes

REFERENCE = '{"intent":"On","area":"attic"}'


def rows(n, answer=REFERENCE):
    return [
        make_row([Message("user", f"q{i}"), Message("assistant", answer)], "toy", "mit") for i in range(n)
    ]


def given(*texts, right=False, loss=1.0):
    return [Given(text, right, loss) for text in texts]


def test_mistakes_are_ranked_by_how_bad_they_are():
    texts = [
        '{"intent":"On","area":"attic","x":1}',
        "no idea",
        '{"intent":"Off","area":"attic"}',
        '{"intent":"On"}',
    ]
    found = mistakes(rows(4), given(*[""] * 4), given(*texts), "json", "intent")
    assert [m.kind for m in found] == ["invalid", "wrong label", "missing slot", "extra slot"]


def test_of_equal_mistakes_the_least_likely_right_answer_comes_first():
    sure, unsure = Given("?", False, 1.0), Given("?", False, 9.0)
    found = mistakes(rows(2), given("", ""), [sure, unsure], "json", "intent")
    assert [m.question for m in found] == ["q1", "q0"]


def test_right_answers_are_no_mistakes():
    assert mistakes(rows(1), given(""), given(REFERENCE, right=True), "json", "intent") == []


def test_an_answer_that_the_base_model_had_right_is_marked():
    found = mistakes(rows(1), given(REFERENCE, right=True), given("no"), "json", "intent")
    assert found[0].base_was_right


def test_texts_are_ranked_by_how_far_off_they_are():
    found = mistakes(
        rows(2, "the lamp is on"), given("", ""), given("the lamp is off", "a fish"), "text", None
    )
    assert [m.tuned for m in found] == ["a fish", "the lamp is off"]
    assert found[0].differs == "other words: ROUGE-L 0.00"


def test_confusions_count_wrong_labels_and_answers_without_one():
    answers = ['{"intent":"Off"}', '{"intent":"Off"}', "no", REFERENCE]
    assert confusions(rows(4), answers, "intent") == [("On", "Off", 2), ("On", "(invalid)", 1)]


def test_the_page_shows_no_more_than_asked_for():
    found = mistakes(rows(5), given(*[""] * 5), given(*["no"] * 5), "json", "intent")
    page = errors_md(found, 9, [], shown=2, task="json")
    assert "5 of 9" in page
    assert "The 2 worst answers" in page
    assert page.count("`no`") == 2

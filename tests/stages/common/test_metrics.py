import json
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from stages.common.metrics import json_faults, perplexity, read_json_answer, score_json, score_text


def read(*texts):
    return [read_json_answer(text) for text in texts]


def value(metric):
    return float(metric.figure(metric.columns.sum(axis=0)))


REFERENCE = '{"intent":"HassTurnOn","area":"kitchen","brightness":5}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (REFERENCE, True),
        ('{"area": "kitchen", "brightness": 5.0, "intent": "HassTurnOn"}\n', True),
        ('{"area":"kitchen","brightness":5e0,"intent":"HassTurnOn"}', True),
        ('{"intent":"HassTurnOn","area":"Kitchen","brightness":5}', False),
        ('{"intent":"HassTurnOn","area":"kitchen","brightness":"5"}', False),
        ('{"intent":"HassTurnOn","area":"kitchen"}', False),
        ('{"intent":"HassTurnOn","area":"kitchen","brightness":5,"name":null}', False),
    ],
)
def test_exact_match_overlooks_the_order_of_keys_and_the_spelling_of_numbers(answer, right):
    assert value(score_json(read(answer), read(REFERENCE), "intent")["exact_match"]) == float(right)


def test_true_is_not_one():
    assert value(score_json(read('{"a":true}'), read('{"a":1}'), None)["exact_match"]) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! " + REFERENCE,
        f"```json\n{REFERENCE}\n```",
        REFERENCE + REFERENCE,
        REFERENCE[:-1],
        '{"intent":"a","intent":"b"}',
        '{"intent":NaN}',
        '{"intent":1e999}',
        '{"intent":"\\ud800"}',
        "[" * 100_000,
        '{"n":' + "9" * 5000 + "}",
    ],
)
def test_what_is_not_one_json_value_is_no_answer(text):
    assert read_json_answer(text) is None


@pytest.mark.parametrize(
    ("answer", "valid"),
    [('{"intent":"x"}', True), ('{"intent":1}', False), ('{"area":"x"}', False), ('"HassTurnOn"', False)],
)
def test_a_valid_answer_has_a_string_under_the_label_key(answer, valid):
    assert value(score_json(read(answer), read(REFERENCE), "intent")["valid_output"]) == float(valid)


def test_without_a_label_key_an_answer_of_the_references_kind_is_valid():
    metrics = score_json(read("[1]", "{}", "3"), read("[2]", "[2]", "[2]"), None)
    assert value(metrics["valid_output"]) == pytest.approx(1 / 3)
    assert set(metrics) == {"exact_match", "valid_output"}


def test_label_accuracy_looks_at_the_label_alone():
    answers = read(
        '{"intent":"HassTurnOn"}', '{"intent":"HassTurnOff","area":"kitchen","brightness":5}', "no"
    )
    metrics = score_json(answers, read(*[REFERENCE] * 3), "intent")
    assert value(metrics["intent_accuracy"]) == pytest.approx(1 / 3)


def test_slot_f1_counts_pairs_over_all_rows():
    # Row 1: area right, brightness wrong, name too much. Row 2: invalid, so both pairs are missed.
    answers = read('{"intent":"X","area":"kitchen","brightness":6,"name":"lamp"}', "lamp on")
    metrics = score_json(answers, read(REFERENCE, REFERENCE), "intent")
    precision, recall = 1 / 3, 1 / 4
    assert value(metrics["slot_f1"]) == pytest.approx(2 * precision * recall / (precision + recall))


def test_without_a_label_key_every_pair_is_a_slot():
    metrics = score_json(read('{"intent":"HassTurnOn"}'), read(REFERENCE), None)
    assert value(metrics["slot_f1"]) == pytest.approx(2 * 1 / (1 + 3))


def test_no_slot_to_find_and_none_invented_is_right():
    assert value(score_json(read('{"intent":"a"}'), read('{"intent":"b"}'), "intent")["slot_f1"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (REFERENCE, []),
        ("lamp", ["invalid"]),
        ('{"area":"kitchen"}', ["invalid"]),
        ('{"intent":"HassTurnOff","area":"kitchen","brightness":5}', ["wrong label"]),
        (
            '{"intent":"HassTurnOn","area":"attic","name":"lamp"}',
            ["missing slot", "wrong value", "extra slot"],
        ),
    ],
)
def test_faults_are_named(answer, kinds):
    assert list(json_faults(read_json_answer(answer), read_json_answer(REFERENCE), "intent")) == kinds


def test_a_fault_says_what_was_given_and_what_was_wanted():
    faults = json_faults(
        read_json_answer('{"intent":"HassTurnOn","area":"attic","brightness":5}'),
        read_json_answer(REFERENCE),
        "intent",
    )
    assert faults == {"wrong value": 'area="attic", not "kitchen"'}


def sentences(rows, seed):
    rng = random.Random(seed)
    words = ["the", "lamp", "in", "kitchen", "is", "on", "and", "Käthe's", "fan,", "at", "21.5", "off."]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(0, 9))) for _ in range(rows)]


@pytest.mark.parametrize("seed", range(5))
def test_bleu_and_chrf_are_those_of_sacrebleu(seed):
    answers, references = sentences(20, seed), [s or "a b" for s in sentences(20, seed + 100)]
    metrics = score_text(answers, references)
    assert value(metrics["bleu"]) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert value(metrics["chrf"]) == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)


@pytest.mark.parametrize("answer", ["", "on", "the lamp is on", "nothing alike whatever here"])
def test_bleu_of_a_single_row_is_the_corpus_score_of_that_row(answer):
    metrics = score_text([answer], ["the lamp is on"])
    assert value(metrics["bleu"]) == pytest.approx(
        sacrebleu.corpus_bleu([answer], [["the lamp is on"]]).score
    )
    assert value(metrics["chrf"]) == pytest.approx(
        sacrebleu.corpus_chrf([answer], [["the lamp is on"]]).score
    )


def test_rouge_of_english_is_that_of_the_package():
    answers, references = ["the lamp is on", "a fan"], ["The lamp was on.", "nothing"]
    scorer = RougeScorer(["rougeL"])
    expected = np.mean(
        [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    )
    assert value(score_text(answers, references)["rouge_l"]) == pytest.approx(expected)


def test_rouge_knows_other_scripts():
    assert value(score_text(["Ночь, улица, фонарь"], ["ночь улица фонарь"])["rouge_l"]) == 1.0


def test_perplexity_weighs_every_token_alike():
    assert value(perplexity([10.0, 2.0], [9, 3])) == pytest.approx(np.exp(1.0))


def test_the_canonical_form_reads_back_as_the_same_value():
    answer = read_json_answer(REFERENCE)
    assert json.loads(answer.canonical) == answer.value

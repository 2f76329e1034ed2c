import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from stages.common.task.text_metrics import choose_bleu_tokenizer, score_text, split_words


def value(metric):
    return metric.value()


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("我爱北京", ["我", "爱", "北", "京"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("GPT是模型", ["gpt", "是", "模", "型"]),
        ("Don't stop_now, 21.5", ["don", "t", "stop", "now", "21", "5"]),
    ],
)
def test_words_are_what_the_script_makes_of_them(text, words):
    assert list(split_words(text)) == words


def test_other_words_of_hindi_are_not_the_same():
    assert value(score_text(["दिल"], ["दाल"])["rouge_l"]) == 0.0


def test_a_chinese_answer_with_one_character_less_is_nearly_right():
    reference = "请打开客厅的灯光"
    assert value(score_text([reference[:-1]], [reference])["rouge_l"]) == pytest.approx(14 / 15)


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [
        (["the lamp is on"], "13a"),
        (["दीपक जल रहा है"], "13a"),
        (["请打开灯", "关闭 TV"], "zh"),
        (["ライトをつけて"], "char"),
        (["เปิดไฟ"], "char"),
    ],
)
def test_bleu_of_every_script_is_that_of_sacrebleu(texts, tokenizer):
    answers = [text[:-1] for text in texts]
    assert choose_bleu_tokenizer(texts) == tokenizer
    expected = sacrebleu.corpus_bleu(answers, [texts], tokenize=tokenizer).score
    assert value(score_text(answers, texts)["bleu"]) == pytest.approx(expected)
    expected = sacrebleu.corpus_chrf(answers, [texts]).score
    assert value(score_text(answers, texts)["chrf"]) == pytest.approx(expected)


def test_the_length_ratio_counts_characters_of_all_answers():
    assert value(score_text(["ab", "c"], ["abcd", "ef"])["length_ratio"]) == 0.5

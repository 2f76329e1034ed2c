"""ROUGE-L, chrF and BLEU of texts in any script, each equal to its reference library.

Words are what the script makes of them: runs of letters, marks and digits where spaces separate words, and
single characters in scripts that write without spaces (as sacrebleu's tokenizer for Chinese and the
multilingual ROUGE of XL-Sum do, Hasan et al. 2021). chrF counts characters and needs no words at all
(Popović 2015), so it is the one that means the same in every script.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from stages.common.statistics.intervals import Floats
from stages.common.task.metrics import Metric, compute_mean, compute_ratio, compute_share

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2.0
# Unicode names of the letters of scripts that put no space between words.
UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")


def score_text(answers: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics of answers in plain words.

    - `chrf`: corpus chrF2 as sacrebleu computes it, 0 to 100.
    - `exact_match`: equal, but for space at the ends.
    - `rouge_l`: mean F1 of the longest common subsequence of words (rouge_score), 0 to 1.
    - `bleu`: corpus BLEU as sacrebleu computes it (exponential smoothing, the tokens of
      `choose_bleu_tokenizer`), 0 to 100.
    - `length_ratio`: characters of all answers over those of all references; 1 is as long.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    counter = BLEU(effective_order=True, tokenize=choose_bleu_tokenizer(references))
    pairs = list(zip(answers, references, strict=True))
    counted = [counter.sentence_score(a, [r]) for a, r in pairs]
    return {
        "chrf": score_chrf(answers, references),
        "exact_match": compute_share([a.strip() == r.strip() for a, r in pairs]),
        "rouge_l": compute_mean([rouge.score(r, a)["rougeL"].fmeasure for a, r in pairs], scale=1.0),
        "bleu": Metric(
            np.array([[*c.counts, *c.totals, c.sys_len, c.ref_len] for c in counted], dtype=float),
            compute_bleu,
            100.0,
        ),
        "length_ratio": Metric(
            np.array([[len(a), len(r)] for a, r in pairs], dtype=float), compute_ratio, None
        ),
    }


def score_chrf(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return corpus chrF2 as sacrebleu computes it, 0 to 100."""
    counts = [_chrf_counts(a, r) for a, r in zip(answers, references, strict=True)]
    return Metric(np.array(counts, dtype=float), compute_chrf, 100.0)


def choose_bleu_tokenizer(references: Sequence[str]) -> str:
    """Return sacrebleu's tokenizer for these texts: 13a, or one for scripts without spaces between words."""
    letters = [character for text in references for character in text if character.isalpha()]
    unspaced = [character for character in letters if is_unspaced(character)]
    if 2 * len(unspaced) <= len(letters):
        return "13a"
    chinese = sum(unicodedata.name(character, "").startswith("CJK") for character in unspaced)
    return "zh" if chinese == len(unspaced) else "char"


def split_words(text: str) -> Iterator[str]:
    """Yield the words of a text in small letters; in a script without spaces every character is one.

    In English the words are those of rouge_score. Marks belong to their letter: without them different
    words of Hindi would be the same.
    """
    word = ""
    for character in text.lower():
        kind = unicodedata.category(character)[0]
        if is_unspaced(character):
            yield from (word, character) if word else (character,)
            word = ""
        elif kind in "LN" or (kind == "M" and word):
            word += character
        elif word:
            yield word
            word = ""
    if word:
        yield word


def is_unspaced(character: str) -> bool:
    """Return whether a character is a letter of a script that puts no space between words."""
    return character > "\u0dff" and unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS)


def compute_chrf(sums: Floats) -> Floats:
    """Return chrF2 from hypothesis, reference and matching n-grams of each order (Popović 2015)."""
    hypothesis, reference, match = (sums[..., i::3] for i in range(3))
    counts = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counts.sum(axis=-1), 1)
    precision = np.divide(match, hypothesis, out=np.zeros_like(match), where=counts).sum(axis=-1) / orders
    recall = np.divide(match, reference, out=np.zeros_like(match), where=counts).sum(axis=-1) / orders
    weighted = CHRF_BETA**2 * precision + recall
    score: Floats = np.divide(
        100.0 * (1 + CHRF_BETA**2) * precision * recall,
        weighted,
        out=np.zeros_like(weighted),
        where=weighted > 0,
    )
    return score


def compute_bleu(sums: Floats) -> Floats:
    """Return BLEU from matching and total n-grams of each order and both lengths (Papineni et al. 2002).

    An order without a match counts as half a match, the next as a quarter (sacrebleu's "exp").
    """
    match, total = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    length, reference_length = sums[..., -2], sums[..., -1]
    empty_orders = np.cumsum((match == 0) & (total > 0), axis=-1)
    smoothed = np.where(match > 0, match, 0.5**empty_orders)
    logs = np.log(np.divide(smoothed, total, out=np.ones_like(match), where=total > 0))
    brevity = 1.0 - np.divide(reference_length, length, out=np.ones_like(length), where=length > 0)
    score = 100.0 * np.exp(np.minimum(brevity, 0.0) + logs.mean(axis=-1))
    # Without one match, or with answers too short for an order, sacrebleu's corpus score is 0.
    found: Floats = np.where((match.sum(axis=-1) > 0) & np.all(total > 0, axis=-1), score, 0.0)
    return found


def _chrf_counts(answer: str, reference: str) -> list[int]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    counts = []
    for given, wanted in zip(
        extract_all_char_ngrams(answer, CHRF_ORDER, include_whitespace=False),
        extract_all_char_ngrams(reference, CHRF_ORDER, include_whitespace=False),
        strict=True,
    ):
        # A reference too short for an order does not count for precision there (sacrebleu).
        counts += [given.total() if wanted else 0, wanted.total(), (given & wanted).total()]
    return counts


class _Words:
    """`split_words` as rouge_score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return list(split_words(text))

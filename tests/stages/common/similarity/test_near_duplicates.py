import random

import pytest

from stages.common import spool
from stages.common.similarity import near_duplicates
from stages.common.similarity.grams import compute_similarity, extract_grams
from stages.common.similarity.near_duplicates import SimilarTexts, find_closest, find_near_earlier


def find_pairs(texts, threshold):
    """Return every pair (i, j, similarity) with i < j whose similarity is `threshold` or more."""
    index = SimilarTexts(threshold, map(extract_grams, texts))
    pairs = []
    for number, text in enumerate(texts):
        grams = extract_grams(text)
        pairs += [(other, number, score) for other, score in index.find_near(grams)]
        index.add(grams)
    return sorted(pairs)


def every_pair(texts, threshold):
    """The pairs found the slow way: each text with each."""
    sets = [extract_grams(text) for text in texts]
    scored = [(i, j, compute_similarity(sets[i], sets[j])) for j in range(len(texts)) for i in range(j)]
    return sorted(pair for pair in scored if pair[2] >= threshold - 1e-9)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_the_search_finds_exactly_the_pairs_of_an_all_against_all_search(threshold):
    rng = random.Random(1)
    words = [
        "turn",
        "on",
        "off",
        "the",
        "kitchen",
        "light",
        "lights",
        "timer",
        "set",
        "five",
        "minutes",
        "now",
    ]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in range(250)]
    assert find_pairs(texts, threshold) == every_pair(texts, threshold)


def test_case_and_space_make_no_difference():
    assert find_pairs(["Turn ON  the light", "turn on the light"], 1.0) == [(0, 1, 1.0)]


def test_similarity_is_shared_grams_over_all_grams():
    assert compute_similarity(extract_grams("abcd"), extract_grams("bcde")) == pytest.approx(
        1 / 3
    )  # bcd of abc, bcd, cde


def test_texts_of_a_character_or_two_are_compared_whole():
    assert find_pairs(["ok", "OK", "no", "", ""], 0.9) == [(0, 1, 1.0), (3, 4, 1.0)]


def test_no_texts_have_no_pairs():
    assert find_pairs([], 0.9) == []
    assert find_closest([], ["a"]) is None
    assert find_closest(["a"], []) is None


def test_the_index_finds_texts_that_it_was_not_told_to_expect():
    index = SimilarTexts(0.6, [])
    index.add(extract_grams("turn on the kitchen light"))
    assert [n for n, _ in index.find_near(extract_grams("turn on the kitchen lights"))] == [0]


def plant(texts, letters, rng):
    """Texts with copies of earlier ones in which a few letters are others."""
    planted = []
    for text in texts:
        planted.append(text)
        for _ in range(rng.randrange(3)):
            copy = list(rng.choice(planted))
            for place in rng.sample(range(len(copy)), rng.randrange(3)):
                copy[place] = rng.choice(letters)
            planted.append("".join(copy))
    return planted


@pytest.mark.parametrize(
    "letters", ["abcde ", "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"]
)
@pytest.mark.parametrize("max_held", [None, 0])
def test_rows_are_kept_or_not_as_if_each_was_compared_with_all_that_are_kept(letters, max_held, monkeypatch):
    monkeypatch.setattr(spool, "MAX_HELD", 10**9 if max_held is None else max_held)
    rng = random.Random(4)
    drawn = ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(120)]
    texts = plant(drawn, letters, rng)
    kept, expected = [], []
    for text in texts:
        own = extract_grams(text)
        scores = [compute_similarity(own, other) for other in kept]
        near = next(((place, score) for place, score in enumerate(scores) if score >= 0.8 - 1e-9), None)
        expected.append(near)
        if near is None:
            kept.append(own)
    assert list(find_near_earlier(texts, 0.8)) == expected
    assert 20 < len(kept) < len(texts) - 20


def test_grams_that_share_a_bucket_lose_no_pair(monkeypatch):
    monkeypatch.setattr(near_duplicates, "BUCKET_BITS", 2)
    rng = random.Random(5)
    texts = plant(["".join(rng.choices("abcdefgh", k=30)) for _ in range(60)], "abcdefgh", rng)
    assert find_pairs(texts, 0.7) == every_pair(texts, 0.7)


def test_the_closest_pair_is_the_best_of_all():
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcde", k=12)) for _ in range(80)]
    left, right = texts[:30], texts[30:]
    best = max(compute_similarity(extract_grams(a), extract_grams(b)) for a in left for b in right)
    i, j, score = find_closest(left, right)
    assert score == pytest.approx(best)
    assert compute_similarity(extract_grams(left[i]), extract_grams(right[j])) == pytest.approx(best)


def test_texts_with_nothing_in_common_have_similarity_zero():
    assert find_closest(["abc"], ["xyz"]) == (0, 0, 0.0)


def draw_lines(letters, count, length, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randrange(length // 2, length))) for _ in range(count)]


FEW_GRAMS = {
    "DNA": ("acgt", 400),
    "short DNA": ("acgt", 160),
    "digits": ("0123456789", 2000),
    "numbers": ("0123456789 ", 1200),
    "syllables": (["ba", "ke", "li", "mo", "nu ", "ra", "si "], 600),
}


@pytest.mark.parametrize(("letters", "length"), FEW_GRAMS.values(), ids=FEW_GRAMS)
def test_texts_of_few_3_grams_are_near_their_copies_alone(letters, length, monkeypatch):
    texts = draw_lines(letters, 40, length, seed=6)
    index = SimilarTexts(0.9, map(extract_grams, texts))
    for text in texts:
        index.add(extract_grams(text))
    compared = []
    monkeypatch.setattr(
        near_duplicates, "compute_similarity", lambda *two: compared.append(two) or compute_similarity(*two)
    )
    for number, text in enumerate(texts):
        changed = text[:-1] + "x"
        assert [near for near, _ in index.find_near(extract_grams(changed))] == [number]
    for text in draw_lines(letters, 40, length, seed=7):
        assert not list(index.find_near(extract_grams(text)))
    assert len(compared) < 100  # of 3,200 pairs


@pytest.mark.parametrize("threshold", [0.4, 0.9, 1.0])
def test_the_search_is_exact_for_texts_with_and_without_repetitions(threshold):
    rng = random.Random(8)
    drawn = [text for letters, length in FEW_GRAMS.values() for text in draw_lines(letters, 5, length, 9)]
    words = draw_lines("abcdefghijklmnopqrstuvwxyz", 40, 9, seed=10)
    texts = [*drawn, *(" ".join(rng.choices(words, k=rng.randrange(2, 120))) for _ in range(20))]
    for text in [*texts, *texts[::3]]:  # copies, and copies of copies
        copy = list(text)
        for place in rng.sample(range(len(copy)), min(len(copy), rng.randrange(1, 2 + len(copy) // 40))):
            copy[place] = rng.choice("acgt0 ")
        texts.append("".join(copy))
    found = find_pairs(texts, threshold)
    assert found == every_pair(texts, threshold)
    assert threshold == 1.0 or len(found) > 10


@pytest.mark.parametrize("max_held", [10**9, 2000])
def test_the_closest_pair_is_the_best_of_all_for_texts_of_few_3_grams(max_held, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_CHUNK_GRAMS", max_held)
    texts = [text for letters, length in FEW_GRAMS.values() for text in draw_lines(letters, 12, length, 11)]
    random.Random(12).shuffle(texts)
    left, right = texts[:25], [*texts[25:], texts[20][: len(texts[20]) // 2] + texts[31]]
    scored = [
        (compute_similarity(*map(extract_grams, (a, b))), -i) for i, a in enumerate(left) for b in right
    ]
    i, j, score = find_closest(left, right)
    assert (score, -i) == max(scored)
    assert compute_similarity(extract_grams(left[i]), extract_grams(right[j])) == score < 0.9


@pytest.mark.parametrize(("changed", "is_near"), [(0.002, True), (0.008, True), (0.04, False), (1.0, False)])
def test_passages_are_near_as_long_as_few_of_their_letters_differ(changed, is_near):
    """At 0.9, one letter of 57 may differ: each changes three 3-grams."""
    rng = random.Random(13)
    for letters in ("acgt", "abcdefghijklmnopqrstuvwxyz    "):
        text = "".join(rng.choices(letters, k=8000))
        other = "".join(rng.choice(letters) if rng.random() < changed else letter for letter in text)
        assert (compute_similarity(extract_grams(text), extract_grams(other)) >= 0.9) == is_near

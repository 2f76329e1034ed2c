"""Rows planted on both sides in ten ways: the search finds what reading every pair finds."""

import random
from collections import Counter

import pytest

from stages.common.chat.conversations import find_shared_exchanges, join_conversations
from stages.common.messages import Message
from stages.common.records import make_row
from stages.common.similarity.compared_text import find_shared_parts
from stages.split.leaks import prove_split, remove_known_answers, remove_near_duplicates
from stages.split.sides import Sides

WORDS = [
    a + b
    for a in ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ra"]
    for b in ["bel", "dor", "fan", "gim", "kos", "lut"]
]
INSTRUCTION = "Name the one intent that fits the message of the customer, and write nothing else. Intents: "
EVERYWHERE = INSTRUCTION + ", ".join(WORDS) + "\n\nMessage: "


def texts(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, 9)) for _ in range(count)]


def row(*turns):
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    return make_row(messages, "toy", "mit")


def widen(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else "\u3000" for c in text)


CYRILLIC = str.maketrans("aeopcyxisjhdABEKMHOPCTX", "аеорсухіѕјһԁАВЕКМНОРСТХ")
GREEK = str.maketrans("aiopvuABEZHIKMNOPTYX", "αιορνυΑΒΕΖΗΙΚΜΝΟΡΤΥΧ")

SPELLINGS = {
    "same": lambda text: text,
    "case": str.title,
    "punctuation": lambda text: text.replace(" ", ", ", 2) + "?!",
    "space": lambda text: "  " + text.replace(" ", "\t \r\n", 3),
    "zero-width": lambda text: "\u200b".join(text) + "\ufeff",
    "annotations": lambda text: "\ufff9".join(text) + "\ufffc",
    "width": widen,
    "Cyrillic letters": lambda text: text.title().translate(CYRILLIC),
    "Greek letters": lambda text: text.title().translate(GREEK),
    "one letter": lambda text: text[:-1] + "z",
}
BEFORE = {"alone": "", "under an instruction": EVERYWHERE}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_planted_copies_of_held_out_prompts_are_removed_and_no_other_row(before, spell):
    asked = [row(before + text, f"answer {n}") for n, text in enumerate(texts(100, seed=1))]
    planted = [row(before + spell(text), f"other {n}") for n, text in enumerate(texts(100, seed=1))]
    clean = [row(before + text, f"answer {n}") for n, text in enumerate(texts(500, seed=2))]
    shared = find_shared_parts([*asked, *planted, *clean])
    sides, removed = remove_near_duplicates(Sides((*planted, *clean), (), tuple(asked)), 0.9, shared)
    assert sides.train == tuple(clean)
    assert removed == 100
    assert prove_split(sides, 0.9, shared, set())["highest_similarity"] < 0.9


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_the_proof_fails_on_one_planted_copy(spell):
    asked = [row(EVERYWHERE + text, "a") for text in texts(50, seed=1)]
    clean = [row(EVERYWHERE + text, "a") for text in texts(200, seed=2)]
    planted = row(EVERYWHERE + spell(texts(50, seed=1)[30]), "b")
    shared = find_shared_parts([*asked, *clean, planted])
    with pytest.raises(AssertionError, match="not clean"):
        prove_split(Sides((*clean, planted), (), tuple(asked)), 0.9, shared, set())


def unroll(name, turns=3):
    messages = [
        text
        for n in range(turns)
        for text in (f"{name} asks {texts(1, f'{name}{n}')[0]}", f"{name} gets {n}")
    ]
    return [row(*messages[: 2 * turn]) for turn in range(1, turns + 1)]


def test_turns_of_one_conversation_are_never_on_two_sides_and_the_proof_reads_them():
    rows = [r for n in range(60) for r in unroll(f"customer{n}")]
    groups = join_conversations(rows)
    assert set(Counter(groups).values()) == {3}
    links = find_shared_exchanges(rows)
    with pytest.raises(AssertionError, match="'conversations_on_two_sides': 1"):
        prove_split(Sides(tuple(rows[:7]), (), tuple(rows[8:])), 0.99, find_shared_parts(rows), links)
    assert prove_split(Sides(tuple(rows[:9]), (), tuple(rows[9:])), 0.99, find_shared_parts(rows), links)


def test_a_held_out_greeting_that_training_rows_answer_is_not_asked():
    hello = ("Hello there, are you open?", "Yes, around the clock.")
    train = [row(*hello, text, "fine") for text in texts(9, seed=3)]
    sides, feedback, removed = remove_known_answers(
        Sides(tuple(train), (row(*hello),), (row(*hello), row(*texts(2, seed=4)))),
        [row(*texts(2, seed=5))],
        set(),
    )
    assert (len(sides.validation), len(sides.test), len(feedback), removed) == (0, 1, 1, 2)


def test_feedback_that_continues_a_held_out_row_is_not_learned_and_the_row_stays():
    asked = row("a question", "its answer")
    told = [row("a question", "its answer", "and now?", "this"), row("another", "thing", "and?", "that")]
    sides, feedback, removed = remove_known_answers(Sides((), (), (asked,)), told, set())
    assert (sides.test, feedback, removed) == ((asked,), [told[1]], 1)


@pytest.mark.parametrize("letters", ["acgt", "0123456789"])
def test_sequences_are_held_out_though_all_have_the_same_3_grams(letters):
    rng = random.Random(6)
    drawn = ["".join(rng.choices(letters, k=2000)) for _ in range(120)]
    asked = [row(text, "a") for text in drawn[:30]]
    copies = [row(text[:900] + "g7" + text[902:], "b") for text in drawn[:30:3]]
    others = [row(text, "c") for text in drawn[30:]]
    shared = find_shared_parts([*asked, *copies, *others])
    sides, removed = remove_near_duplicates(Sides((*others, *copies), (), tuple(asked)), 0.9, shared)
    assert (sides.train, removed) == (tuple(others), len(copies))
    assert prove_split(sides, 0.9, shared, set())["highest_similarity"] < 0.5
    with pytest.raises(AssertionError, match="not clean"):
        prove_split(Sides((*others, copies[0]), (), tuple(asked)), 0.9, shared, set())

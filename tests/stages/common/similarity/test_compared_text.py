import random

import pytest

from stages.common.messages import Message
from stages.common.records import make_row
from stages.common.similarity.compared_text import SharedParts, find_shared_parts, fold_prompt, fold_text


def row(*turns, system=None):
    messages = [Message("system", system)] if system else []
    messages += [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)]
    return make_row([*messages, Message("assistant", "fine")], "toy", "mit")


QUESTION = "Why doesn't the light in café 12 turn on?"


@pytest.mark.parametrize(
    "text",
    [
        "why DOESN'T the light in Café 12 turn on",
        "  Why doesn't\tthe  light\r\nin café 12 turn on?!?",
        "Why does\u200bn't the li\u00adght in cafe\u0301 12 turn\u2060 on?\ufeff",
        "Why doesn’t the light in café 12, turn on…",
        "Ｗｈｙ　ｄｏｅｓｎ＇ｔ ｔｈｅ ｌｉｇｈｔ ｉｎ café １２ ｔｕｒｎ ｏｎ？",
        "«Why doesnt the light in café 12 turn on»",
        "\u202eWhy doesn't the\u00a0light in café 12 turn on?\u202c",
        "Why doesn't\ufffc the li\ufff9ght in\ue000 café 12 tu\u2800rn on?",
        "W\ufe0fhy doesn't the light in café 12 turn\U000e0041 on?\x00",
    ],
    ids=[
        "case",
        "space",
        "zero-width",
        "punctuation",
        "width",
        "quotes",
        "direction",
        "annotations",
        "variation and tags",
    ],
)
def test_what_a_reader_takes_for_one_text_is_one(text):
    assert fold_text(text) == fold_text(QUESTION) == "why doesnt the light in café 12 turn on"


@pytest.mark.parametrize(
    "text",
    [
        "Whу dоеsn't thе lіght іn сafé 12 turn оn?",  # Cyrillic small letters
        "Why dοesn't the lιght ιn cαfέ 12 turn οn?".replace("έ", "é"),  # Greek
        "Why doesn't the light in саfе\u0301 12 turn on?",  # Cyrillic under a combining accent
        "WНУ DОЕSN'Т ТНЕ LIGНТ IN САFÉ 12 ТURN ОN?",  # Cyrillic capitals
        "WΗΥ DΟΕSΝ'Τ ΤΗΕ LIGΗΤ IΝ CΑFÉ 12 ΤURΝ ΟΝ?",  # Greek capitals
    ],
)
def test_letters_of_other_alphabets_that_look_latin_are_latin(text):
    assert not text.isascii() and fold_text(text) == fold_text(QUESTION)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Включи свет в кухне", "Bключи cвeт в кyхнe".replace("B", "В")),  # Latin letters among Cyrillic
        ("ВКЛЮЧИ СВЕТ НА КУХНЕ", "включи свет на кухне"),
        ("ΆΝΟΙΞΕ ΤΟ ΦΩΣ", "άνοιξε το φωσ"),
        ("ёлка и її", "eлкa и її".replace("e", "ë")),
    ],
)
def test_cyrillic_and_greek_have_one_form_in_each_case(one, other):
    assert fold_text(one) == fold_text(other)


@pytest.mark.parametrize(
    "alphabet",
    ["абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя", "αβγδεζηθικλμνξοπρσςτυφχψω"],
)
def test_no_two_letters_of_an_alphabet_become_one(alphabet):
    assert len({fold_text(letter) for letter in alphabet.replace("ς", "")}) == len(alphabet.replace("ς", ""))


def test_a_unit_in_greek_is_another_unit():
    assert fold_text("5 µg of it") != fold_text("5 mg of it")


@pytest.mark.parametrize(
    ("one", "other"), [("كَتَبَ الدَّرْسَ", "كتب الدرس"), ("مـــرحبا", "مرحبا"), ("שָׁלוֹם", "שלום")]
)
def test_vowel_signs_that_may_be_left_out_make_no_other_text(one, other):
    assert fold_text(one) == fold_text(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2*3", "2/3"), ("2 + 3", "2 - 3"), ("1.5 litres", "15 litres"), ("at 12:30", "at 1230"), ("-5", "5"),
        (":-)", "?!"), ("क", "की"), ("开灯", "关灯"), ("a_b", "a b"), ("", "?"),
    ],
)  # fmt: skip
def test_what_a_reader_tells_apart_stays_apart(one, other):
    assert fold_text(one) != fold_text(other)


def test_the_system_message_and_the_answer_are_not_compared():
    assert fold_prompt(row("A.", "b", "C\n\nd", system="You are helpful.")) == "a\nb\nc\nd"


WORDS = [
    "red",
    "blue",
    "lamp",
    "door",
    "card",
    "bank",
    "river",
    "stone",
    "quiet",
    "loud",
    "fast",
    "slow",
    "old",
    "new",
    "warm",
    "cold",
]
LABELS = "Choose the intent that fits: " + ", ".join(f"{a}_{b}" for a in WORDS for b in WORDS)


def questions(count, seed=1):
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, 5)) for _ in range(count)]


@pytest.mark.parametrize(
    "template",
    [
        "{}",
        "Classify the message of a customer: {}",
        LABELS + "\n\nMessage: {}",
        "{}\n\n" + LABELS,
        LABELS + "\n{}\nThe answer is one label and nothing else:",
        "one more example of it " * 500 + "{}",
    ],
    ids=["nothing", "short", "labels before", "labels behind", "both", "longer than one reading"],
)
def test_what_all_prompts_share_is_excluded_and_their_own_text_stays(template):
    rows = [row(template.format(question)) for question in questions(200)]
    shared = find_shared_parts(rows)
    assert [shared.read(r).removeprefix("message ") for r in rows] == questions(200)


def test_each_of_several_instructions_is_excluded():
    verbs = ("summarise", "translate", "classify", "shorten")
    instructions = [f"{verb} the text that follows in as few words as you can, please" for verb in verbs]
    texts = questions(400)
    for between in ("\n\n", " "):
        rows = [row(instructions[n % 4] + between + text) for n, text in enumerate(texts)]
        assert list(map(find_shared_parts(rows).read, rows)) == texts


def test_how_questions_begin_and_what_few_share_stays():
    texts = questions(300)
    rows = [row(f"How can I {text}" if n % 3 else f"I want to {text}") for n, text in enumerate(texts)]
    assert find_shared_parts(rows) == SharedParts()
    passages = [f"passage {n} " + " ".join(questions(30, seed=n)) for n in range(30)]
    assert (
        find_shared_parts([row(f"{passages[n // 10]}\n\n{text}") for n, text in enumerate(texts)])
        == SharedParts()
    )


def test_a_prompt_that_is_nothing_but_what_others_share_is_kept_whole():
    rows = [row("Summarise the text.")] * 50 + [row("Translate it to French.")] * 50
    shared = find_shared_parts(rows)
    assert {shared.read(r) for r in rows} == {"summarise the text", "translate it to french"}

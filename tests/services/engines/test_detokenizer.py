import random

import pytest

from services.engines.detokenizer import IncrementalDetokenizer
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()  # a token a byte: every character outside ASCII comes in pieces


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def pieces(ids, stops=(), size=1):
    """Return what comes out at each step, and the object."""
    answer = IncrementalDetokenizer(TOKENIZER, stops)
    out = [answer.push(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [*out, answer.finish()], answer


def test_a_character_comes_when_its_last_byte_is_there():
    out, _ = pieces(ids_of("é🙂"))
    assert out == ["", "é", "", "", "", "🙂", ""]


def test_an_emoji_of_several_parts_is_never_a_replacement_character():
    text = "a 👩‍👩‍👧 b 漢字"
    for size in (1, 2, 3, 7, 100):
        out, _ = pieces(ids_of(text), size=size)
        assert "".join(out) == text
        assert not any("\ufffd" in piece for piece in out)


def test_whatever_comes_it_is_what_the_whole_decodes_to():
    draw = random.Random(1)
    for _ in range(500):
        ids = [draw.randrange(258) for _ in range(draw.randrange(30))]
        out, _ = pieces(ids, size=draw.randrange(1, 5))
        assert "".join(out) == TOKENIZER.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_special_tokens_are_no_text():
    out, _ = pieces([0, *ids_of("hi"), 0])
    assert "".join(out) == "hi"


def test_text_before_a_stop_string_comes_and_nothing_from_it_on():
    out, answer = pieces(ids_of("one STOP two"), ["STOP"])
    assert "".join(out) == "one "
    assert answer.stopped


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    out, answer = pieces(ids_of("a STOx"), ["STOP"])
    assert out == ["a", " ", "", "", "", "STOx", ""]
    assert not answer.stopped


def test_the_beginning_of_a_stop_string_at_the_end_is_text():
    out, answer = pieces(ids_of("a ST"), ["STOP"])
    assert "".join(out) == "a ST"
    assert out[-1] == "ST"
    assert not answer.stopped


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("a bb cc", ["cc", "bb"], "a "),
        ("abcd", ["abcd", "bc"], "a"),  # complete first
        ("xabc", ["bc", "abc"], "x"),  # complete together: the longer
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("abc", [""], "abc"),
        ("né🙂 end", ["🙂"], "né"),
    ],
)
def test_of_several_stop_strings_the_first_wins_however_the_steps_fall(text, stops, left):
    for size in range(1, 9):
        assert "".join(pieces(ids_of(text), stops, size)[0]) == left


def test_after_a_stop_string_nothing_comes():
    answer = IncrementalDetokenizer(TOKENIZER, ["."])
    assert answer.push(ids_of("a.b")) == "a"
    assert answer.push(ids_of("c")) == ""
    assert answer.finish() == ""


def released(ids, stops, size):
    """Return how many tokens were released after each step, with the length of the text by then."""
    answer = IncrementalDetokenizer(TOKENIZER, stops)
    out, length = [], 0
    for at in range(0, len(ids), size):
        length += len(answer.push(ids[at : at + size]))
        out.append((answer.count_released(), length))
        if answer.stopped:
            return out, True
    length += len(answer.finish())
    return [*out, (answer.count_released(), length)], answer.stopped


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_no_token_of_a_stop_string_or_behind_it_is_released(size):
    counts, stopped = released(ids_of("on STOP off"), ["STOP"], size)
    assert stopped and counts[-1] == (3, 3)
    assert [count for count, _ in counts] == sorted(count for count, _ in counts)


def test_a_token_that_begins_before_a_stop_string_is_released():
    counts, stopped = released(ids_of("é🙂x"), ["🙂"], 1)
    assert stopped and counts[-1] == (2, 1), "the two bytes of the letter"


def test_tokens_of_what_might_have_been_a_stop_string_are_released_with_their_text():
    counts, stopped = released(ids_of("on STO"), ["STOP"], 1)
    assert not stopped
    assert counts[-2:] == [(3, 3), (6, 6)]


def test_without_stop_strings_every_token_is_released_at_once():
    counts, _ = released(ids_of("🙂"), [], 1)
    assert [count for count, _ in counts] == [1, 2, 3, 4, 4]


def test_how_many_tokens_are_released_does_not_depend_on_the_steps():
    draw = random.Random(5)
    for _ in range(300):
        ids = [draw.randrange(258) for _ in range(draw.randrange(1, 30))]
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        at = draw.randrange(max(len(text), 1))
        stops = [text[at : at + 2] or "none"]
        ends = {
            (tuple(counts[-1]), stopped) for counts, stopped in (released(ids, stops, n) for n in (1, 3, 50))
        }
        assert len(ends) == 1

import gc
import tracemalloc

import pytest

from stages.common.spool import Spool, join, pick, spool, view


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fill(items, max_held):
    filled = Spool(len, max_held)
    for item in items:
        filled.append(item)
    return filled


TEXTS = ["a", "", "größer ☀", "half \ud800", *("x" * number for number in range(40))]


@pytest.mark.parametrize("max_held", [0, 20, 10**6])
def test_what_is_in_a_spool_is_what_was_put_in_wherever_it_is(max_held):
    filled = fill(TEXTS, max_held)
    assert filled.is_stored == (max_held < 10**6)
    assert list(filled) == TEXTS
    assert filled == TEXTS
    assert filled != TEXTS[:-1]
    assert [filled[number] for number in (3, -1, 0)] == ["half \ud800", "x" * 39, "a"]
    assert list(filled[2:9:3]) == TEXTS[2:9:3]
    filled.append("more")
    assert (filled[-1], len(filled)) == ("more", len(TEXTS) + 1)
    with pytest.raises(IndexError):
        filled[len(filled)]


def test_two_passes_at_once_do_not_disturb_each_other():
    filled = fill(TEXTS, 0)
    assert list(zip(filled, filled, strict=True)) == list(zip(TEXTS, TEXTS, strict=True))


def test_small_items_are_a_list_and_leave_no_file(tmp_path):
    assert spool(iter("abc"), len) == ["a", "b", "c"]
    filled = fill(TEXTS, 0)
    assert list(filled)
    del filled
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [list, tuple, lambda items: fill(items, 0)])
def test_a_view_has_something_of_each_item_and_reads_no_other(make):
    lengths = view(make(TEXTS), len)
    assert list(lengths) == list(map(len, TEXTS))
    assert (lengths[-1], list(lengths[1:3])) == (len(TEXTS[-1]), [0, len(TEXTS[2])])
    read = []
    seen = view(fill(TEXTS, 0), lambda text: read.append(text) or text)
    assert seen[2] == TEXTS[2] and read == [TEXTS[2]]


@pytest.mark.parametrize("make", [list, tuple, lambda items: fill(items, 0)])
def test_picked_items_come_in_the_order_that_was_asked(make):
    picked = pick(make(TEXTS), [4, 2, 0])
    assert list(picked) == [TEXTS[4], TEXTS[2], TEXTS[0]]
    assert list(pick(picked, [2, 0])) == [TEXTS[0], TEXTS[4]]
    assert list(picked[:1]) == [TEXTS[4]]


@pytest.mark.parametrize(
    "make", [list, lambda items: fill(items, 0), lambda items: pick(fill(items, 0), range(len(items)))]
)
def test_joined_items_are_found_from_both_ends(make):
    joined = join(make(TEXTS[:2]), make(TEXTS[2:]))
    assert [joined[place] for place in range(-len(TEXTS), len(TEXTS))] == [*TEXTS, *TEXTS]
    assert list(joined[1:3]) == list(TEXTS[1:3])
    for place in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            joined[place]


def test_memory_does_not_grow_with_the_texts_in_a_spool():
    def measure(items):
        gc.collect()
        tracemalloc.start()
        filled = fill(("x" * 20_000 for _ in range(items)), 100_000)
        assert sum(map(len, filled)) == items * 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # 2 MB and 40 MB of text; a pass reads up to 4 MiB at once.
    assert measure(2000) < measure(100) + 10_000_000

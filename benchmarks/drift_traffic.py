"""Simulated traffic with known shifts, to test the drift verdict.

Generates feature tables in the format of `monitoring.traffic.columns` without a model, so that thousands of
checks are possible. A user has a mixture of topics, a verbosity and a tone. Each session of a user
concentrates on some of the user's topics. Session lengths are geometric with mean 5, and sessions overlap
in time. Rows of one session are therefore much more alike than rows of two sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monitoring.traffic.columns import FEATURES, VECTOR_SIZE, Column, build_table_schema

Floats = NDArray[np.float64]

ANSWER_KEYS = ("intent", "device", "area")
COLUMNS: tuple[Column, ...] = (
    *FEATURES,
    *(
        Column(f"answer.{key}", "output", "category", None, "", f"`{key}` of the answer")
        for key in ANSWER_KEYS
    ),
)
TOPICS = 24
# Shares of the device classes; the last is the one that vanishes.
DEVICE_SHARES = np.array([0.30, 0.20, 0.15, 0.12, 0.09, 0.06, 0.08])
SESSION_ROWS = 5.0
PART_ROWS = 10_000  # drawn at once
USERS = 400


@dataclass(frozen=True, slots=True)
class Shift:
    """The changes in the traffic, as shares of sessions or rows; by default none."""

    new_topics: float = 0.0  # share of rows, clustered by session
    german: float = 0.0  # share of sessions
    longer: float = 1.0  # factor on the length of questions
    without_last_device: bool = False
    rhythm: float = 0.0  # how far the mix of topics swings over 24 h


NONE = Shift()
SHIFTS = {
    "20 % new intents": Shift(new_topics=0.2),
    "German in 10 %": Shift(german=0.1),
    "requests 30 % longer": Shift(longer=1.3),
    "a device class vanished (8 %)": Shift(without_last_device=True),
}


class World:
    """The users and topics of one simulated service, drawn at random."""

    def __init__(self, seed: int, vectors: bool = True, users_as_sessions: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        rng = self.rng
        self.vectors, self.users_as_sessions = vectors, users_as_sessions
        self.device_of = np.repeat(np.arange(len(DEVICE_SHARES)), [5, 5, 4, 3, 3, 2, 2])
        per_device = np.bincount(self.device_of)
        weights = DEVICE_SHARES[self.device_of] / per_device[self.device_of]
        self.mixtures = rng.dirichlet(weights * TOPICS * 1.5, size=USERS) + 1e-9
        # The classes must have their shares over all users, whatever the users like.
        self.mixtures *= weights / self.mixtures.mean(axis=0)
        self.mixtures /= self.mixtures.sum(axis=1, keepdims=True)
        self.verbosity = rng.normal(0.0, 0.3, USERS)
        self.activity = rng.pareto(2.0, USERS) + 0.5
        self.activity /= self.activity.sum()
        self.tone = rng.standard_normal((USERS, VECTOR_SIZE)) * 0.25
        self.centres = rng.standard_normal((TOPICS + 6, VECTOR_SIZE))
        self.german = rng.standard_normal(VECTOR_SIZE) * 1.2
        self.difficulty = rng.normal(0.0, 0.05, TOPICS + 6)
        self.mistaken = rng.integers(0, TOPICS, TOPICS + 6)
        self._clock, self._session = 0.0, 0

    def tables(self, rows: int, shift: Shift = NONE, page: int = 1000) -> Iterator[pa.Table]:
        """Yield that many rows of traffic in pages, in order of time; the next call continues in time.

        No session spans two parts of PART_ROWS.
        """
        while rows > 0:
            part = self._part(min(rows, PART_ROWS), shift)
            rows -= part.num_rows
            for first in range(0, part.num_rows, page):
                yield part.slice(first, page)

    def _part(self, rows: int, shift: Shift) -> pa.Table:
        rng = self.rng
        lengths = rng.geometric(1.0 / SESSION_ROWS, size=int(rows / SESSION_ROWS * 1.3) + 20)
        sessions = int(np.searchsorted(np.cumsum(lengths), rows)) + 1
        lengths = lengths[:sessions]
        users = rng.choice(USERS, size=sessions, p=self.activity)
        starts = self._clock + np.cumsum(rng.exponential(60.0, sessions))
        of = np.repeat(np.arange(sessions), lengths)
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        waited = np.cumsum(rng.exponential(30.0, len(of)))
        times = starts[of] + waited - waited[first][of]
        order = np.argsort(times, kind="stable")[:rows]
        self._clock = float(times[order[-1]])
        names = users if self.users_as_sessions else np.arange(sessions) + self._session
        self._session += sessions
        return self._table(
            times[order], names[of[order]], users[of[order]], of[order], sessions, users, shift
        )

    def _topics(self, times: Floats, of: NDArray[np.int64], users: NDArray[np.int64], shift: Shift) -> Floats:
        """Return the cumulative mixture of topics of each session, concentrated on some of the user's."""
        gammas = self.rng.standard_gamma(np.maximum(self.mixtures[users] * 6.0, 1e-6)) + 1e-12
        if shift.without_last_device:
            gammas[:, self.device_of == len(DEVICE_SHARES) - 1] = 0.0
            gammas += 1e-12 * (self.device_of != len(DEVICE_SHARES) - 1)
        if shift.rhythm:
            began = np.zeros(len(users))
            began[of[::-1]] = times[::-1]
            swing = np.sin(2 * np.pi * began[:, None] / 86_400 + np.arange(TOPICS)[None, :])
            gammas *= np.exp(shift.rhythm * swing)
        return np.cumsum(gammas / gammas.sum(axis=1, keepdims=True), axis=1)

    def _table(
        self,
        times: Floats,
        names: NDArray[np.int64],
        who: NDArray[np.int64],
        of: NDArray[np.int64],
        sessions: int,
        users: NDArray[np.int64],
        shift: Shift,
    ) -> pa.Table:
        rng, rows = self.rng, len(times)
        mixture = self._topics(times, of, users, shift)
        topic = np.minimum((rng.random(rows)[:, None] > mixture[of]).sum(axis=1), TOPICS - 1)
        if shift.new_topics:
            share = rng.beta(2 * shift.new_topics, 2 * (1 - shift.new_topics), sessions)
            new = rng.random(rows) < share[of]
            topic = np.where(new, TOPICS + rng.integers(0, 6, sessions)[of], topic)
        german = (rng.random(sessions) < shift.german)[of]
        words = np.maximum(
            1.0, np.round(np.exp(1.9 + self.verbosity[who] + rng.normal(0, 0.35, rows)) * shift.longer)
        )
        chars = np.round(words * rng.normal(5.2, 0.4, rows)) + german * words
        short = rng.random(rows) < np.where(words < 3, 0.8, 0.02)
        language = np.where(
            short, "short", np.where(german, "de", np.where(rng.random(rows) < 0.01, "nl", "en"))
        )
        # The model knows the topics it knows: a new one becomes one of those, less surely.
        strange = topic >= TOPICS
        change = np.where(strange, self.mistaken[topic], topic)
        right = rng.random(rows) < np.where(strange, 0.1, np.where(german, 0.3, 0.93))
        valid = rng.random(rows) < np.where(strange | german, 0.93, 0.985)
        rated = rng.random(rows) < 0.08
        numbers: dict[str, NDArray[Any]] = {
            "prompt_chars": chars,
            "prompt_words": words,
            "turns": 1.0 + 2 * rng.geometric(0.7, rows) - 2,
            "non_letter_share": rng.beta(2, 40, rows),
            "digit_share": np.where(rng.random(rows) < 0.7, 0.0, rng.beta(2, 30, rows)),
            "capital_share": rng.beta(1.5, 50, rows) + german * 0.05,
            "guard_prompt_injection": (rng.random(rows) < 0.004).astype(float),
            "guard_toxicity": (rng.random(rows) < 0.002).astype(float),
            "answer_chars": np.round(38 + change * 1.3 + rng.normal(0, 5, rows)),
            "mean_logprob": -np.exp(
                rng.normal(-3.2 + self.difficulty[topic] + 0.6 * (strange | german), 0.6, rows)
            ),
            "guard_secrets": np.zeros(rows),
            "guard_personal_data": (rng.random(rows) < 0.003).astype(float),
            "valid_output": valid.astype(float),
            "thumb": np.where(rated, right.astype(float), np.nan),
            "corrected": np.where(rated, (~right & (rng.random(rows) < 0.6)).astype(float), np.nan),
            "label_match": np.where(rated & ~right, right.astype(float), np.nan),
            "failed": (rng.random(rows) < 0.002).astype(float),
            "queue_s": rng.exponential(0.01, rows),
            "first_token_s": rng.gamma(4, 0.02, rows),
            "total_s": rng.gamma(4, 0.1, rows),
            "tokens": np.round(chars / 3 + 40),
            "refused": (rng.random(rows) < 0.004).astype(float),
        }
        classes = {
            "language": language,
            "finish_reason": np.where(rng.random(rows) < 0.99, "stop", "length"),
            "answer_form": np.where(valid, "area device intent", "text"),
            "answer.intent": np.char.add("Intent", change.astype(str)),
            "answer.device": np.char.add("device", self.device_of[change].astype(str)),
            "answer.area": np.char.add("area", ((change * 7 + who) % 12).astype(str)),
        }
        schema = build_table_schema([each for each in COLUMNS if self.vectors or each.kind != "vector"])
        arrays = []
        for entry in schema:
            if entry.name == "request_id":
                arrays.append(pa.array([""] * rows))
            elif entry.name == "received_at":
                arrays.append(pa.array(times))
            elif entry.name == "session":
                arrays.append(pa.array(names.astype(str)))
            elif entry.name == "version":
                arrays.append(pa.array(["v"] * rows))
            elif entry.name in numbers:
                arrays.append(pa.array(numbers[entry.name], from_pandas=True))
            elif entry.name in classes:
                arrays.append(pa.array(classes[entry.name]))
            elif entry.name not in ("prompt_vector", "answer_vector"):
                arrays.append(pa.nulls(rows, entry.type))  # nothing to draw it from
            else:
                of_what = topic if entry.name == "prompt_vector" else change
                vectors = self.centres[of_what] + self.tone[who] + rng.standard_normal((rows, VECTOR_SIZE))
                if entry.name == "prompt_vector":
                    vectors += german[:, None] * self.german
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                flat = pa.array(vectors.astype(np.float32).ravel())
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, VECTOR_SIZE))
        return pa.Table.from_arrays(arrays, schema=schema)


def columns(vectors: bool) -> tuple[Column, ...]:
    """Return the columns of the tables."""
    return tuple(column for column in COLUMNS if vectors or column.kind != "vector")


def with_rhythm(shift: Shift, rhythm: float) -> Shift:
    """Return the same shift in traffic whose topics vary over the day."""
    return replace(shift, rhythm=rhythm)

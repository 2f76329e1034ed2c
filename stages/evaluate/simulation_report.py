"""The results of conversations that were run in a simulator."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.common.model.results import Metrics, Sampling, with_intervals
from stages.common.records import Row
from stages.common.task.metrics import Metric, compute_ratio, compute_share
from stages.evaluate.simulation import FINISHED, SimulatedConversation, list_conversations

MEANINGS = {
    "end_state_match": "conversations after which the world is as after the reference's calls",
    "results_found": "conversations in which the model saw every result that the reference saw",
    "calls_ran": "calls that name a tool and fit its schema, of all that the model made",
    FINISHED: "conversations in which every question got an answer",
}


def choose_conversations(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Return at most `count` conversations of the test rows, at random."""
    found = list_conversations(rows)
    return found if len(found) <= count else random.Random(seed).sample(found, count)


def summarise_simulation(
    name: str, outcomes: Sequence[SimulatedConversation], chosen: int, sampling: Sampling
) -> dict[str, Any]:
    """Return what is reported of a simulation.

    Args:
        outcomes: of the conversations that ended in time, of the `chosen` ones.
    """
    judged = [one for one in outcomes if one.error is None]
    return {
        "simulator": name,
        "conversations": chosen,
        "judged": len(judged),
        "out_of_time": chosen - len(outcomes),
        "simulator_errors": dict(sorted(Counter(one.error for one in outcomes if one.error).items())),
        "ends": dict(sorted(Counter(one.end for one in judged if one.end).items())),
        "metrics": MEANINGS,
        "tuned": _measure(judged, sampling),
        "by_turns": {
            str(turns): _measure([one for one in judged if one.turns == turns], sampling)
            for turns in sorted({one.turns for one in judged})
        },
    }


def _measure(outcomes: Sequence[SimulatedConversation], sampling: Sampling) -> dict[str, dict[str, float]]:
    if not outcomes:
        return {}
    metrics: Metrics = {
        "end_state_match": compute_share([one.state_matches for one in outcomes]),
        "results_found": compute_share([one.has_results for one in outcomes]),
        "calls_ran": Metric(
            np.array([[one.ran, one.calls] for one in outcomes], dtype=float), compute_ratio, 1.0
        ),
        FINISHED: compute_share([one.end == FINISHED for one in outcomes]),
    }
    return with_intervals(metrics, [one.row.group for one in outcomes], sampling)

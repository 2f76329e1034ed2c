"""Judge a candidate: evaluate it against the champion, apply every criterion, write the verdict.

The verdict passes if every criterion does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.gate import criteria
from flows.gate.evaluation import Evidence, evaluate_candidate
from flows.gate.verdict import GateVerdict, write_verdict
from stages.common.params.loading import Params
from stages.common.params.loop import GateSettings
from stages.common.params.stages import GroupLimits

logger = logging.getLogger("flows.gate")


def judge(
    evidence: Evidence,
    settings: GateSettings,
    bias_tags: Sequence[str],
    max_parity_loss: float,
    made_at: float | None = None,
) -> GateVerdict:
    """Return the verdict on a candidate.

    Args:
        bias_tags: the slices whose gap between groups may not grow.
        max_parity_loss: exact match that the server may lose against the trainer.
    """
    if evidence.champion is None or evidence.new is None or evidence.old is None:
        found = [criteria.check_better_than_base(evidence.evaluation)]
    else:
        found = [
            criteria.check_new_window(evidence.new, settings, evidence.task),
            criteria.check_old_test(evidence.old, evidence.excluded, settings, evidence.task),
            *criteria.check_bias(evidence.old, bias_tags, settings, evidence.task),
            criteria.check_safety((evidence.new, evidence.old), settings, evidence.task),
        ]
    if settings.min_preference_gain is not None:
        found.append(criteria.check_preference(evidence.evaluation, settings.min_preference_gain))
    found += [criteria.check_parity(evidence.parity, max_parity_loss), criteria.check_card(evidence.card)]
    return GateVerdict(
        tag=evidence.tag,
        champion=evidence.champion,
        made_at=time.time() if made_at is None else made_at,
        passed=all(criterion.passed for criterion in found),
        mode="first" if evidence.champion is None else "champion",
        criteria=tuple(found),
        files=dict(evidence.files),
        excluded=dict(evidence.excluded),
    )


def run_gate(root: Path, params: Params, tag: str, production: Path | None = None) -> GateVerdict:
    """Evaluate and judge a candidate; write the verdict and return it.

    Args:
        root: the checkout whose pipeline made the candidate.
        params: also those of the private server, which gets all of them.
        production: the checkout with the champion, where the verdict is written; by default `root`.

    Raises:
        InputError: as `flows.gate.evaluation.evaluate_candidate`.
    """
    evidence = evaluate_candidate(root, params, tag, production)
    verdict = judge(
        evidence,
        params.flows.retrain.gate,
        select_bias_tags(params.check_bias.groups, params.task.slices),
        params.services.parity.max_exact_match_loss,
    )
    write_verdict(production or root, verdict)
    for criterion in verdict.criteria:
        level = logging.INFO if criterion.passed else logging.WARNING
        logger.log(level, "%s: %s", criterion.name, criterion.summary)
    return verdict


def select_bias_tags(groups: Mapping[str, GroupLimits], slices: Sequence[str]) -> list[str]:
    """Return the slices of the evaluation that have a threshold in check_bias.groups."""
    return [
        tag
        for tag in slices
        if tag in groups and any(value is not None for value in groups[tag].model_dump().values())
    ]

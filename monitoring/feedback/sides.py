"""Which labels are kept apart to judge a challenger by, and which are learned.

A question is on the side that its hash gives, in every retraining. The turns of one session are on one side
together, that of the session's hash: a later turn repeats the earlier ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from monitoring.feedback.labels import Label


def name_groups(labels: Iterable[Label]) -> dict[str, str]:
    """Return the group of each label by its request: the hash of its session, or of its question.

    A session counts where one of its requests has earlier turns. Where every request has only a question of
    its own, no turn repeats another, and a question that many sessions have stays on one side.
    """
    labels = list(labels)
    conversations = {label.session_hash for label in labels if _has_history(label)} - {None}
    return {
        label.request_id: label.session_hash
        if label.session_hash is not None and label.session_hash in conversations
        else label.prompt_hash
        for label in labels
    }


def find_apart(
    labels: Iterable[Label],
    groups: Mapping[str, str],
    share: float,
    seed: int,
    held_out: frozenset[str],
) -> set[str]:
    """Return the groups to hold out: by their hash, or because one of their questions was held out before."""
    return {
        group
        for label in labels
        if (group := groups[label.request_id]) in held_out
        or label.prompt_hash in held_out
        or is_held_out(group, share, seed)
    }


def is_held_out(group: str, share: float, seed: int) -> bool:
    """Return whether a group is held out: decided by its hash, so that it never changes sides."""
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _has_history(label: Label) -> bool:
    return any(message.role == "assistant" for message in label.prompt)

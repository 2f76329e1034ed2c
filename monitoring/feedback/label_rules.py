"""Rules that exclude labels: from flooding users and keys, from disagreement, from repetition.

Each takes labels and returns the kept ones, with the number of excluded ones by reason and API key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from monitoring.feedback.labels import Excluded, Label, name_key


def _in_time(label: Label) -> tuple[float, str, str]:
    return label.at, label.request_id, label.key or ""


def keep_newest(labels: Sequence[Label], limit: int, reason: str) -> tuple[list[Label], Excluded]:
    """Keep the newest labels, at most `limit`."""
    ordered = sorted(labels, key=_in_time)
    first = max(0, len(labels) - limit)
    return ordered[first:], _exclude(reason, ordered[:first])


def keep_newest_per_person(labels: list[Label]) -> tuple[list[Label], Excluded]:
    """Keep the newest label per person and prompt; an unknown person is a new one each time."""
    kept: dict[tuple[str, str], Label] = {}
    excluded: Excluded = Counter()
    for label in sorted(labels, key=_in_time):
        giver = (label.user or f"request {label.request_id}", label.prompt_hash)
        if (older := kept.get(giver)) is not None:
            excluded["duplicate" if older.same == label.same else "superseded", name_key(older.key)] += 1
        kept[giver] = label
    return list(kept.values()), excluded


def limit_users(labels: list[Label], max_rows: int) -> tuple[list[Label], Excluded]:
    """Keep the newest labels of each person; unknown people have no limit here."""
    of: defaultdict[str | None, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.user].append(label)
    kept = of.pop(None, [])
    excluded: Excluded = Counter()
    for own in of.values():
        some, gone = keep_newest(own, max_rows, "user_limit")
        kept += some
        excluded += gone
    return kept, excluded


def limit_keys(
    labels: list[Label], share: float, at_least: int, keys: int, exchanges: int
) -> tuple[list[Label], Excluded]:
    """Keep the newest labels of each API key, up to its share (never below `at_least`).

    The share is of the labels, and the keys that count are those that give any. Where fewer give than
    1 / `share`, they cannot all stay below it: none gives more than an even part. Labels without a key count
    together as one giver there.
    One key that gives alone, though others ask too, may give up to `share` of all exchanges: an honest
    source is heard, a flood stays capped. One key alone, in the whole of the traffic, has no limit: there is
    no one to protect from it.

    Args:
        at_least: rows that a key may give whatever its share: what one user may. Else a second key that
            gives a single label would leave the first a single one.
        keys: that sent a request or feedback in this time.
        exchanges: in this time, of all keys.
    """
    of: defaultdict[str | None, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.key].append(label)
    kept = of.pop(None, [])
    if keys < 2 and not kept:
        return labels, Counter()
    sizes = [len(own) for own in of.values()]
    if len(of) == 1 and not kept:
        limit = int(share * exchanges)
    else:
        even = 1 / max(1, len(of) + bool(kept))
        limit = find_highest_limit(sizes, len(kept), share) or find_highest_limit(sizes, len(kept), even)
    excluded: Excluded = Counter()
    for own in of.values():
        some, gone = keep_newest(own, max(limit, at_least), "key_share")
        kept += some
        excluded += gone
    return kept, excluded


def find_highest_limit(sizes: Sequence[int], others: int, share: float) -> int:
    """Return the largest number of rows per key at which no key has more than `share` of the rest.

    With the limit c, all are `others` + sum(min(size, c)); the sum grows ever slower in c, so the limits that
    do (c <= share * all) are those up to one, found by halving.
    """

    def holds(limit: int) -> bool:
        left = [min(size, limit) for size in sizes]
        return max(left, default=0) <= share * (others + sum(left)) + 1e-9

    low, high = 0, max(sizes, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def keep_agreed(labels: list[Label], min_agreement: float) -> tuple[list[Label], Excluded]:
    """Keep the label that enough people agree on, per prompt; without agreement all are excluded.

    A person has one vote. Where several keys label a question, each key has one: names of users are what a
    key's holder chooses them.
    """
    of: defaultdict[str, list[Label]] = defaultdict(list)
    for label in labels:
        of[label.prompt_hash].append(label)
    kept: list[Label] = []
    excluded: Excluded = Counter()
    for own in of.values():
        votes = _votes(own)
        same, most = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
        if len(votes) > 1 and most < min_agreement * sum(votes.values()) - 1e-9:
            excluded += _exclude("contradiction", own)
            continue
        kept += [label for label in own if label.same == same]
        excluded += _exclude("outvoted", [label for label in own if label.same != same])
    return kept, excluded


def _votes(labels: Sequence[Label]) -> dict[str, float]:
    """Return the votes for each label; a key that gives several labels divides its one vote."""
    keys = {label.key for label in labels}
    if len(keys) == 1:
        return dict(Counter(label.same for label in labels))
    given = Counter(label.key for label in labels)
    votes: defaultdict[str, float] = defaultdict(float)
    for label in labels:
        votes[label.same] += 1 / given[label.key]
    return dict(votes)


def keep_one_per_prompt(labels: list[Label]) -> tuple[list[Label], Excluded]:
    """Keep the newest label per prompt; all labels of a prompt are equal at this point."""
    of: dict[str, Label] = {}
    excluded: Excluded = Counter()
    for label in sorted(labels, key=_in_time):
        if (older := of.get(label.prompt_hash)) is not None:
            excluded["duplicate", name_key(older.key)] += 1
        of[label.prompt_hash] = label
    return list(of.values()), excluded


def keep_unconfirmed(refusals: list[Label], labels: Sequence[Label]) -> tuple[list[Label], Excluded]:
    """Keep the refused answers that no label has as the right one of their prompt."""
    right = {(label.prompt_hash, label.same) for label in labels}
    kept = [label for label in refusals if (label.prompt_hash, label.same) not in right]
    return kept, _exclude("confirmed", [one for one in refusals if (one.prompt_hash, one.same) in right])


def _exclude(reason: str, labels: Sequence[Label]) -> Excluded:
    return Counter((reason, name_key(label.key)) for label in labels)

"""Which rows are parts of one conversation: a row a turn, a window of turns, or two continuations.

Such rows share an exchange, a user's turn with its answer. Between the two there may be calls of tools and
their results; each turn of the assistant after one of these ends an exchange, too. An exchange between many
different turns, as a greeting is, is common talk and makes no two rows one conversation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from stages.common.records import Row, exclude_feedback, sort_feedback_last
from stages.common.similarity.compared_text import fold_text

MAX_NEIGHBOURS = (
    3  # turns before, or after, one exchange; unrolled turns have one, a question asked again a few
)

Exchange = tuple[int, int]  # the hashes of both texts: texts may be long


def list_prompts(row: Row) -> list[str]:
    """Return what was asked before each answer: the user's turns up to there."""
    asked: list[str] = []
    prompts = []
    for message in row.messages:
        if message.role == "user":
            asked.append(message.content)
        elif message.role == "assistant" and asked:
            prompts.append("\n".join(asked))
    return prompts


def list_exchanges(row: Row) -> list[Exchange]:
    """Return each user's turn with the answer to it, as they are compared."""
    return [exchange for exchange, _, _ in _follow_exchanges(row)]


def find_shared_exchanges(rows: Sequence[Row]) -> set[Exchange]:
    """Return the exchanges that make rows parts of one conversation; without conversations there are none."""
    before: dict[Exchange, set[int]] = defaultdict(set)
    after: dict[Exchange, set[int]] = defaultdict(set)
    for row in rows:
        if _is_conversation(row):
            for exchange, earlier, later in _follow_exchanges(row):
                before[exchange] |= earlier
                after[exchange] |= later
    return {
        exchange
        for exchange, earlier in before.items()
        if max(len(earlier), len(after[exchange])) <= MAX_NEIGHBOURS
    }


def find_known_answers(asked: Sequence[Row], learned: Sequence[Row]) -> set[int]:
    """Return the numbers of the asked rows whose question and answer are earlier turns of a learned row."""
    earlier = {exchange for row in learned if _is_conversation(row) for exchange in list_exchanges(row)[:-1]}
    if not earlier:
        return set()
    return {number for number, row in enumerate(asked) if set(list_exchanges(row)[-1:]) & earlier}


def find_rows_that_answer(learned: Sequence[Row], asked: Sequence[Row]) -> set[int]:
    """Return the numbers of the learned rows with question and answer of an asked row in earlier turns."""
    talks = {number: row for number, row in enumerate(learned) if _is_conversation(row)}
    if not talks:
        return set()
    answered = {exchange for row in asked for exchange in list_exchanges(row)[-1:]}
    return {number for number, row in talks.items() if answered & set(list_exchanges(row)[:-1])}


def join_conversations(rows: Sequence[Row]) -> list[str]:
    """Return the group of each row: rows of one conversation have one, that of the first row.

    Feedback from production takes the group of the rows that it continues and joins no two of their groups:
    the split of the other rows does not depend on it.
    """
    roots = {row.group: row.group for row in rows}
    own = exclude_feedback(rows)
    _join(roots, own, frozenset())
    if len(own) < len(rows):
        _join(roots, rows, {row.group for row in own})
    return [_find_root(roots, row.group) for row in rows]


def _join(roots: dict[str, str], rows: Sequence[Row], fixed: set[str] | frozenset[str]) -> None:
    """Join the groups of rows that share an exchange; those in `fixed` are joined to no other one."""
    shared = find_shared_exchanges(rows)
    first: dict[Exchange, str] = {}
    if not shared:
        return
    for row in sort_feedback_last(rows):
        for exchange in list_exchanges(row):
            if exchange in shared:
                root = _find_root(roots, row.group)
                known = _find_root(roots, first.setdefault(exchange, row.group))
                if root not in fixed:
                    roots[root] = known


def _find_root(roots: dict[str, str], group: str) -> str:
    while roots[group] != group:
        roots[group] = group = roots[roots[group]]
    return group


def _is_conversation(row: Row) -> bool:
    return sum(message.role == "assistant" for message in row.messages) > 1


def _follow_exchanges(row: Row) -> Iterator[tuple[Exchange, set[int], set[int]]]:
    """Yield each exchange with the turn before and the turn after it, where there is one.

    After the result of a tool, the question is all turns since the user's: many results are just "done".
    Before and after are other turns than calls and results, which are part of an exchange.
    """
    turns = [(m.role, hash(fold_text(m.answer))) for m in row.messages if m.role != "system"]
    texts = [text for _, text in turns]
    asked = 0  # the place of the user's turn
    for place, ((role, question), (next_role, answer)) in enumerate(pairwise(turns)):
        if role == "user":
            asked = place
        if next_role != "assistant" or role not in ("user", "tool"):
            continue
        if role == "tool":
            question = hash(tuple(texts[asked : place + 1]))
        following = _skip_results(turns, place + 2)
        earlier, later = texts[max(0, asked - 1) : asked], texts[following : following + 1]
        yield (question, answer), set(earlier), set(later)


def _skip_results(turns: Sequence[tuple[str, int]], place: int) -> int:
    """Return the place of the first turn from `place` on that is neither a result nor the answer to one."""
    while place < len(turns):
        role, before = turns[place][0], turns[place - 1][0]
        if role != "tool" and (role, before) != ("assistant", "tool"):
            break
        place += 1
    return place

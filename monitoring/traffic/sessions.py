"""Sessions of a client: their names and hashes, and how many turns each one has."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from monitoring.traffic.answer_json import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

RECENT_TURNS = 64  # of a session, among which a request may be part of one: agents ask side by side


def name_session(row: Mapping[str, Any]) -> str:
    """Return the session of an exchange, else its user, else the request itself."""
    return str(row["session"] or row["user"] or row["request_id"])


def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text, such as the name of a session."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclass(slots=True)
class _Session:
    """A session so far: its turns, the newest of them, and its last request."""

    turns: int = 0
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_TURNS))
    last_request: str = ""

    def add(self, request_id: str, turn: int, questions: int) -> None:
        """Count a request, which is a new turn or a part of one of the newest."""
        self.last_request = request_id
        if turn not in self.recent:
            self.recent.append(turn)
            self.turns = max(self.turns + 1, questions)


def count_session_turns(batches: Iterable[pa.RecordBatch], most: int) -> dict[str, int]:
    """Return the turns of each session, by the id of its last request; in one pass over exchanges in order.

    A turn is a message of the user with all calls, results and texts up to the next. A request is a new turn
    if no other had its messages up to the user's last one: neither the requests with the results of that
    turn's calls nor one that is sent again counts twice. Turns before the first request count as well, if
    its history has them. Exchanges that name no session have none.

    Args:
        most: sessions that are kept in memory. Beyond it, those of the smallest hashes are: a uniform sample,
            of at least a quarter of `most`, as that of `monitoring.drift.session_sums`.
    """
    sessions: dict[int, _Session] = {}
    limit = 2**64
    for batch in batches:
        for row in batch.select(["request_id", "session", "messages"]).to_pylist():
            if not row["session"] or (key := hash_text(row["session"])) >= limit:
                continue
            try:
                turn, questions = _read_turn(parse_json(row["messages"]))
            except Exception:  # of any kind: the table of features quarantines such an exchange
                continue
            sessions.setdefault(key, _Session()).add(row["request_id"], turn, questions)
            if len(sessions) > most:
                limit //= 2
                sessions = {key: session for key, session in sessions.items() if key < limit}
    return {session.last_request: session.turns for session in sessions.values()}


def _read_turn(messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return a hash of the messages up to the user's last one, and how many are the user's."""
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return hash_text(json.dumps(messages[: asked[-1] + 1])), len(asked)

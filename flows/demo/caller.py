"""Send the requests and the feedback of simulated users to a service; count what fails by its cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Habits:
    """How users behave.

    Attributes:
        corrected: share of the wrong answers that get a thumbs down and the right answer.
        thumbs_up: share of the right answers that get a thumbs up.
        users: number of users.
    """

    corrected: float = 0.7
    thumbs_up: float = 0.3
    users: int = 60


USUAL_HABITS = Habits()


@dataclass(slots=True)
class Caller:
    """Sends requests and counts them; nothing is sent twice.

    Attributes:
        max_tokens: of an answer.
        on_asked: called with the number of requests so far, after each answer.
        failures: calls without status 200, by cause.
    """

    client: httpx.AsyncClient
    max_tokens: int
    on_asked: Callable[[int], None]
    asked: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    async def ask(
        self, messages: Sequence[Mapping[str, Any]], user: str, session: str, **more: Any
    ) -> dict[str, Any] | None:
        """Return the answer to a conversation; None if the request failed."""
        body = {
            "messages": list(messages),
            "user": user,
            "session": session,
            "max_tokens": self.max_tokens,
            **more,
        }
        answer = await self._post("/v1/chat/completions", body)
        self.asked += 1
        self.on_asked(self.asked)
        return answer

    async def confirm(self, request_id: str) -> bool:
        """Give an answer a thumb up; return whether the service took it."""
        return await self._post("/v1/feedback", {"request_id": request_id, "thumb": "up"}) is not None

    async def correct(self, request_id: str, correction: str) -> bool:
        """Give an answer a thumb down and the right answer; return whether the service took it."""
        feedback = {"request_id": request_id, "thumb": "down", "correction": correction}
        return await self._post("/v1/feedback", feedback) is not None

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the response of a call; count the failure if there is none."""
        import httpx

        try:
            answer = await self.client.post(path, json=dict(body))
            value: dict[str, Any] = answer.json()
        except httpx.HTTPError as error:
            self.failures[f"{path} {type(error).__name__}"] += 1
            return None
        except ValueError:
            value = {}
        if answer.status_code != 200 or not value:
            self.failures[f"{path} {answer.status_code}"] += 1
            return None
        return value

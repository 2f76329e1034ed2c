"""The rounds of a federated training on the disk: each a folder with its adapter and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.examples.federated.adapters import Adapter, read_adapter, write_adapter
from stages.common.artifacts import atomic_dir, read_json, write_json

START = "start"  # the folder of the adapter from which the first round starts, where there is one


@dataclass(frozen=True, slots=True)
class Round:
    """A round that is complete.

    Attributes:
        number: from 1 on.
        validation_loss: of the averaged adapter, over all clients; None without validation rows.
        clients: what each client reported of its training, in their order.
        settings: method, dtype and device of their trainings.
    """

    number: int
    validation_loss: float | None
    clients: list[dict[str, Any]]
    settings: dict[str, str]

    @property
    def train_loss(self) -> float:
        """The mean loss of the clients' trainings by the tokens that they learned."""
        tokens = sum(client["answer_tokens"] for client in self.clients)
        return float(sum(client["train_loss"] * client["answer_tokens"] for client in self.clients) / tokens)

    @property
    def updates(self) -> int:
        """The most updates of a client."""
        return max(int(client["steps"]) for client in self.clients)


def read_rounds(folder: Path) -> list[Round]:
    """Return the complete rounds, the first one first."""
    files = sorted(folder.glob("round-*/round.json"))
    return [Round(**read_json(path)) for path in files]


def read_newest(folder: Path) -> Adapter | None:
    """Return the adapter from which the next round starts; None where all clients start from the seed."""
    found = [path.parent for path in sorted(folder.glob("round-*/round.json"))] or [folder / START]
    return read_adapter(found[-1]) if found[-1].is_dir() else None


def write_round(folder: Path, done: Round, adapter: Adapter) -> None:
    """Write a round, all or nothing."""
    with atomic_dir(folder / f"round-{done.number:04}") as place:
        write_adapter(adapter, place)
        write_json(
            place / "round.json",
            {
                "number": done.number,
                "validation_loss": done.validation_loss,
                "clients": done.clients,
                "settings": done.settings,
            },
        )

"""Flower's side of the server: FedAvg of adapters, weighted by learned tokens; each round is kept.

A server that was killed goes on after its last complete round.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from docs.examples.federated.adapters import Adapter
from docs.examples.federated.rounds import Round, read_newest, read_rounds, write_round
from stages.common.errors import InputError
from stages.common.logs import get_logger

logger = get_logger("federated")

WEIGHT = "answer_tokens"
PATIENCE_S = 7 * 24 * 3600.0  # for the slowest client of a round

app = ServerApp()


class AdapterAverage(FedAvg):
    """FedAvg, which averages the tensors of the clients' adapters; this keeps the rounds and their settings.

    Args:
        folder: of the rounds.
        done: rounds that are complete already; rounds: how many there will be.
        newest: the adapter of the last of them.
    """

    def __init__(
        self, folder: Path, done: int, rounds: int, clients: int, newest: Adapter | None, measures: bool
    ) -> None:
        super().__init__(
            fraction_evaluate=1.0 if measures else 0.0,
            min_train_nodes=clients,
            min_evaluate_nodes=clients,
            min_available_nodes=clients,
            weighted_by_key=WEIGHT,
        )
        self.folder, self.done, self.rounds = folder, done, rounds
        self.settings = newest.settings if newest else ""
        self.trained: tuple[ArrayRecord, list[Message]] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client the adapter and the number of the round."""
        self._describe(config, server_round)
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client the averaged adapter."""
        self._describe(config, server_round + 1)
        messages: Iterable[Message] = super().configure_evaluate(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the adapters of the clients.

        Raises:
            InputError: a client failed, or trained an adapter of other settings.
        """
        received = sorted(replies, key=lambda reply: int(reply.metadata.src_node_id))
        check_replies(received, self.min_train_nodes)
        settings = {str(reply.content["settings"]["adapter"]) for reply in received}
        if len(settings) > 1:
            raise InputError(
                f"{len(settings)} kinds of adapters came back from {len(received)} clients",
                "train with the same section finetune of params.yaml on all of them",
            )
        arrays, metrics = super().aggregate_train(server_round, received)
        assert arrays is not None
        self.settings = settings.pop()
        self.trained = arrays, received
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the losses, and keep the round, which is then complete.

        Raises:
            InputError: a client failed.
        """
        received = sorted(replies, key=lambda reply: int(reply.metadata.src_node_id))
        if received:
            check_replies(received, self.min_evaluate_nodes)
        found: MetricRecord | None = super().aggregate_evaluate(server_round, received)
        assert self.trained is not None
        arrays, trained = self.trained
        settings = dict(trained[0].content["settings"])
        del settings["adapter"]
        ended = Round(
            self.done + server_round,
            float(found["validation_loss"]) if found else None,
            [dict(reply.content["metrics"]) for reply in trained],
            settings,
        )
        write_round(self.folder, ended, to_adapter(self.settings, arrays))
        logger.info("%s", describe_round(ended, self.rounds))
        return found

    def _describe(self, config: ConfigRecord, server_round: int) -> None:
        config["round"] = self.done + server_round
        config["settings"] = self.settings


def check_replies(replies: list[Message], clients: int) -> None:
    """Refuse a round in which a client failed: without its rows the average would be of others.

    Raises:
        InputError: with the reasons of those that failed.
    """
    failed = [f"client {one.metadata.src_node_id}: {one.error.reason}" for one in replies if one.has_error()]
    if failed or len(replies) < clients:
        raise InputError(
            f"{clients - len(replies) + len(failed)} of {clients} clients failed\n" + "\n".join(failed),
            "correct what they report and start again: complete rounds are kept",
        )


def to_adapter(settings: str, arrays: ArrayRecord) -> Adapter:
    """Return the adapter of Flower's arrays."""
    return Adapter(settings, {name: one.numpy() for name, one in arrays.items()})


def describe_round(ended: Round, rounds: int) -> str:
    """Return a round in words."""
    tokens = " + ".join(f"{client[WEIGHT]:,}" for client in ended.clients)
    loss = "-" if ended.validation_loss is None else f"{ended.validation_loss:.4f}"
    return (
        f"round {ended.number} of {rounds}: training loss {ended.train_loss:.4f}, validation loss {loss}, "
        f"{tokens} tokens learned"
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the rounds that are left."""
    settings = context.run_config
    folder, rounds = Path(str(settings["folder"])), int(settings["rounds"])
    done, newest = len(read_rounds(folder)), read_newest(folder)
    if done >= rounds:
        return
    if done:
        logger.info("going on after round %d of %d", done, rounds)
    strategy = AdapterAverage(
        folder, done, rounds, int(settings["clients"]), newest, bool(settings["measures"])
    )
    shared = {"base_sha256": str(settings["base_sha256"]), "updates": int(settings["updates"])}
    weights = newest.weights if newest else {}
    strategy.start(
        grid,
        ArrayRecord({name: Array(one) for name, one in weights.items()}),
        rounds - done,
        PATIENCE_S,
        ConfigRecord(dict(shared)),
        ConfigRecord(dict(shared)),
    )

"""Flower's side of a client: what comes from the server is trained or measured in the client's folder.

Back go tensors, settings and numbers. No row, no text and no id of a row is in a reply.
"""

from __future__ import annotations

from contextlib import chdir

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from docs.examples.federated.adapters import Adapter
from docs.examples.federated.training import measure_loss, receive, train_round

SENT = ("steps", "train_tokens", "answer_tokens", "train_loss", "trained_parameters")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter of a message; reply with what it became, and the tokens that were learned."""
    config = message.content["config"]
    with chdir(str(context.node_config["folder"])):
        _receive(message)
        trained = train_round(int(config["round"]), int(config["updates"]))
    metrics = {name: trained.metrics[name] for name in SENT} | {
        "rows": trained.rows,
        "seconds": trained.metrics["throughput"]["seconds"],
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(one) for name, one in trained.adapter.weights.items()}),
            "metrics": MetricRecord(metrics),
            "settings": ConfigRecord(
                {
                    "adapter": trained.adapter.settings,
                    **{name: str(trained.metrics[name]) for name in ("method", "dtype", "device")},
                }
            ),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the adapter of a message; reply with its loss, and the tokens over which it is the mean."""
    with chdir(str(context.node_config["folder"])):
        _receive(message)
        loss, tokens = measure_loss()
    metrics = MetricRecord({"validation_loss": loss, "answer_tokens": tokens})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _receive(message: Message) -> None:
    config, arrays = message.content["config"], message.content["arrays"]
    weights = {name: one.numpy() for name, one in arrays.items()}
    adapter = Adapter(str(config["settings"]), weights) if weights else None
    receive(adapter, str(config["base_sha256"]), int(config["round"]))

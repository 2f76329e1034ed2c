"""Flower's grid without a network: the app of each client runs in this process, one client after the other.

Flower's own simulation does this with Ray. For a handful of clients on one machine that is a cluster for
nothing: clients that train at the same time would only share the same cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER = 0  # the number of the server among the clients


class LocalGrid(Grid):
    """Gives each message to the app of its client, and keeps the reply until it is asked for.

    An exception of a client's app is raised here: in a simulation nothing goes on without it.

    Args:
        folders: of the clients, which are numbered from 1 on.
    """

    def __init__(self, app: ClientApp, folders: Sequence[Path]) -> None:
        self._app = app
        self._contexts = {
            number: Context(0, number, {"folder": str(folder)}, RecordDict(), {})
            for number, folder in enumerate(folders, 1)
        }
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None
        # Who sends the messages that are made in this process.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, SERVER

    def set_run(self, run: Run) -> None:
        """Set the run, of which nothing is needed here."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            raise RuntimeError("no run was set")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of the clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients in the order of their numbers; return ids by which their replies are pulled."""
        ids = []
        for message in sorted(messages, key=lambda one: int(one.metadata.dst_node_id)):
            ids.append(f"{len(self._replies)}-{message.metadata.dst_node_id}")
            self._replies[ids[-1]] = self._app(message, self._contexts[message.metadata.dst_node_id])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages, each once."""
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients and return their replies."""
        return self.pull_messages(self.push_messages(messages))

"""Notifications about drift, releases and failures, through the Prefect blocks named in `flows.notify`.

Off by default. Create a block once on Prefect's page (Blocks), and name it in params.yaml as TYPE/NAME, for
example `custom-webhook/ops`, `slack-webhook/ops`, `sendgrid-email/ops` or `smtp-mail/ops`
(flows.common.smtp_block). A notification that cannot be sent is logged and stops nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from stages.common.escaping import escape_message

if TYPE_CHECKING:
    from stages.common.params.loop import Notify

Occasion = Literal["drift", "rejected", "promoted", "rolled_back", "failed"]

logger = logging.getLogger("flows.common.notifications")


def notify(settings: Notify, occasion: Occasion, subject: str, body: str) -> int:
    """Send a notification to every configured block if `occasion` is enabled; return how many accepted it."""
    if occasion not in settings.events:
        return 0
    sent = 0
    for slug in filter(None, (settings.webhook, settings.email)):
        try:
            # A mail's subject is one line, whatever an error's message is.
            line = escape_message(" ".join(subject.split()))
            _load_block(slug).notify(body=escape_message(body), subject=f"Perennial: {line}")
            sent += 1
        except Exception as error:  # of any kind: a mail server must not decide whether a model is replaced
            logger.warning("no notification through %s (%s): %s", slug, subject, error)
    return sent


def _load_block(slug: str) -> Any:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    import flows.common.smtp_block  # noqa: F401  (registers its type)

    block = Block.load(slug)
    if not isinstance(block, NotificationBlock):
        raise TypeError(f"{slug} is not a notification block")
    return block

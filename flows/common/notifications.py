"""Who is told when something happened: Prefect's notification blocks, named in `flows.notify`.

Off by default. A block is made once on Prefect's page (Blocks), and params.yaml names it as TYPE/NAME, for
example `custom-webhook/ops`, `slack-webhook/ops`, `sendgrid-email/ops` or `smtp-mail/ops`
(flows.common.smtp_block).
A notice that cannot be sent is logged and stops nothing: the loop does not depend on anybody being told.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from stages.common.params.loop import Notify

Occasion = Literal["drift", "refused", "promoted", "rolled_back", "failed"]

logger = logging.getLogger("flows.common.notifications")


def tell(settings: Notify, occasion: Occasion, subject: str, body: str) -> int:
    """Send a notice to every block that is named, if this occasion is to be told; return how many took it."""
    if occasion not in settings.events:
        return 0
    sent = 0
    for slug in filter(None, (settings.webhook, settings.email)):
        try:
            block = _load(slug)
            # A mail's subject is one line, whatever an error's message is.
            block.notify(body=body, subject=f"Perennial: {' '.join(subject.split())}")
            sent += 1
        except Exception as error:  # whatever it is: nobody's mail server decides whether a model is replaced
            logger.warning("%s could not be told that %s: %s", slug, subject, error)
    return sent


def _load(slug: str) -> Any:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    import flows.common.smtp_block  # noqa: F401  (makes its type known)

    block = Block.load(slug)
    if not isinstance(block, NotificationBlock):
        raise TypeError(f"{slug} is no notification block")
    return block

"""A Prefect block that sends mail by SMTP; Prefect's own e-mail block supports a single provider.

Register its type on a server with `prefect block register --file flows/common/smtp_block.py`. Then create a
block of it on Prefect's page, with an Apprise URL: mailtos://user:password@smtp.example.org?to=ops@example.org
"""

from __future__ import annotations

from prefect.blocks.notifications import AppriseNotificationBlock


class SmtpMail(AppriseNotificationBlock):
    """Sends notifications by mail."""

    _block_type_name = "SMTP Mail"
    _block_type_slug = "smtp-mail"

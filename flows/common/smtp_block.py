"""A Prefect block that sends mail by SMTP; Prefect's own e-mail block knows one provider only.

`prefect block register --file flows/common/smtp_block.py` makes its type known to a server; then make a block
of it on Prefect's page, with a URL as Apprise writes it: mailtos://user:password@smtp.example.org?to=ops@example.org
"""

from __future__ import annotations

from prefect.blocks.notifications import AppriseNotificationBlock


class SmtpMail(AppriseNotificationBlock):
    """Sends notices by mail."""

    _block_type_name = "SMTP Mail"
    _block_type_slug = "smtp-mail"

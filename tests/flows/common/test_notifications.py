"""Notifications: off by default, sent by a real block to a real address, never stopping the loop."""

import json
import socketserver
import threading

import pytest

from flows.common.notifications import notify
from stages.common.params.loop import Notify

ALL = ("drift", "rejected", "promoted", "rolled_back", "failed")


@pytest.fixture
def prefect_here(api, clean_environment, monkeypatch):
    """Blocks are kept by the Prefect server of the tests."""
    pytest.importorskip("prefect")
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api.url, PREFECT_API_AUTH_STRING: api.auth_string}):
        yield


@pytest.fixture
def post_office():
    """A mail server that takes every mail and keeps its text."""
    got = []

    class Take(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"220 here\r\n")
            text = None
            for raw in self.rfile:
                line = raw.decode().rstrip("\r\n")
                if text is not None:
                    if line == ".":
                        got.append("\n".join(text))
                        text = None
                        self.wfile.write(b"250 kept\r\n")
                    else:
                        text.append(line)
                elif line.upper() == "DATA":
                    text = []
                    self.wfile.write(b"354 go on\r\n")
                elif line.upper() == "QUIT":
                    self.wfile.write(b"221 bye\r\n")
                    return
                else:
                    self.wfile.write(b"250 ok\r\n")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Take)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1], got
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_sent_unless_a_block_is_named():
    assert notify(Notify(webhook=None, email=None, events=ALL), "drift", "it drifts", "much") == 0


def test_an_event_that_is_not_enabled_is_not_sent():
    assert notify(Notify(webhook="custom-webhook/x", email=None, events=("failed",)), "drift", "a", "b") == 0


@pytest.mark.slow
def test_a_webhook_and_a_mail_carry_the_notification(prefect_here, web, post_office):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    from flows.common.smtp_block import SmtpMail

    (url, posted), (port, mails) = web, post_office
    hook = CustomWebhookNotificationBlock(
        name="ops", url=url, method="POST", json_data={"text": "{{subject}}: {{body}}"}
    )
    hook.save("ops", overwrite=True)
    SmtpMail(url=f"mailto://127.0.0.1:{port}?from=a@example.org&to=b@example.org&mode=insecure").save(
        "ops", overwrite=True
    )
    settings = Notify(webhook="custom-webhook/ops", email="smtp-mail/ops", events=ALL)
    assert notify(settings, "promoted", "m:2 was promoted", "better by 0.1") == 2
    assert [json.loads(one) for one in posted] == [{"text": "Perennial: m:2 was promoted: better by 0.1"}]
    (mail,) = mails
    assert "Subject: Perennial: m:2 was promoted" in mail
    assert "better by 0.1" in mail


@pytest.mark.slow
def test_a_notification_that_cannot_be_sent_stops_nothing(prefect_here, caplog):
    settings = Notify(webhook="custom-webhook/nobody", email=None, events=ALL)
    assert notify(settings, "failed", "it failed", "why") == 0
    assert "no notification through custom-webhook/nobody (it failed)" in caplog.text

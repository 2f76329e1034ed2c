import http.server
import threading
from contextlib import contextmanager

import pytest

from stages.common import network


@contextmanager
def serving(status, body=b"true"):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer((network.LOOPBACK, 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://{network.LOOPBACK}:{server.server_port}/healthz?x=1"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "up"), [(200, True), (401, True), (404, True), (500, False), (503, False)]
)
def test_a_server_is_up_if_it_answers_without_an_error_of_its_own(status, up):
    with serving(status) as url:
        assert network.is_up(url) is up
        assert network.get(url) == (status, b"true")


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://127.0.0.1:99999/", "nowhere"])
def test_an_address_without_a_server_is_not_up(url):
    url = url.format(port=network.free_port())
    assert not network.is_up(url)


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{network.free_port()}")
    with serving(200) as url:
        assert network.is_up(url)

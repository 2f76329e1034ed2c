"""Whose connection it is: asked of the kernel for real sockets, of this user and of another."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from services.peers import owner
from services.peers.owner import OwnerUnknown, ask_kernel, read_tables, search_processes
from tests.services.users import OTHER_USER, needs_root

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own tables of Linux")
WAYS = [ask_kernel, read_tables, search_processes]
FAST = [ask_kernel, read_tables]
CONNECT = """
import encodings.idna, os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket({family}) as one:
    one.connect(({host!r}, int(sys.argv[1])))
    sys.stdin.read()
"""
PAIRS = [
    ("127.0.0.1", "AF_INET", "127.0.0.1"),
    ("::1", "AF_INET6", "::1"),
    ("::", "AF_INET", "127.0.0.1"),  # the server sees ::ffff:127.0.0.1
    ("127.0.0.1", "AF_INET6", "::ffff:127.0.0.1"),  # the client does
]


@contextmanager
def connected(listen, family, host, user=0):
    """Yield both ends of a connection of a child process, as the server sees them."""
    kind = socket.AF_INET6 if ":" in listen else socket.AF_INET
    dual = {"dualstack_ipv6": True} if listen == "::" else {}
    with socket.create_server((listen, 0), family=kind, **dual) as server:
        code = CONNECT.format(family=f"socket.{family}", host=host)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", code, str(server.getsockname()[1]), str(user)],
            stdin=subprocess.PIPE,
        )
        try:
            server.settimeout(120)
            accepted, _ = server.accept()
            with accepted:
                yield accepted.getpeername()[:2], accepted.getsockname()[:2]
        finally:
            with suppress(OSError):
                child.communicate()


@needs_root
@pytest.mark.parametrize("find", FAST)
@pytest.mark.parametrize(("listen", "family", "host"), PAIRS)
def test_the_user_of_a_connection_is_the_one_whose_process_made_it(find, listen, family, host):
    with connected(listen, family, host, OTHER_USER) as ends:
        assert find(*ends) == OTHER_USER
    with connected(listen, family, host) as ends:
        assert find(*ends) == 0


@pytest.mark.parametrize("find", WAYS)
def test_this_process_is_the_owner_of_its_own_connection(find):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert find(client.getsockname(), server.getsockname()) == os.geteuid()


@pytest.mark.parametrize("find", WAYS)
def test_a_client_that_closes_at_once_is_nobody_and_not_root(find):
    """The kernel tells user 0 for a socket that no process holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        client.sendall(b"POST")
        accepted, peer = server.accept()
        own = accepted.getsockname()
        client.close()
        with accepted, pytest.raises(OwnerUnknown):
            find(peer, own)
    with pytest.raises(OwnerUnknown):  # in TIME_WAIT, or gone
        find(peer, own)


@pytest.mark.parametrize("find", WAYS)
def test_a_connection_that_is_not_there_is_not_the_listening_sockets(find):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OwnerUnknown):
        find(server.getsockname(), ("127.0.0.1", 9))


def test_a_table_without_end_is_read_to_a_bound(monkeypatch):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        monkeypatch.setattr(owner, "MAX_TABLE_BYTES", 10)
        with pytest.raises(OwnerUnknown):
            read_tables(client.getsockname(), server.getsockname())

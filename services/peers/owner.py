"""The user that the other end of a connection on this machine belongs to.

Linux tells it by sock_diag (one message for one connection, some 20 µs), or in /proc/net/tcp where a sandbox
or a kernel without that module has none. Elsewhere it is looked for among the sockets of this user's
processes.

A socket that no process holds any more counts as unknown: the kernel tells user 0 for it, and so anyone who
sends a request and closes at once would be root.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

Address = tuple[str, int]

_NETLINK_SOCK_DIAG = 4  # protocol of AF_NETLINK
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_LISTEN = 10  # TCP states of the kernel
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2: family, protocol, extensions, padding, states
_ENDS = struct.Struct("!HH16s16s")  # struct inet_diag_sockid: ports and addresses, then interface and cookie
_SOCKET = struct.Struct("=BBBB48xIIIII")  # struct inet_diag_msg: …, expires, both queues, user, inode
_WAIT_S = 0.05  # the kernel has answered before sendto returns; this is a bound only
MAX_TABLE_BYTES = 16 * 2**20  # of /proc/net/tcp: 100,000 sockets
UNMAPPED_USER = 65534  # what the kernel tells for users that this user namespace does not know


class OwnerUnknown(Exception):
    """The user of a connection cannot be found; the message has the reason."""


def ask_kernel(peer: Address, own: Address) -> int:
    """Return the user whose socket has the address `peer` and is connected to `own`, by sock_diag.

    Raises:
        OwnerUnknown: no process holds such a socket, or the kernel does not answer.
    """
    source, target = _parse(peer[0]), _parse(own[0])
    family = socket.AF_INET if source.version == 4 else socket.AF_INET6
    ends = _ENDS.pack(peer[1], own[1], source.packed.ljust(16, b"\0"), target.packed.ljust(16, b"\0"))
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
    body = request + ends + struct.pack("=I", 0) + _NO_COOKIE
    head = _MESSAGE.pack(_MESSAGE.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(_WAIT_S)
            diag.sendto(head + body, (0, 0))
            answer = diag.recv(4096)
        return _read_answer(answer, peer[1])
    except (OSError, struct.error) as error:
        raise OwnerUnknown(f"sock_diag: {error}") from None


def _read_answer(answer: bytes, port: int) -> int:
    _, kind, _, _, _ = _MESSAGE.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, _MESSAGE.size)
        raise OSError(-code, errno.errorcode.get(-code, "") or os.strerror(-code))
    _, state, _, _, _, _, _, user, inode = _SOCKET.unpack_from(answer, _MESSAGE.size)
    (found,) = struct.unpack_from("!H", answer, _MESSAGE.size + 4)
    if state == _LISTEN or found != port:
        raise OwnerUnknown("sock_diag: no such connection")  # it answers with the listening socket then
    return _check(user, inode)


def read_tables(peer: Address, own: Address) -> int:
    """Return what `ask_kernel` does, from /proc/net/tcp and tcp6; takes milliseconds on a busy machine.

    Raises:
        OwnerUnknown: no process holds such a socket, or there are no such files.
    """
    wanted = (_parse(peer[0]), peer[1]), (_parse(own[0]), own[1])
    for name in ("tcp", "tcp6"):  # an IPv6 socket can hold a connection of IPv4
        for local, remote, user, inode in _read_table(Path("/proc/net") / name):
            if (local, remote) == wanted:
                return _check(user, inode)
    raise OwnerUnknown("/proc/net/tcp: no such connection")


_End = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def _read_table(path: Path) -> Iterator[tuple[_End, _End, int, int]]:
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_TABLE_BYTES).splitlines()[1:]
    except OSError:
        return
    for line in lines:
        words = line.split()
        if len(words) > 9 and int(words[3], 16) != _LISTEN:
            yield _read_end(words[1]), _read_end(words[2]), int(words[7]), int(words[9])


def _read_end(text: bytes) -> _End:
    """Read `0100007F:BC4D`: words of 32 bits in the machine's own order, and the port."""
    address, _, port = text.partition(b":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return _parse_packed(struct.pack(f"={len(words)}I", *words)), int(port, 16)


def search_processes(peer: Address, own: Address) -> int:
    """Return what `ask_kernel` does, from the sockets of the processes that this one may look at.

    Raises:
        OwnerUnknown: none of them has it.
    """
    import psutil

    wanted = (_parse(peer[0]), peer[1]), (_parse(own[0]), own[1])
    for process in psutil.process_iter():
        try:
            for one in process.net_connections(kind="tcp"):
                ends = [(_parse(end.ip), end.port) for end in (one.laddr, one.raddr) if end]
                if tuple(ends) == wanted:
                    return process.uids().effective
        except (psutil.Error, OSError):
            continue
    raise OwnerUnknown("no process of this user has the connection")


def find_slowly(peer: Address, own: Address) -> int:
    """Return what `ask_kernel` does, by the means of systems without it.

    Raises:
        OwnerUnknown: it cannot be found.
    """
    return read_tables(peer, own) if sys.platform == "linux" else search_processes(peer, own)


def _check(user: int, inode: int) -> int:
    if inode == 0:
        raise OwnerUnknown("its socket is closed")
    if user == UNMAPPED_USER:
        raise OwnerUnknown("its user has no number in this user namespace")
    return user


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return _parse_packed(ipaddress.ip_address(address.partition("%")[0]).packed)


def _parse_packed(packed: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(packed)
    return getattr(parsed, "ipv4_mapped", None) or parsed

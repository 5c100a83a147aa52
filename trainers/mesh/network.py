"""Where processes meet, and by which network they speak to each other."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

_GLOO = "GLOO_SOCKET_IFNAME"
_ADDRESS_OF = 0x8915  # SIOCGIFADDR of Linux: the IPv4 address of an interface


def meeting_at(host: str) -> str:
    """Where processes can meet the one of this machine that will have rank 0: tcp://HOST:PORT."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{f'[{host}]' if ':' in host else host}:{free.getsockname()[1]}"


def meeting_options(meeting: str, rank: int, ranks: int, wait: timedelta) -> dict[str, Any]:
    """What `init_process_group` is told of a meeting. Rank 0 listens at that address alone, where torch by itself would
    at all that the machine has, for anybody who comes."""
    where = urlsplit(meeting)
    if where.scheme != "tcp":
        return {"init_method": meeting}
    host, port = where.hostname or "", where.port or 0
    listening = None
    if rank == 0:
        with suppress(OSError):  # an address that is another machine's on the way here: then at all
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=ranks).detach()
    return {"store": dist.TCPStore(host, port, ranks, rank == 0, timeout=wait, master_listen_fd=listening)}


@contextmanager
def by_the_way_to(meeting: str) -> Iterator[None]:
    """Gloo listens on the interface by which the meeting is reached, unless its own variable names one. It would take
    the one that this machine's name resolves to, which on many is the loopback: nobody else can reach that."""
    found = None if _GLOO in os.environ else interface_to(urlsplit(meeting).hostname or "")
    if found:
        os.environ[_GLOO] = found
    try:
        yield
    finally:
        if found:
            del os.environ[_GLOO]


def interface_to(host: str) -> str | None:
    """The name of the interface by which this machine reaches `host`; None where that is not to be found out."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, 9))  # sends nothing
            own = socket.inet_aton(way.getsockname()[0])
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(way.fileno(), _ADDRESS_OF, struct.pack("256s", name.encode()))
                except OSError:  # it has none
                    continue
                if answer[20:24] == own:
                    return name
    except (ImportError, OSError):  # another system; no such host, or one of IPv6
        return None
    return None

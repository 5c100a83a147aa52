"""Where a cluster's dashboard is, and whether something answers there."""

import os
import re
import socket
from urllib.parse import urlsplit

from saescale.storage.errors import SaescaleError, one_line

_CONNECT_S = 10.0


def resolve_address(given: str | None) -> str:
    """The address of the dashboard, with its scheme. Raises SaescaleError where nothing says it."""
    from_ray = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address and from_ray.startswith(("http://", "https://")):
        address = from_ray
    if not address:
        raise SaescaleError(
            "which cluster? Give the address of Ray's dashboard: --address http://HEAD:8265 (or RAY_API_SERVER_ADDRESS)"
            + (f"; RAY_ADDRESS is {shown(from_ray)}, which is no dashboard's" if from_ray else "")
        )
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise SaescaleError(f"{shown(address)} is no address of a Ray dashboard; give one such as http://HEAD:8265")
    return address.rstrip("/")


def shown(address: str) -> str:
    """The address as it may be printed: without what stands before an @ or in a query."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", address).partition("?")[0]


def reach(url: str, address: str) -> None:
    """SaescaleError where nothing answers at `url`, shown as `address`, or something that does not speak HTTP, as the
    cluster's own port: Ray's client would wait for minutes, or for ever."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=_CONNECT_S) as connection:
            if parts.scheme == "http" and not _speaks_http(connection, parts.hostname):
                raise no_dashboard(address)
    except (OSError, UnicodeError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else one_line(error)
        raise SaescaleError(
            f"nothing answers at {address} ({reason}); see that the cluster is up, and give the address of Ray's "
            "dashboard (--address http://HEAD:8265)"
        ) from None


def _speaks_http(connection: socket.socket, host: str) -> bool:
    try:
        connection.sendall(f"GET /api/version HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return connection.recv(5).startswith(b"HTTP/")
    except OSError:
        return False


def no_dashboard(address: str) -> SaescaleError:
    """What to say where something else answers."""
    return SaescaleError(f"what answers at {address} is no Ray dashboard; its port is 8265 where nobody changed it")

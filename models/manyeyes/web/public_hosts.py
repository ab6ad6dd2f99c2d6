"""Connections to machines of the public web alone, whatever a name, a redirect or a name server says.

A name is looked up once. Where any of its addresses is private, loopback, link-local or otherwise not public, there is
no connection; otherwise it goes to the very address that was checked, so that a second answer of the name server (DNS
rebinding) changes nothing. Proxies are not used: they would look the name up again.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection

from manyeyes.errors import FetchError

# What carries an address of version 4 inside: NAT64 (RFC 6052) would hand a private one on.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def find_public_address(host: str, port: int, *, private_hosts: Collection[str] = ()) -> tuple[str, int]:
    """Where a host is; none of its addresses may be private: the name may be anybody's.

    Args:
        host: Its name, or an address.
        port: Of the service.
        private_hosts: Hosts that may be at private addresses, as the user says.

    Raises:
        FetchError: One of its addresses is not public.
        OSError: No such host.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    inside = [] if host in private_hosts else [address for address in found if not is_public(address)]
    if inside or not found:
        raise FetchError(
            f"{host} is at {', '.join(inside)}", "a public address is needed", "Name a host of the public web."
        )
    return found[0], port


def is_public(address: str) -> bool:
    """Whether an address is one of the public web, and so is an address of version 4 that it carries."""
    number = ipaddress.ip_address(address.partition("%")[0])
    inner: ipaddress.IPv4Address | None = None
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour
        if number in _NAT64:
            inner = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number.is_global and not number.is_multicast and (inner is None or is_public(str(inner)))


class PinnedConnection(http.client.HTTPConnection):
    """Connects to the address that was checked, whatever the name says by now.

    Args:
        host: The server's name, for its certificate and the ``Host`` header.
        address: From ``find_public_address``.
        secure: Whether it speaks TLS.
        timeout: Longest wait for anything to happen; seconds.
    """

    def __init__(self, host: str, address: tuple[str, int], *, secure: bool, timeout: float) -> None:
        super().__init__(host, address[1], timeout=timeout)
        self.default_port = 443 if secure else 80  # the Host header names any other
        self._address, self._secure = address, secure

    def connect(self) -> None:
        """As http.client does, to the address."""
        self.sock = socket.create_connection(self._address, self.timeout)
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

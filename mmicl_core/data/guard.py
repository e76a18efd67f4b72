"""What this machine may connect to when a stranger names the URL.

A URL of a corpus or of a request is an order to connect somewhere, and whoever writes it would like that to
be a neighbour that trusts this machine: a cloud's metadata, a database, the cluster itself (server-side
request forgery, CWE-918). Allowed are

    scheme      http and https, without credentials
    host        a name, or an address in its usual spelling: no 2130706433, 0x7f.1, 127.1, 0177.0.0.1
    address     every address that a name has is public, also the one that is wrapped in it (IPv4-mapped,
                6to4, NAT64)
    port        80 and 443

and any address and port within the networks that the operator names.

Hazard: `Guard.check` reads the URL alone. What its name resolves to is known when it is connected to, so a
URL that passed is not safe for another HTTP library: `network.GuardedClient` asks `Guard.addresses` once
for each connection and connects to one of those, which leaves a second answer of the name server no say
(DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from typing import TypeAlias

import httpx

from mmicl_core.errors import ConfigError, DataError

__all__ = ["Guard", "Resolve", "UrlRefusedError", "resolve_name"]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve: TypeAlias = Callable[[str], Sequence[str]]
"""The addresses of a name; OSError if it has none."""

SCHEME_PORTS = {"http": 80, "https": 443}
NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# What the C library, and so most of what resolves names, takes for an IPv4 address in some base.
ENDS_IN_A_NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")

PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Global by the books of some version of Python, and yet no servers of the public: protocol assignments, of
# which some are answered by the nearest router; 6to4 relays; the virtual host of Azure's machines; Teredo
# and its kin; documentation.
NOT_FOR_THE_PUBLIC: tuple[Network, ...] = (
    ipaddress.IPv4Network("192.0.0.0/24"),
    ipaddress.IPv4Network("192.88.99.0/24"),
    ipaddress.IPv4Network("168.63.129.16/32"),
    ipaddress.IPv6Network("2001::/23"),
    ipaddress.IPv6Network("3fff::/20"),
)


class UrlRefusedError(DataError):
    """A URL that must not be loaded, whatever lies there."""


def resolve_name(name: str) -> list[str]:
    """The addresses that the system has for a name, in its order of preference."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Guard:
    """What may be connected to.

    Args:
        allowed_networks: as `10.1.0.0/16`; their addresses and all ports of them are allowed too.
        resolve: gives the addresses of a name.

    Raises:
        ConfigError: a network is none.
    """

    def __init__(self, allowed_networks: Sequence[str] = (), resolve: Resolve = resolve_name) -> None:
        self._resolve = resolve
        self._networks = [_network(text) for text in allowed_networks]

    def check(self, url: str) -> httpx.URL:
        """Read a URL without connecting anywhere; a dot at the end of its host is dropped.

        Raises:
            UrlRefusedError: it is none, or not one to follow.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise UrlRefusedError(f"{_short(url)} is not a URL: {str(error)[:100]}") from error
        # Not `parsed.host`, which fails on a host that only looks like IDNA.
        host = parsed.raw_host.decode("ascii").removesuffix(".")
        if parsed.scheme not in SCHEME_PORTS:
            raise UrlRefusedError(f"{_short(url)} does not begin with http:// or https://")
        if parsed.userinfo:
            raise UrlRefusedError(f"a URL of {host[:100]!r} carries credentials")
        if _literal(host) is None and (NAME.fullmatch(host) is None or ENDS_IN_A_NUMBER.fullmatch(host)):
            raise UrlRefusedError(
                f"the host of {_short(url)} is neither a name nor an address in its usual spelling"
            )
        if parsed.port is not None and not 0 < parsed.port < 65536:
            raise UrlRefusedError(f"port {parsed.port} of {_short(url)} does not exist")
        return parsed.copy_with(host=host)

    def addresses(self, host: str, port: int) -> list[str]:
        """The addresses that a connection to `host` may go to; resolves its name, once.

        Raises:
            UrlRefusedError: one of its addresses is not public, or the port is not one of the web.
            OSError: the name cannot be resolved.
        """
        literal = _literal(host)
        found = [literal] if literal is not None else [_address(text) for text in self._resolve(host)]
        if not found:
            raise OSError(f"{host} has no address")
        for address in found:
            if self._is_allowed(address):
                continue
            if not _is_public(address):
                raise UrlRefusedError(f"{host} is at {address}, which is not a public address")
            if port not in SCHEME_PORTS.values():
                raise UrlRefusedError(f"port {port} of {host} is neither 80 nor 443")
        return [str(address) for address in found]

    def _is_allowed(self, address: Address) -> bool:
        faces = (address, _unwrap(address))
        return any(face in network for network in self._networks for face in faces)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(
            f"fetch.allowed_networks holds {text!r}, which is no network ({error}): write 10.1.0.0/16, "
            "or 10.1.2.3/32 for one address"
        ) from error


def _literal(host: str) -> Address | None:
    """The address that a host is, in its usual spelling and without a zone; None if it is none."""
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _address(text: str) -> Address:
    # Link-local addresses come with the interface that they lie behind.
    return ipaddress.ip_address(text.partition("%")[0])


def _unwrap(address: Address) -> Address:
    """Where a packet ends that is sent to an address which carries another one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: Address) -> bool:
    inner = _unwrap(address)
    if isinstance(inner, ipaddress.IPv6Address) and inner not in PUBLIC_IPV6:
        return False
    special = inner.is_multicast or inner.is_reserved or inner.is_unspecified or inner.is_private
    return inner.is_global and not special and not any(inner in network for network in NOT_FOR_THE_PUBLIC)


def _short(url: str) -> str:
    return repr(url if len(url) <= 100 else url[:100] + "...")

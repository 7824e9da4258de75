# SPDX-License-Identifier: Apache-2.0
"""Addresses `host:port`, of either version of IP, and the one interface that a name stands for."""

import errno
import ipaddress
import socket
from typing import NamedTuple


class Address(NamedTuple):
    """Where a process listens."""

    host: str  # a name or a number, without brackets
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str, name: str) -> "Address":
        """Reads `host:port` or `[IPv6]:port`.

        Args:
            text: the address.
            name: of the option, for errors.

        Raises:
            ValueError: it is none, or names no single interface.
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not (host and colon and port.isascii() and port.isdecimal()):
            raise ValueError(f"{name} is {text!r}; give host:port of process 0")
        if (":" in host) != bracketed:
            raise ValueError(f"{name} is {text!r}; write an IPv6 address as [::1]:4567")
        if not 1 <= int(port) <= 65535:
            raise ValueError(f"{name} is {text!r}; a port is a number from 1 to 65535")
        if _is_wildcard(host):
            raise ValueError(
                f"{name} is {text!r}, which is every interface: give the address of one, at which "
                "the other processes reach process 0"
            )
        return cls(host, int(port))


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of names, `localhost` alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(address: Address, name: str) -> socket.socket:
    """A socket that listens at one address of this machine.

    Args:
        address: a name is taken for the first of its addresses that this machine has.
        name: of the option, for errors.

    Raises:
        ValueError: the name is unknown, or none of its addresses is this machine's.
        OSError: the port is taken.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:  # also of a name that can't be one
        raise ValueError(f"{name}: the host {address.host!r} is unknown: {error}") from error
    tried = []
    for family, _, _, _, sockaddr in found:
        try:
            return socket.create_server(sockaddr, family=family, backlog=128)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise OSError(f"can't listen at {address}: {error}") from error
            tried.append(str(sockaddr[0]))
    raise ValueError(
        f"{name}: {address.host!r} stands for {', '.join(dict.fromkeys(tried))}, which is no "
        "address of this machine: process 0 has to run where the address is"
    )


def free_port(host: str) -> Address:
    """A port that is free now, on the interface of this machine with that number."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return Address(host, probe.getsockname()[1])

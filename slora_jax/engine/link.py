# SPDX-License-Identifier: Apache-2.0
"""What the processes of an engine say to each other, and how they find each other.

Messages are pickled. The connections are authenticated with a key that process 0 draws and hands
out over JAX's own cluster, and there is no other way in.
"""

import os
import pickle
import socket
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from slora_jax.core import Install
from slora_jax.engine.command import StepCommand

_GREETING_BYTES = 4096


class Read(NamedTuple):
    """Read an adapter's directory and say what is there."""

    number: int
    path: Path


class Stage(NamedTuple):
    """Copy an adapter to the devices and say when it is there."""

    number: int
    adapter_id: str
    path: Path


class Drop(NamedTuple):
    """Copies that nobody wants any more."""

    numbers: tuple[int, ...]


class Enter(NamedTuple):
    """Write a copy into its pages."""

    install: Install
    number: int


class End(NamedTuple):
    """Nothing comes after this."""


type Command = Read | Stage | Drop | Enter | StepCommand | End


class Reply(NamedTuple):
    """What became of a command of this number: the adapter's id, or what is wrong."""

    number: int
    adapter_id: str | None
    error: str | None


class Failed(NamedTuple):
    """A process ends, and why."""

    error: str


class FollowerError(Exception):
    """Another process of the engine is gone, and with it its part of the model."""


def greet(own: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Hands process 0's greeting to all processes, over JAX's cluster; the others' own is None."""
    data = b"" if own is None else pickle.dumps(own)
    if len(data) > _GREETING_BYTES:
        raise ValueError(f"{len(data)} bytes are too long for a greeting")
    padded = np.zeros(_GREETING_BYTES, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return pickle.loads(found.astype(np.uint8).tobytes())


def own_addresses() -> list[str]:
    """Addresses under which other hosts may find this one, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it says which interface would be used
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += [info[4][0] for info in socket.getaddrinfo(socket.getfqdn(), None, socket.AF_INET)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def connect(addresses: list[str], port: int, key: bytes) -> Connection:
    """Process 0's connection.

    Raises:
        FollowerError: it cannot be reached.
    """
    errors = []
    for address in addresses:
        try:
            return prompt(Client((address, port), authkey=key))
        except Exception as error:  # somebody else may listen there
            errors.append(f"{address}: {error}")
    raise FollowerError(f"process 0 cannot be reached on port {port}: {'; '.join(errors)}")


def prompt(connection: Connection) -> Connection:
    """A connection that sends at once: no step's command waits for the last one's receipt."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection

# SPDX-License-Identifier: Apache-2.0
"""Where the processes meet, and the way in."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from slora_jax.cluster.address import Address, is_loopback, listen
from slora_jax.cluster.gathering import gather, reach
from slora_jax.cluster.jax_cluster import join_jax
from slora_jax.cluster.peers import ALONE, Peers
from slora_jax.cluster.secret import check_secret, find_secret

ENVIRONMENT = {  # names that JAX's users set already
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}

DEFAULT_TIMEOUT_S = 300.0  # a host may take minutes to come up

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the processes meet, and which of them this is.

    Attributes:
        coordinator_address: `host:port` or `[IPv6]:port` of process 0, which listens there, on that
            interface alone.
        num_processes: of all.
        process_id: of this one, from 0 on.
        secret: that all of them know and nobody else does; None for one process.
        timeout_s: seconds in which all must have come.

    Raises:
        ValueError: one is missing or out of range.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    secret: bytes | None = field(default=None, repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        self._address()
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id must be from 0 to {self.num_processes - 1}, num_processes being "
                f"{self.num_processes}; got {self.process_id}"
            )
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"cluster_timeout_s must be positive, got {self.timeout_s}")
        if self.num_processes > 1:
            check_secret(self.secret)

    @classmethod
    def of(
        cls,
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        secret_file: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "Cluster | None":
        """What is given, else what the environment says; None if neither says anything.

        Args:
            coordinator_address: else `JAX_COORDINATOR_ADDRESS`.
            num_processes: else `JAX_NUM_PROCESSES`.
            process_id: else `JAX_PROCESS_ID`.
            secret_file: that only this user may read; else `SLORA_CLUSTER_SECRET` is the secret.
            timeout_s: seconds in which all must have come.

        Raises:
            ValueError: something is missing beside the rest, or out of range.
        """
        given = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
        }
        for name, variable in ENVIRONMENT.items():
            text = os.environ.get(variable)
            if given[name] is None and text:
                if name != "coordinator_address" and not text.isdecimal():
                    raise ValueError(f"the environment variable {variable} is {text!r}, no number")
                given[name] = text if name == "coordinator_address" else int(text)
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            if secret_file is not None:
                raise ValueError(
                    f"cluster_secret_file is for several processes: give {', '.join(given)} too"
                )
            return None
        if missing:
            names = " and ".join(f"{name} (or {ENVIRONMENT[name]})" for name in missing)
            raise ValueError(f"several processes need all of {', '.join(given)}: give {names} too")
        return cls(**given, secret=find_secret(secret_file), timeout_s=timeout_s)

    def join(self) -> Peers:
        """Meets the others; called before JAX is used. Returns when all are there.

        Process 0 and each of the others first prove to each other that they know the secret; then
        all join JAX's cluster.

        Returns:
            The others, for `Engine` or `Follower`.

        Raises:
            ValueError: the address is not one of process 0's machine, or the processes have
                different numbers of devices.
            ClusterError: some have not come in time, or do not know the secret.
            OSError: the port is taken.
        """
        if self.num_processes == 1:
            return ALONE
        assert self.secret is not None
        peers, interface = self._meet(self.secret)
        try:
            join_jax(peers, self.secret, interface)
        except BaseException:
            peers.close()
            raise
        return peers

    def _meet(self, secret: bytes) -> tuple[Peers, str | None]:
        """The others, and the interface on which process 0 listened for them."""
        if self.process_id:
            channel = reach(
                self._address(), secret, self.process_id, self.num_processes, self.timeout_s
            )
            return Peers(self.process_id, self.num_processes, {0: channel}), None
        with listen(self._address(), "coordinator_address") as listening:
            here = Address(*listening.getsockname()[:2])
            self._announce(here)
            channels = gather(listening, secret, self.num_processes, self.timeout_s)
        return Peers(0, self.num_processes, channels), here.host

    def _address(self) -> Address:
        return Address.parse(self.coordinator_address, "coordinator_address")

    def _announce(self, here: Address) -> None:
        """A host's own name often stands for a loopback address there: the others never come."""
        tell = logger.info
        if is_loopback(here.host) and not is_loopback(self._address().host):
            tell = logger.warning
        tell(
            "process 0 waits at %s for %d others, for %g s",
            here,
            self.num_processes - 1,
            self.timeout_s,
        )

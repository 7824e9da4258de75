# SPDX-License-Identifier: Apache-2.0
"""Several processes, on several hosts perhaps, whose devices are one mesh."""

import os
from dataclasses import dataclass

ENVIRONMENT = {  # names that JAX's users set already
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the processes meet, and which of them this is.

    Attributes:
        coordinator_address: `host:port` of process 0, which opens that port.
        num_processes: of all.
        process_id: of this one, from 0 on.

    Raises:
        ValueError: one is missing or out of range.
    """

    coordinator_address: str
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        host, colon, port = self.coordinator_address.rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise ValueError(
                f"coordinator_address is {self.coordinator_address!r}; give host:port of process 0"
            )
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1, got {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id must be from 0 to {self.num_processes - 1}, num_processes being "
                f"{self.num_processes}; got {self.process_id}"
            )

    @classmethod
    def of(
        cls,
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> "Cluster | None":
        """What is given, else what the environment says; None if neither says anything.

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
            return None
        if missing:
            names = " and ".join(f"{name} (or {ENVIRONMENT[name]})" for name in missing)
            raise ValueError(f"several processes need all of {', '.join(given)}: give {names} too")
        return cls(**given)

    def join(self) -> None:
        """Meets the others; called before JAX is used. Returns when all are there."""
        import jax  # not needed by who only passes this on

        jax.distributed.initialize(self.coordinator_address, self.num_processes, self.process_id)

# SPDX-License-Identifier: Apache-2.0
"""What the processes of an engine must have in common, and what they share of a machine."""

import socket
from dataclasses import asdict, fields
from pathlib import Path

import jax

import slora_jax
from slora_jax.cluster import Peers
from slora_jax.engine.setup import Setup
from slora_jax.scheduling.options import SchedulingOptions

_OWN = (
    "compilation_cache_dir",
    "lora_load_threads",
    "lora_load_timeout_s",
    "max_cpu_loras",
    "max_cpu_lora_gib",
)


def processes_here(peers: Peers) -> int:
    """How many processes of the engine this machine has; each calls this once."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # Linux's; containers may share a name
    machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return [said["machine"] for said in peers.exchange({"machine": machine})].count(machine)


def facts_of(setup: Setup) -> dict[str, str]:
    """What makes the processes' programs the same."""
    scheduling = {field.name for field in fields(SchedulingOptions)}  # process 0's alone
    apart = scheduling | set(_OWN)
    options = {name: value for name, value in asdict(setup.options).items() if name not in apart}
    model = {f"the model's {name}": value for name, value in asdict(setup.config).items()}
    versions = {
        "the version of jax": jax.__version__,
        "the version of slora-jax": slora_jax.__version__,
    }
    found = {**versions, **options, **model}
    return {name: repr(value) for name, value in found.items()}

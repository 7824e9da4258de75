# SPDX-License-Identifier: Apache-2.0
"""What several processes must do alike, or not at all: else they wait for each other for ever.

Their programs meet in collectives. If one refuses an option, or has another one, the others must
hear of it before the first of these.
"""

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from slora_jax.engine.setup import Setup
from slora_jax.scheduling.options import SchedulingOptions

_MOST_BYTES = 1 << 14  # of what a process says
_MOST_ERROR = 2000  # characters of an error
_OWN = ("compilation_cache_dir", "lora_load_threads", "max_cpu_loras", "max_cpu_lora_gib")


def together[T](act: Callable[[], T], facts: Callable[[T], Mapping[str, str]]) -> T:
    """Does something that every process does; the same happens on all of them.

    Args:
        act: what is done. It holds no collective.
        facts: what all must agree on, by name, from its result.

    Raises:
        ValueError: another process could not do it, or they don't agree; all of them raise then.
    """
    if jax.process_count() == 1:
        return act()
    try:
        result = act()
        said = dict(facts(result))
    except Exception as error:
        _exchange({"refusal": f"{type(error).__name__}: {error}"[:_MOST_ERROR]})
        raise
    for process, theirs in enumerate(_exchange(said)):
        if "refusal" in theirs:
            raise ValueError(f"process {process} of the engine refuses: {theirs['refusal']}")
        for name, value in said.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{name} is {value} in process {jax.process_index()} of the engine and "
                    f"{theirs.get(name)} in process {process}: give all processes the same"
                )
    return result


def processes_here() -> int:
    """How many processes of the engine this machine has; each calls this once."""
    if jax.process_count() == 1:
        return 1
    boot = Path("/proc/sys/kernel/random/boot_id")  # Linux's; containers may share a name
    machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return [said["machine"] for said in _exchange({"machine": machine})].count(machine)


def facts_of(setup: Setup) -> dict[str, str]:
    """What makes the processes' programs the same."""
    scheduling = {field.name for field in fields(SchedulingOptions)}  # process 0's alone
    apart = scheduling | set(_OWN)
    options = {name: value for name, value in asdict(setup.options).items() if name not in apart}
    model = {f"the model's {name}": value for name, value in asdict(setup.config).items()}
    found = {"the version of jax": jax.__version__, **options, **model}
    return {name: repr(value) for name, value in found.items()}


def _exchange(said: Mapping[str, str]) -> list[dict[str, str]]:
    """What every process said, in their order; each calls this as often as the others."""
    data = json.dumps(said).encode()
    assert len(data) <= _MOST_BYTES, "too much to say"
    padded = np.full(_MOST_BYTES, ord(" "), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    found = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    return [json.loads(one.tobytes()) for one in found.reshape(-1, _MOST_BYTES)]

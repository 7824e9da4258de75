# SPDX-License-Identifier: Apache-2.0
"""What the engine's process says when a call fails."""

from typing import Any

from server.engine_process import EngineProcess


def test_a_machine_without_memory_is_not_the_clients_fault():
    """Python's own error has no words."""
    nothing: Any = None
    process = EngineProcess(nothing, nothing)

    def load() -> None:
        raise MemoryError

    process._call(1, load)
    done = process._done.get(timeout=30)
    assert done.unavailable
    assert "no memory left for it: lower --max-cpu-lora-gib" in str(done.error)

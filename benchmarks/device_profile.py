# SPDX-License-Identifier: Apache-2.0
"""How busy a GPU was, from what JAX's profiler recorded."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

_TRANSFERS = ("MemcpyH2D", "MemcpyD2H")  # beside the work, not part of it


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Of a device, from its first kernel to the end of its last.

    The profiler makes launches slower, so that the time between kernels is its own: only what the
    kernels take says something of how busy the device is when nobody looks.

    Attributes:
        launches: kernels, and copies within the device.
        seconds: from first to last.
        busy: of these seconds, those in which some of them ran.
    """

    launches: int
    seconds: float
    busy: float


def device_use(directory: Path) -> DeviceUse | None:
    """Of the first GPU in a trace that `jax.profiler` wrote; None: there is none, as on a CPU."""
    for file in sorted(directory.rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU:0"):
                streams = (line for line in plane.lines if line.name.startswith("Stream"))
                return use_of(
                    (event.start_ns, event.start_ns + event.duration_ns)
                    for line in streams
                    for event in line.events
                    if not event.name.startswith(_TRANSFERS)
                )
    return None


def busy_us(call: Callable[[Any], Any], carry: Any, *, calls: int = 3) -> tuple[float | None, Any]:
    """What the kernels of `carry = call(carry)` take on the device; None on a CPU.

    Without the time in which the host launches them, where that is longer.

    Returns:
        Microseconds of one call, and the last result: a call may donate what it is given.
    """
    if jax.default_backend() != "gpu":
        return None, carry
    carry = jax.block_until_ready(call(carry))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                carry = call(carry)
            jax.block_until_ready(carry)
        use = device_use(Path(directory))
    return None if use is None else 1e6 * use.busy / calls, carry


def use_of(spans: Iterable[tuple[float, float]]) -> DeviceUse | None:
    """From when each kernel ran, in nanoseconds; None without any."""
    found = sorted(spans)
    if not found:
        return None
    whole = max(end for _, end in found) - found[0][0]
    busy = sum(end - start for start, end in _merged(found))
    return DeviceUse(len(found), 1e-9 * whole, 1e-9 * busy)


def _merged(spans: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Spans in order, those that overlap as one."""
    now: tuple[float, float] | None = None
    for start, end in spans:
        if now is None or start > now[1]:
            if now is not None:
                yield now
            now = start, end
        else:
            now = now[0], max(now[1], end)
    if now is not None:
        yield now

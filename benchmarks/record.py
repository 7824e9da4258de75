# SPDX-License-Identifier: Apache-2.0
"""Results as lines of JSON, each with all that is needed to tell what was measured where."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import Ceilings, Timing, Work, ceilings

ROOT = Path(__file__).parents[1]
ENVIRONMENT = "SLORA_COMMIT"  # the commit, where the sources are a copy without .git


class Recorder:
    """Prints every result as it comes, and appends it to a file.

    Args:
        file: where to; None: to standard output only.
        quiet: nowhere at all: another process of the same benchmark records.
    """

    def __init__(self, file: Path | None, *, quiet: bool = False):
        self._file = file
        self._quiet = quiet
        self._circumstances = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "commit": commit(),
        }

    def add(
        self, benchmark: str, timing: Timing, work: Work, limit_us: float | None, **fields: Any
    ) -> None:
        """A line: the benchmark, its parameters, what was measured, and where.

        Args:
            benchmark: its name.
            timing: what it took.
            work: what it had to do.
            limit_us: what it could take at best; None where the result is itself a limit.
            **fields: parameters and further results.
        """
        line = {
            "benchmark": benchmark,
            **fields,
            "us": _short(timing.us),
            "us_min": _short(timing.us_min),
            "us_max": _short(timing.us_max),
            "limit_us": None if limit_us is None else _short(limit_us),
            "ratio": None if limit_us is None or timing.us <= 0 else _short(limit_us / timing.us),
            "bytes": work.bytes,
            "flops": work.flops,
            **self._circumstances,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(line)
        if self._quiet:
            return
        print(text, flush=True)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(text + "\n")

    def ceilings(self, *, small: bool = False, **fields: Any) -> Ceilings:
        """Measures and records what the device can do at best; `small`: to try it on a CPU."""
        say("what the device can do at best")
        found, parts = ceilings(rows=16, side=64) if small else ceilings()
        for name, (timing, work) in parts.items():
            self.add("ceiling", timing, work, None, case=name, **fields)
        return found


def commit() -> str:
    """The sources' commit, with `-dirty` if they differ from it."""
    if ENVIRONMENT in os.environ:
        return os.environ[ENVIRONMENT]
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results are written while others are measured.
        changed = _git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _short(number: float) -> float:
    """Four figures or three decimals, whichever says more: a clock says no more than that."""
    return round(number, 3) if abs(number) < 1000 else round(number, 1)


def say(text: str) -> None:
    """Progress, on standard error: standard output is JSON."""
    print(text, file=sys.stderr, flush=True)

# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests takes: memory maps and memory, of each process and of all together.

A process may have `vm.max_map_count` maps. XLA takes several for every program that it compiles for
a CPU, and JAX keeps the program: thousands of them end in an abort, without a word.
"""

import os
import threading
from pathlib import Path

import pytest

PROC = Path("/proc")
EVERY_S = 1.0


class Watch(threading.Thread):
    """Looks at this process and all below it, as long as the tests run.

    Args:
        parallel: this process runs no tests itself; those that it has started do.

    Attributes:
        maps: the most that a process had, by what the process is.
        memory: the most bytes that a process had, by what it is.
        together: the most bytes that all had at a time. What processes share counts in each.
    """

    def __init__(self, parallel: bool) -> None:
        super().__init__(name="resources", daemon=True)
        self.maps: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.together = 0
        self._parallel = parallel
        self._kinds = {os.getpid(): "pytest"}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.look()

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self.look()

    def look(self) -> None:
        together = 0
        for pid, parent in processes_below(os.getpid()):
            try:
                maps = (PROC / str(pid) / "maps").read_bytes().count(b"\n")
                pages = int((PROC / str(pid) / "statm").read_text().split()[1])
            except OSError:
                continue  # it has ended
            kind, memory = self._kind(pid, parent), pages * os.sysconf("SC_PAGE_SIZE")
            self.maps[kind] = max(maps, self.maps.get(kind, 0))
            self.memory[kind] = max(memory, self.memory.get(kind, 0))
            together += memory
        self.together = max(together, self.together)

    def _kind(self, pid: int, parent: int) -> str:
        if self._parallel and parent == os.getpid():
            return self._kinds.setdefault(pid, f"worker {len(self._kinds)}")
        return self._kinds.get(pid, "started by tests")


def processes_below(root: int) -> list[tuple[int, int]]:
    """A process, those that it has started, and so on; each with its parent."""
    children: dict[int, list[int]] = {}
    for entry in PROC.glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found = [(root, 0)]
    for pid, _ in found:
        found += [(child, pid) for child in children.get(pid, ())]
    return found


class Report:
    """Of one run: what pytest calls."""

    def __init__(self, parallel: bool) -> None:
        self.watch = Watch(parallel)

    def pytest_sessionstart(self) -> None:
        self.watch.start()

    def pytest_sessionfinish(self) -> None:
        self.watch.stop()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        watch, limit = self.watch, (PROC / "sys/vm/max_map_count").read_text().strip()
        terminalreporter.section("what it took at most")
        for kind, maps in sorted(watch.maps.items()):
            line = f"{kind:16}{maps:7} maps{watch.memory[kind] / 2**30:7.1f} GiB"
            terminalreporter.write_line(line)
        together = f"{watch.together / 2**30:.1f} GiB"
        terminalreporter.write_line(f"all together {together}; a process may have {limit} maps")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if PROC.joinpath("self/maps").exists() and not is_worker and not config.option.collectonly:
        parallel = bool(config.getoption("numprocesses", None))
        config.pluginmanager.register(Report(parallel), "resources")

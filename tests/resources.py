# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests takes: memory maps and memory, of each process and of all together.

A process may have `vm.max_map_count` maps. XLA takes several for every program that it compiles for
a CPU, and JAX keeps the program: thousands of them end in an abort, without a word.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

PROC = Path("/proc")
EVERY_S = 1.0


class Watch(threading.Thread):
    """Looks at this process and all below it, as long as the tests run.

    Attributes:
        names: of processes, by their number; those not named are others that tests have started.
        maps: the most that a process of each name had.
        memory: the most bytes that a process of each name had.
        together: the most bytes that all had at a time. What processes share counts in each.
    """

    def __init__(self) -> None:
        super().__init__(name="resources", daemon=True)
        self.names = {os.getpid(): "pytest"}
        self.maps: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.together = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.look()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def look(self) -> None:
        together = 0
        for pid in processes_below(os.getpid()):
            try:
                maps = (PROC / str(pid) / "maps").read_bytes().count(b"\n")
                memory = int((PROC / str(pid) / "statm").read_text().split()[1])
            except OSError:
                continue  # it has ended
            memory *= os.sysconf("SC_PAGE_SIZE")
            name = self.names.get(pid, "others")
            self.maps[name] = max(maps, self.maps.get(name, 0))
            self.memory[name] = max(memory, self.memory.get(name, 0))
            together += memory
        self.together = max(together, self.together)


def processes_below(root: int) -> Iterator[int]:
    """A process, those that it has started, those that they have started, and so on."""
    children: dict[int, list[int]] = {}
    for entry in PROC.glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        yield pid
        found += children.get(pid, ())


class Report:
    """Of one run: the plugin's part in pytest."""

    def __init__(self) -> None:
        self.watch = Watch()

    def pytest_sessionstart(self) -> None:
        self.watch.start()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node) -> None:
        self.watch.names[node.workerinfo["pid"]] = node.gateway.id

    def pytest_sessionfinish(self) -> None:
        self.watch.stop()

    def pytest_terminal_summary(self, terminalreporter) -> None:
        watch, limit = self.watch, (PROC / "sys/vm/max_map_count").read_text().strip()
        terminalreporter.section("what it took at most")
        for name, maps in sorted(watch.maps.items()):
            line = f"{name:8}{maps:7} maps{watch.memory[name] / 2**30:6.1f} GiB"
            terminalreporter.write_line(line)
        together = f"{watch.together / 2**30:.1f} GiB"
        terminalreporter.write_line(f"all together {together}; a process may have {limit} maps")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if PROC.joinpath("self/maps").exists() and not is_worker and not config.option.collectonly:
        config.pluginmanager.register(Report(), "resources")

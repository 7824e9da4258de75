# SPDX-License-Identifier: Apache-2.0
"""How adapters move between disk, host memory, staging and pool, one case at a time."""

from pathlib import Path

import pytest

from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.host_cache import HostCache
from tests.adapters.world import PAGE_BYTES, AdapterHost, FakeAdapter, SlowThreads


def host_with(pages: dict[str, int], capacity: int = 20, **options) -> AdapterHost:
    """Adapters by name, each of so many pages; batches of two."""
    host = AdapterHost(capacity, 4, 2, 8, 4, **options)
    for name, count in pages.items():
        host.manager.load(name, host.disk.write(f"/{name}", name, count))
    return host


def copied(host: AdapterHost) -> list[str]:
    """What the copies begun so far are of."""
    return [copy.adapter.id.split()[0] for copy in host.copies]


class TestPrefetch:
    def test_nobody_waits_for_somebody_elses_adapter(self):
        host = host_with({"cold": 2})
        first = host.ask("cold", 4, 8)
        second = host.ask(None, 4, 8)
        plan = host.step()
        assert [row.request for row in plan.rows] == [second]
        for _ in range(3):
            assert [row.request for row in host.step().rows] == [second]
        host.copies[0].done = True
        assert {row.request for row in host.step().rows} == {first, second}

    def test_the_copy_begins_when_the_request_comes_not_when_there_is_room(self):
        host = host_with({"a": 1, "b": 1})
        host.ask("a", 4, 20), host.ask("a", 4, 20)
        host.let_all_come()
        host.step()
        host.let_all_come()
        host.step()
        assert len(host.scheduler.running) == 2  # the batch is full
        host.ask("b", 4, 4)
        host.step()
        assert copied(host) == ["b"]

    def test_in_the_policys_order_as_far_as_staging_holds(self):
        host = host_with({"a": 3, "b": 2, "c": 1}, staging_pages=4, scheduling_policy="lcfs")
        for name in "abc":
            host.ask(name, 4, 4)
        host.step()
        assert copied(host) == ["c", "b"]  # 1 + 2 pages; a's 3 are too many

    def test_what_is_wanted_first_takes_the_place_of_what_is_not(self):
        host = host_with({"a": 3, "b": 3}, staging_pages=4, scheduling_policy="lcfs")
        host.ask("a", 4, 4)
        host.step()
        host.ask("b", 4, 4)
        host.step()
        assert copied(host) == ["a", "b"]
        host.copies[0].done = host.copies[1].done = True
        [row] = host.step().rows
        assert row.request.adapter == "b"

    def test_a_change_of_the_policys_mind_is_followed(self):
        """The order under "vtc" changes without anybody coming or going."""
        host = host_with({"a": 1, "b": 1}, 9, scheduling_policy="vtc", prefetch_lookahead=1)
        running = host.ask("a", 1, 20)
        while not host.scheduler.running:
            host.let_all_come()
            host.step()
        host.ask("a", 29, 1)  # finds no room beside it, but is first in line
        small = host.ask("b", 1, 1)
        while small in host.live:
            host.let_all_come()
            host.step()
            assert running in host.live, "b was fetched only when there was nothing else to do"

    def test_an_aborted_request_leaves_nothing_in_staging(self):
        host = host_with({"a": 2})
        request = host.ask("a", 4, 4)
        host.step()
        assert host.manager.loader.has_copies
        host.abort(request)
        host.step()
        assert not host.manager.loader.has_copies


class TestHostMemory:
    def adapter(self, name: str, pages: int = 1) -> FakeAdapter:
        return FakeAdapter(name, Path(name), pages)

    def test_the_least_recently_used_goes_first(self):
        host: HostCache = HostCache(None, 3 * PAGE_BYTES, SlowThreads())
        for name in "abc":
            host.put(self.adapter(name))
        assert host.get("a") is not None
        host.put(self.adapter("d"))
        assert [name for name in "abcd" if name in host] == ["a", "c", "d"]

    def test_a_number_of_adapters_can_be_the_limit(self):
        host: HostCache = HostCache(2, 100 * PAGE_BYTES, SlowThreads())
        for name in "abc":
            host.put(self.adapter(name))
        assert len(host) == 2

    def test_reads_under_way_keep_their_room(self):
        threads = SlowThreads()
        host: HostCache = HostCache(None, 3 * PAGE_BYTES, threads)
        host.fetch("a", 2 * PAGE_BYTES, lambda: self.adapter("a", 2))
        host.put(self.adapter("b"))
        assert not host.put(self.adapter("c", 2))
        host.fetch("d", 2 * PAGE_BYTES, lambda: self.adapter("d", 2))
        assert len(threads.waiting) == 1  # d has to wait
        threads.run_one()
        assert host.poll() == {}
        assert "a" in host
        assert "b" in host
        host.check()

    def test_a_read_that_fails_gives_its_room_back(self):
        threads = SlowThreads()
        host: HostCache = HostCache(None, PAGE_BYTES, threads)

        def fail():
            raise AdapterError("gone")

        host.fetch("a", PAGE_BYTES, fail)
        threads.run_one()
        assert str(host.poll()["a"]) == "gone"
        assert host.nbytes == 0

    def test_a_read_that_nobody_wants_any_more_is_dropped(self):
        threads = SlowThreads()
        host: HostCache = HostCache(None, PAGE_BYTES, threads)
        host.fetch("a", PAGE_BYTES, lambda: self.adapter("a"))
        host.drop("a")
        threads.run_one()
        assert host.poll() == {}
        assert "a" not in host
        assert host.nbytes == 0

    def test_the_last_copy_stays_for_those_who_use_it(self):
        """Its name stands for another by now, and its directory holds that."""
        host = host_with({"a": 1}, max_cpu_loras=1)
        old = host.ask("a", 4, 4)
        host.manager.load("a", host.disk.write("/a", "other", 1), replace=True)
        new = host.ask("a", 4, 4)
        assert old.adapter_id != new.adapter_id
        for _ in range(20):
            host.let_all_come()
            host.step()
        assert not host.live
        assert not host.failed
        assert [one.split()[0] for one in host.cache.residents] == ["other"]

    def test_what_host_memory_has_is_copied_before_a_read_takes_its_place(self):
        host = host_with({"a": 1}, max_cpu_loras=1, scheduling_policy="lcfs")
        host.ask("a", 4, 4)
        host.manager.load("a", host.disk.write("/a", "other", 1), replace=True)
        host.ask("a", 4, 4)  # goes first, but has to be read
        for _ in range(20):
            host.let_all_come()
            host.step()
        assert not host.live
        assert not host.failed

    def test_small_adapters_do_not_starve_a_large_one_of_host_memory(self):
        names = [f"small-{n}" for n in range(200)]
        pages = {"large": 3, **dict.fromkeys(names, 2)}
        host = host_with(pages, 30, staging_pages=12, max_bytes=4 * PAGE_BYTES)
        host.manager.host.drop(host.manager.store["large"].version.id)
        coming, large, begun = iter(names), None, {}
        for step in range(60):
            if step == 3:
                large = host.ask("large", 1, 1)
            while len(host.scheduler.waiting) < 8:
                host.ask(next(coming), 1, 1)
            # Reads take two steps, the first one three: there always is one, half done.
            for index in reversed(range(len(host.threads.waiting))):
                future = host.threads.waiting[index][0]
                since = begun.setdefault(future, step)
                if step - since >= (2 if future is next(iter(begun)) else 1):
                    host.threads.run_one(index)
            for copy in host.copies:
                copy.done = True
            host.step()
        assert large not in host.live

    @pytest.mark.parametrize("left", ["/1", "/2", "/3"])
    def test_the_same_weights_in_three_directories(self, left):
        host = host_with({})
        for path in ("/1", "/2", "/3"):
            host.manager.load(path, host.disk.write(path, "same", 1))
        [version] = host.manager.store.versions
        host.manager.host.drop(version.id)
        for path in {"/1", "/2", "/3"} - {left}:
            host.disk.write(path, "other", 1)
        requests = [host.ask(name, 4, 2) for name in ("/1", "/2")]
        for _ in range(20):
            host.let_all_come()
            host.step()
        assert not host.failed
        assert not set(requests) & set(host.live)

    def test_a_read_that_failed_before_the_adapter_came_back(self):
        host = host_with({"a": 1})
        host.manager.host.drop(host.manager.store["a"].version.id)
        del host.disk.files[Path("/a")]
        request = host.ask("a", 4, 2)
        host.step()
        host.threads.run_one()
        content = host.manager.store["a"].version.id.split()[0]
        host.manager.load("a", host.disk.write("/new", content, 1), replace=True)
        for _ in range(10):
            host.let_all_come()
            host.step()
        assert not host.failed
        assert request not in host.live

    def test_a_copy_that_fails_ends_its_requests_only(self):
        host = host_with({"a": 1, "b": 1})
        stage = host.stage

        def fail(adapter):
            if adapter.id.startswith("a"):
                raise RuntimeError("out of memory")
            return stage(adapter)

        host.manager.loader._copy = fail
        bad, good = host.ask("a", 4, 2), host.ask("b", 4, 2)
        for _ in range(10):
            host.let_all_come()
            host.step()
        assert [request for request, _ in host.failed] == [bad]
        assert good not in host.live


class TestPins:
    def test_an_install_that_fails_leaves_nothing_behind(self):
        host = host_with({"a": 1})
        install, host.install = host.install, None
        with pytest.raises(TypeError):
            host.manager.pin("a")
        assert not host.cache.residents
        host.install = install
        host.manager.pin("a")
        assert host.cache.num_pinned == 1
        host.check()

    @pytest.mark.parametrize("what", ["unpin", "same content", "replace"])
    def test_nothing_comes_between_the_pool_and_the_name(self, what):
        """Another thread acts when the copy is there, just before the lock is taken."""
        host = host_with({"a": 1})
        stage = host.manager._stage

        def interrupted(version, adapter):
            staged = stage(version, adapter)
            if what == "unpin":
                host.manager.unpin("a")
            else:
                name = "a" if what == "replace" else "b"
                host.manager.load(name, "/a", replace=True)
            return staged

        host.manager._stage = interrupted
        host.manager.pin("a")
        assert host.manager.store["a"].pinned
        assert not host.cache.make_room(host.pool.capacity)
        host.manager.check()

    def test_no_room_leaves_no_copy(self):
        host = host_with({"a": 3}, 6)
        for _ in range(2):
            host.ask(None, 8, 5)  # three pages
        while host.pool.num_free:
            host.step()
        with pytest.raises(AdapterError, match="no 3 pages"):
            host.manager.pin("a")
        assert not host.manager.loader.has_copies


class TestUnload:
    def test_who_waits_for_it_may_load_others(self):
        """What waits for an unload runs without the lock: loading several takes threads."""
        host = host_with({"a": 1})
        request = host.ask("a", 4, 1)
        others = {name: host.disk.write(f"/{name}", name, 1) for name in "xyz"}
        gone = host.manager.unload("a")
        gone.add_done_callback(lambda _: host.manager.load_all(others))
        host.abort(request)
        assert gone.done()
        assert sorted(host.manager.store) == ["x", "y", "z"]


class TestEviction:
    def use(self, host: AdapterHost, name: str) -> None:
        """Serves a request for an adapter, to its end."""
        request = host.ask(name, 1, 1)
        while request in host.live:
            host.let_all_come()
            host.step()

    def resident(self, host: AdapterHost) -> set[str]:
        return {one.split()[0] for one in host.cache.residents}

    def test_what_only_the_disk_has_stays_longer(self):
        host = host_with({"a": 1, "b": 1, "c": 1}, max_bytes=60)
        for name in "abc":
            self.use(host, name)
        host.manager.host.drop(host.manager.store["a"].version.id)
        assert host.cache.make_room(host.pool.num_free + 1)
        assert self.resident(host) == {"a", "c"}

    def test_but_not_for_ever(self):
        host = host_with({"a": 1, "b": 1}, max_bytes=60)
        self.use(host, "a")
        host.manager.host.drop(host.manager.store["a"].version.id)
        for _ in range(20):
            self.use(host, "b")
            host.cache.evict(host.manager.store["b"].version.id)
            self.use(host, "b")
            assert host.cache.make_room(host.pool.num_free + 1)
            if "a" not in self.resident(host):
                return
        pytest.fail("an adapter that nobody uses stays for ever")

    def test_what_somebody_waits_for_goes_last(self):
        host = host_with({"a": 1, "b": 1})
        self.use(host, "a")
        self.use(host, "b")
        host.cache.prefetch([host.manager.store["a"].version.id])
        assert host.cache.make_room(host.pool.num_free + 1)
        assert self.resident(host) == {"a"}

# SPDX-License-Identifier: Apache-2.0
"""Thousands of adapters on one engine: more than the pool holds, and more than host memory may.

What an adapter answers is known by its tokens and their log-probabilities, which differ between any
two adapters, and is compared with what it answers when it is alone.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.adapters.errors import AdapterError
from slora_jax.core import FinishReason, RequestError, RequestOutput
from slora_jax.demo import BASE_MODEL
from slora_jax.hf_config import read_model_config
from tests.adapters.make import write_adapter

ADAPTERS = 2000
HOST_GIB = 0.1  # of 0.49 that all take
REQUESTS = 300
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=3)
PROMPT = "many adapters"
CONFIG = read_model_config(BASE_MODEL)


def write(path: Path, seed: int) -> Path:
    modules = ("q_proj", "v_proj")
    return write_adapter(path, CONFIG, seed=seed, rank=2, modules=modules)


def make_engine(**options) -> Engine:
    """Small, with few programs to compile."""
    sizes = {
        "num_pages": 200,
        "max_model_len": 64,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "decode_batch_sizes": (1, 16),
        "max_loras": 96,
        "max_lora_rank": 4,
    }
    return Engine(BASE_MODEL, **{**sizes, **options})


def answer(output: RequestOutput) -> np.ndarray:
    """Of each position the token, and how likely it and the next two candidates were."""
    assert output.finish_reason is FinishReason.LENGTH, output.stop_reason
    assert output.logprobs is not None
    best = ([at.logprob for at in one.values()][:3] for one in output.logprobs)
    return np.column_stack([output.token_ids, list(best)])


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-3)


def serve(engine: Engine, names: Sequence[str]) -> list[np.ndarray]:
    """All at once; after every step the books and the budgets are looked at."""
    ids = [engine.add_request(PROMPT, PARAMS, adapter=name) for name in names]
    answers: dict[str, np.ndarray] = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = answer(output)
        engine.check()
    return [answers[request_id] for request_id in ids]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> Engine:
    root = tmp_path_factory.mktemp("adapters")
    paths = {f"adapter-{n}": write(root / f"adapter-{n}", n) for n in range(ADAPTERS)}
    engine = make_engine(max_cpu_lora_gib=HOST_GIB)
    engine.load_adapters(paths)
    return engine


def zipf(rng: np.random.Generator) -> np.ndarray:
    weights = 1 / np.arange(1, ADAPTERS + 1)
    return rng.choice(rng.permutation(ADAPTERS), REQUESTS, p=weights / weights.sum())


def uniform(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, ADAPTERS, REQUESTS)


@pytest.mark.long
@pytest.mark.parametrize("trace", [zipf, uniform])
def test_everybody_gets_their_own_adapter(crowd, trace):
    names = [f"adapter-{n}" for n in trace(np.random.default_rng(0))]
    together = dict(zip(names, serve(crowd, names), strict=True))
    cache, host = crowd.adapters.cache, crowd.adapters.host
    assert len(crowd.adapters.store) == ADAPTERS
    assert len(cache.residents) < 100
    assert len(host) < ADAPTERS / 4
    assert host.nbytes <= HOST_GIB * 2**30
    assert cache.num_evictions > len(together) - 100
    for name, found in together.items():
        assert same(found, answer(crowd.generate([PROMPT], PARAMS, adapters=name)[0])), name
    # And it can be told from everybody else's.
    distinct = np.unique([found.round(2).ravel() for found in together.values()], axis=0)
    assert len(distinct) > 0.99 * len(together)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


class TestAtRunTime:
    """One engine; every test leaves it as it was."""

    @pytest.fixture(autouse=True)
    def clean(self, engine) -> Iterator[None]:
        yield
        list(engine.stream())
        for name in list(engine.adapters.store):
            assert engine.unload_adapter(name).done()
        engine.check()
        assert engine.pool.num_free == engine.pool.capacity
        assert engine.adapters.host.nbytes == 0

    def one(self, engine, name: str) -> np.ndarray:
        return answer(engine.generate([PROMPT], PARAMS, adapters=name)[0])

    def test_an_overwritten_directory_is_another_adapter(self, engine, tmp_path):
        engine.load_adapter("a", write(tmp_path, 1))
        old = self.one(engine, "a")
        write(tmp_path, 2)
        with pytest.raises(AdapterError, match="already been loaded"):
            engine.load_adapter("a", tmp_path)
        assert same(self.one(engine, "a"), old)
        engine.load_adapter("a", tmp_path, replace=True)
        engine.load_adapter("b", write(tmp_path / "elsewhere", 2))
        assert not same(self.one(engine, "a"), old)
        assert same(self.one(engine, "a"), self.one(engine, "b"))
        assert len(engine.adapters.store.versions) == 1  # the same content twice

    def test_requests_end_with_the_weights_they_began_with(self, engine, tmp_path):
        engine.load_adapter("a", write(tmp_path / "1", 1))
        old = self.one(engine, "a")
        before = engine.add_request(PROMPT, PARAMS, adapter="a")
        engine.step()
        engine.load_adapter("a", write(tmp_path / "2", 2), replace=True)
        after = engine.add_request(PROMPT, PARAMS, adapter="a")
        done = {o.request_id: answer(o) for o in engine.stream() if o.finished}
        assert same(done[before], old)
        assert not same(done[after], old)
        assert same(done[after], self.one(engine, "a"))

    def test_unloading_waits_for_requests(self, engine, tmp_path):
        engine.load_adapter("a", write(tmp_path, 1))
        alone = self.one(engine, "a")
        running = engine.add_request(PROMPT, PARAMS, adapter="a")
        engine.step()
        gone = engine.unload_adapter("a")
        with pytest.raises(RequestError, match="'a' does not exist"):
            engine.add_request(PROMPT, PARAMS, adapter="a")
        assert not gone.done()
        assert engine.adapters.host.nbytes > 0
        done = {o.request_id: answer(o) for o in engine.stream() if o.finished}
        assert same(done[running], alone)
        assert gone.done()
        assert engine.adapters.host.nbytes == 0
        assert not engine.adapters.cache.residents

    def test_an_adapter_that_is_neither_in_memory_nor_on_disk(self, tmp_path):
        """Its requests end with the reason; others do not notice; it may come back."""
        engine = make_engine(max_cpu_loras=1)
        engine.load_adapter("lost", write(tmp_path / "lost", 1))
        engine.load_adapter("here", write(tmp_path / "here", 2))
        alone = self.one(engine, "here")
        write(tmp_path / "lost", 3)
        outputs = engine.generate([PROMPT] * 2, PARAMS, adapters=["lost", "here"])
        assert outputs[0].finish_reason is FinishReason.REJECTED  # no fault of the request
        assert "the adapter is lost" in str(outputs[0].stop_reason)
        assert "files have changed" in str(outputs[0].stop_reason)
        assert same(answer(outputs[1]), alone)
        write(tmp_path / "lost", 1)
        assert self.one(engine, "lost").shape == alone.shape
        engine.check()

    def test_an_adapter_larger_than_host_memory(self, tmp_path):
        engine = make_engine(max_cpu_lora_gib=0.0001)
        with pytest.raises(AdapterError, match="raise max_cpu_lora_gib"):
            engine.load_adapter("a", write(tmp_path, 1))
        assert "a" not in engine.adapters.store

    def test_the_last_request_goes_while_its_adapter_comes(self, engine, tmp_path, monkeypatch):
        """Another thread aborts it just when the step has found that all there is to do is wait."""
        engine.load_adapter("a", write(tmp_path, 1))
        request_id = engine.add_request(PROMPT, PARAMS, adapter="a")
        gone = engine.unload_adapter("a")
        lock = engine._lock

        class AbortsWhenReleased:
            def __enter__(self):
                lock.acquire()

            def __exit__(self, *error):
                lock.release()
                engine.__dict__["_lock"] = lock
                engine.abort(request_id)

        monkeypatch.setattr(engine, "_lock", AbortsWhenReleased())
        assert engine.step() == []
        assert gone.done()
        assert not engine.has_unfinished

    def test_a_pinned_adapter_stays(self, engine, tmp_path):
        engine.load_adapter("pinned", write(tmp_path / "pinned", 0), pinned=True)
        engine.load_adapters({f"{n}": write(tmp_path / f"{n}", n) for n in range(1, 60)})
        assert "pinned" in engine.pool_usage()["adapters"]
        for _ in range(2):
            engine.generate([PROMPT] * 59, PARAMS, adapters=[f"{n}" for n in range(1, 60)])
            assert "pinned" in engine.pool_usage()["adapters"]
        evicted = engine.adapters.cache.num_evictions
        assert evicted > 50
        engine.unpin_adapter("pinned")
        engine.generate([PROMPT] * 59, PARAMS, adapters=[f"{n}" for n in range(1, 60)])
        assert "pinned" not in engine.pool_usage()["adapters"]
        engine.pin_adapter("pinned")
        assert "pinned" in engine.pool_usage()["adapters"]

    def test_pins_leave_room_for_others(self, tmp_path):
        engine = make_engine(
            num_pages=11, max_loras=2, max_num_seqs=1, decode_batch_sizes=(1,), max_model_len=48
        )
        engine.load_adapter("a", write(tmp_path / "a", 1))
        assert engine.adapters.store["a"].version.num_pages == 4
        engine.load_adapter("b", write(tmp_path / "b", 2))
        held = engine.add_request([1] * 31, PARAMS, adapter="b")
        with pytest.raises(AdapterError, match="would find no room beside the pinned"):
            engine.pin_adapter("a")
        engine.abort(held)
        engine.pin_adapter("a")
        with pytest.raises(RequestError, match="beside 4 of pinned adapters"):
            engine.add_request([1] * 33, PARAMS, adapter="b")
        with pytest.raises(AdapterError, match="must be left for the others"):
            engine.pin_adapter("b")
        assert engine.generate(["a"], PARAMS, adapters="a")[0].finished
        engine.unload_adapter("a")
        assert engine.generate(["a"], PARAMS, adapters="b")[0].finished

    def test_a_directory_of_adapters(self, engine, tmp_path):
        root = tmp_path / "root"
        write(root / "a", 1), write(root / "b", 2)
        engine.load_adapter("elsewhere", write(tmp_path / "elsewhere", 3))
        assert engine.rescan_adapters(root).loaded == ["a", "b"]
        assert engine.rescan_adapters(root) == type(engine.rescan_adapters(root))()
        before = self.one(engine, "a")
        write(root / "a", 4), write(root / "c", 5), write(root / "elsewhere", 6)
        (root / "broken").mkdir()
        (root / "broken" / "adapter_config.json").write_text("{")
        (root / "b" / "adapter_config.json").unlink()
        found = engine.rescan_adapters(root)
        assert (found.loaded, found.replaced, found.unloaded) == (["c"], ["a"], ["b"])
        assert "not valid JSON" in found.failed["broken"]
        assert "loaded from" in found.failed["elsewhere"]
        assert sorted(engine.adapters.store) == ["a", "c", "elsewhere"]
        assert not same(self.one(engine, "a"), before)
        with pytest.raises(AdapterError, match="no such directory"):
            engine.rescan_adapters(tmp_path / "nowhere")

    def test_a_rescan_keeps_pins_and_other_names(self, engine, tmp_path):
        root = tmp_path / "root"
        engine.load_adapter("prod", write(root / "sql", 1))
        assert engine.rescan_adapters(root).loaded == ["sql"]
        engine.pin_adapter("sql")
        write(root / "sql", 2)
        found = engine.rescan_adapters(root)
        assert (found.loaded, found.replaced, found.unloaded) == ([], ["sql"], [])
        assert sorted(engine.adapters.store) == ["prod", "sql"]
        assert engine.adapters.store["sql"].pinned
        assert "sql" in engine.pool_usage()["adapters"]


def test_threads(tmp_path):
    """Adapters come, change, are pinned and go in some threads, while requests come in others."""
    engine = make_engine(max_cpu_loras=3, lora_load_threads=2)
    contents = {}
    for seed in range(4):
        engine.load_adapter("probe", write(tmp_path / f"{seed}", seed), replace=True)
        alone = engine.generate([PROMPT], PARAMS, adapters="probe")[0]
        contents[engine.adapters.store["probe"].version.id] = answer(alone)
    assert len(contents) == 4
    asked: dict[str, str] = {}  # request -> version
    stop, errors = threading.Event(), []

    def repeatedly(act):
        def run():
            rng = np.random.default_rng(threading.get_ident() % 2**32)
            try:
                while not stop.is_set():
                    act(rng)
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def change(rng):
        name, path = f"{rng.integers(3)}", tmp_path / f"{rng.integers(4)}"
        try:
            if rng.random() < 0.3:
                engine.unload_adapter(name)
            elif rng.random() < 0.3:
                engine.pin_adapter(name)
            else:
                engine.load_adapter(name, path, replace=bool(rng.integers(2)))
        except AdapterError:
            pass  # it is not there, or there already

    def ask(rng):
        if len(engine._progress) > 30:
            return
        name = f"{rng.integers(3)}"
        with engine._lock:
            if name not in engine.adapters.store:
                return
            version = engine.adapters.store[name].version.id
            try:
                request_id = engine.add_request(PROMPT, PARAMS, adapter=name)
            except RequestError:
                return  # no room beside the pinned ones
            asked[request_id] = version
        if rng.random() < 0.1:
            engine.abort(request_id)
            del asked[request_id]

    threads = [*(repeatedly(change) for _ in range(2)), *(repeatedly(ask) for _ in range(2))]
    for thread in threads:
        thread.start()
    served = 0
    try:
        while served < 300 and not errors:
            for output in engine.step():
                if output.finished and output.request_id in asked:
                    served += 1
                    expected = contents[asked[output.request_id]]
                    assert same(answer(output), expected), "somebody else's adapter"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]
    for output in engine.stream():
        if output.finished:
            assert same(answer(output), contents[asked[output.request_id]])
    for name in list(engine.adapters.store):
        assert engine.unload_adapter(name).done()
    engine.check()
    assert engine.pool.num_free == engine.pool.capacity

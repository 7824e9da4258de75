# SPDX-License-Identifier: Apache-2.0
"""One process of several that serve one model: `python -m tests.sharding.process ARGUMENTS`.

It has as many CPU devices as XLA_FLAGS say. Process 0 prints what it served as JSON.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slora_jax.cluster import Cluster, Peers
from slora_jax.core import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.3, seed=3, max_tokens=6, ignore_eos=True, repetition_penalty=1.3
)


def options(**more: Any) -> dict[str, Any]:
    """Of an engine whose adapters come and go: two of seven fit."""
    return {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "decode_batch_sizes": (8,),
        "max_lora_rank": 24,
        "max_loras": 2,
        "compilation_cache_dir": None,
        **more,
    }


def serve(engine: Any, root: Path) -> list[list[int]]:
    """Tokens of requests for all adapters, one of them pinned, greedy and not."""
    adapters = {path.name: path for path in sorted((root / "adapters").iterdir())}
    engine.load_adapters(adapters)
    engine.pin_adapter("rank 1")
    names = [None, *adapters, "all", None]
    prompts = [list(range(3 + 2 * n, 9 + 4 * n)) for n in range(len(names))]
    outputs = engine.generate(prompts, GREEDY, adapters=names)
    engine.unload_adapter("ranks")
    outputs += engine.generate(prompts[:3], SAMPLED, adapters=[None, "all", "rank 1"])
    engine.check()
    return [output.token_ids for output in outputs]


def boom(*_: Any) -> Any:
    raise RuntimeError("boom")


def lost_adapters(engine: Any, root: Path) -> None:
    """Serves adapters of which the other process has one in memory and can read none again."""
    adapters = {path.name: path for path in sorted((root / "adapters").iterdir())}
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    prompts = [[1, 2, 3]] * (1 + len(adapters))
    outputs = engine.generate(prompts, GREEDY, adapters=[None, *adapters])
    engine.check()
    found = {str(one.adapter): [one.finish_reason, str(one.stop_reason)] for one in outputs}
    print(json.dumps({"found": found, "last": list(adapters)[-1]}))


MISTAKES = ("other pages", "no pages", "no model")


def mistake(root: Path, how: dict[str, Any], peers: Peers, what: str) -> None:
    """Process 1 is started with something else than process 0."""
    from slora_jax import Engine, Follower

    model = root / "model"
    if peers.process_id:
        how |= {"num_pages": {"other pages": 100, "no pages": None}.get(what, 128)}
        model = root / "nowhere" if what == "no model" else model
    else:
        how["num_pages"] = 128
    try:
        (Follower if peers.process_id else Engine)(model, peers=peers, **how)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


def main(root: Path, cluster: Cluster, partition: str, then: str) -> None:
    try:
        peers = cluster.join()
    except ValueError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    from slora_jax import AdapterError, Engine, Follower

    how = options(tensor_parallel_size=jax.device_count(), lora_partition=partition)
    if then in MISTAKES:
        mistake(root, how, peers, then)
        return
    if cluster.process_id:
        if then == "lose its adapters":
            how["max_cpu_loras"] = 1
        follower = Follower(root / "model", peers=peers, **how)
        if then == "lose":
            os.kill(os.getpid(), signal.SIGKILL)
        if then == "fail":
            follower._runner.execute = boom
        if then == "lose its adapters":
            read, reads = follower._reader.read, itertools.count()
            follower._reader.read = lambda path: boom() if next(reads) >= 7 else read(path)
        follower.run()
        print("ended")
        return
    engine = Engine(root / "model", peers=peers, **how)
    if then == "lose its adapters":
        lost_adapters(engine, root)
        return
    if then in ("lose", "fail"):
        try:
            for _ in range(1000):
                engine.generate([[1, 2, 3]], GREEDY)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        os._exit(0)  # JAX would wait for the one that is gone
    found = serve(engine, root)
    try:
        engine.load_adapter("elsewhere", "/nowhere")
    except AdapterError as error:
        refusal = str(error)
    pool = engine.runner.state.pool
    zero = all(not np.asarray(s.data)[:, 0].any() for s in pool.addressable_shards)
    print(json.dumps({"tokens": found, "refusal": refusal, "zero": zero}))


if __name__ == "__main__":
    folder, rank, processes, address, partition, then = sys.argv[1:]
    here = Cluster.of(address, int(processes), int(rank))
    assert here is not None
    main(Path(folder), here, partition, then)

# SPDX-License-Identifier: Apache-2.0
"""One process of several that serve one model: `python -m tests.sharding.process CASE RANK PORT`.

Each has as many CPU devices as XLA_FLAGS say. Process 0 prints what it served as JSON.
"""

import json
import sys
from pathlib import Path

import jax

from sharding.cluster import Cluster


def main(root: Path, rank: int, processes: int, port: int, partition: str) -> None:
    Cluster(f"127.0.0.1:{port}", processes, rank).join()
    from slora_jax import Engine, Follower, SamplingParams

    options = {
        "tensor_parallel_size": jax.device_count(),
        "lora_partition": partition,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "decode_batch_sizes": (8,),
        "max_lora_rank": 24,
        "max_loras": 2,  # fewer than there are: they come and go
        "compilation_cache_dir": None,
    }
    if rank:
        Follower(root / "model", **options).run()
        return
    engine = Engine(root / "model", **options)
    adapters = {path.name: path for path in sorted((root / "adapters").iterdir())}
    engine.load_adapters(adapters)
    engine.pin_adapter("rank 1")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    penalized = SamplingParams(
        temperature=0.8, seed=3, max_tokens=6, ignore_eos=True, repetition_penalty=1.3
    )
    names = [None, *adapters, "all", None]
    prompts = [list(range(3 + 2 * n, 9 + 4 * n)) for n in range(len(names))]
    outputs = engine.generate(prompts, params, adapters=names)
    outputs += engine.generate(prompts[:2], penalized, adapters=[None, "all"])
    engine.check()
    engine.unload_adapter("ranks")
    shards = engine.runner.state.pool.addressable_shards
    print(json.dumps({"tokens": [one.token_ids for one in outputs], "shards": len(shards)}))
    engine.close()


if __name__ == "__main__":
    folder, rank, processes, port, partition = sys.argv[1:]
    main(Path(folder), int(rank), int(processes), int(port), partition)

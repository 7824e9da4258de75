# SPDX-License-Identifier: Apache-2.0
"""Serves the same requests on one device and on several, and compares all that they give."""

from pathlib import Path

import jax
import numpy as np

from slora_jax import Engine, RequestOutput, SamplingParams
from slora_jax.adapters.pack import pack
from slora_jax.adapters.peft import read_adapter
from slora_jax.config import ModelConfig
from tests.sharding.models import write_adapters, write_model

PARAMS = SamplingParams(
    temperature=0, max_tokens=4, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
)
ROUNDING = {"rtol": 0, "atol": 2e-4}  # of log-probabilities in float32


class Case:
    """A model with its adapters, and what one device makes of the requests.

    Args:
        root: an empty directory.
        config: the model's shape.
    """

    def __init__(self, root: Path, config: ModelConfig):
        self.config = config
        self.model = write_model(root / "model", config)
        self.adapters = write_adapters(root / "adapters", config)
        rng = np.random.default_rng(1)
        self.requests = [
            (rng.integers(0, config.vocab_size, rng.integers(3, 30)).tolist(), name)
            for name in (None, *self.adapters, "all", None)
        ]
        self.expected = self.serve(self.engine())

    def engine(self, **options) -> Engine:
        sizes = {
            "num_pages": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 16,
            "decode_batch_sizes": (8,),
            "max_lora_rank": 24,
            "max_logprobs": -1,
            "compilation_cache_dir": None,
        }
        return Engine(self.model, adapters=self.adapters, **{**sizes, **options})

    def serve(self, engine: Engine) -> list[RequestOutput]:
        """All requests in one mixed batch; books and pool are looked at after every step."""
        ids = [engine.add_request(prompt, PARAMS, adapter=name) for prompt, name in self.requests]
        finished = {}
        while engine.has_unfinished:
            for output in engine.step():
                finished[output.request_id] = output
            engine.check()
        return [finished[one] for one in ids]

    def check_served(self, engine: Engine) -> None:
        """The same tokens, and every log-probability of every position within rounding."""
        vocab = self.config.vocab_size
        for output, expected in zip(self.serve(engine), self.expected, strict=True):
            assert output.token_ids == expected.token_ids
            np.testing.assert_allclose(_table(output, vocab), _table(expected, vocab), **ROUNDING)

    def check_pool(self, engine: Engine) -> None:
        """On every device: the reserved page is zero, the tables agree, adapters are where the
        books say, and hold that device's part."""
        runner, model = engine.runner, engine.setup.model
        state, layout = runner.state, engine.setup.layout
        for table in jax.tree.leaves(state[1:]):
            first, *others = (np.asarray(shard.data) for shard in table.addressable_shards)
            assert all(np.array_equal(first, other) for other in others)
        pools = [np.asarray(shard.data) for shard in state.pool.addressable_shards]
        assert len(pools) == model.size
        assert {pool.shape[2] for pool in pools} == {layout.page_elems}
        residents = engine.adapters.cache.residents
        assert residents
        paths = {
            engine.adapters.store[name].version.id: path for name, path in self.adapters.items()
        }
        for device, pool in enumerate(pools):
            assert not pool[:, 0].any()
            for adapter_id, resident in residents.items():
                adapter = read_adapter(paths[adapter_id], self.config)
                packed = pack(adapter, model, layout, pool.dtype, device)
                np.testing.assert_array_equal(
                    pool[:, list(resident.pages)], packed.pages.swapaxes(0, 1)
                )


def _table(output: RequestOutput, vocab: int) -> np.ndarray:
    positions = [*output.prompt_logprobs[1:], *output.logprobs]
    return np.array([[position[v].logprob for v in range(vocab)] for position in positions])

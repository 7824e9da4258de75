# SPDX-License-Identifier: Apache-2.0
"""An engine on two GPUs gives what it gives on one."""

import jax
import pytest

from slora_jax import Engine
from slora_jax.config import LAYER_MODULES
from tests.adapters.make import write_adapter
from tests.gpu.test_engine import ADAPTERS, CONFIG, check_backends
from tests.sharding.models import write_model


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("partition", ["no-comm", "slora"])
def test_logits_of_two_devices(tmp_path, backend, partition):
    model = write_model(tmp_path / "model", CONFIG)
    adapters = {
        name: write_adapter(
            tmp_path / name,
            CONFIG,
            rank=rank,
            alpha=2 * rank**0.5,
            modules=LAYER_MODULES,
            seed=rank,
            dtype="bfloat16",
            scale_std=0.15,
        )
        for name, rank in ADAPTERS.items()
    }
    one, two = (
        Engine(
            model,
            adapters=adapters,
            dtype="bfloat16",
            kernel_backend=backend,
            tensor_parallel_size=devices,
            lora_partition=partition,
            num_pages=512,
            max_num_seqs=8,
            max_num_batched_tokens=128,
            decode_batch_sizes=(8,),
            max_loras=4,
            max_logprobs=-1,
        )
        for devices in (1, 2)
    )
    check_backends(one, two)

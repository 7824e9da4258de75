# SPDX-License-Identifier: Apache-2.0
"""How many pages the pool has."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax.adapters.pack import most_pages
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.engine.packing import buckets_of
from slora_jax.engine.programs import StepShape, model_step
from slora_jax.engine.state import new_state
from slora_jax.model.inputs import StepInputs
from slora_jax.model.weights import LlamaWeights

logger = logging.getLogger(__name__)

_HOST_BYTES = 1 << 30  # of a pool on the CPU
_ADAPTERS = 16  # of the largest kind that a pool on the CPU has room for


def pool_pages(
    weights: LlamaWeights, config: ModelConfig, options: EngineConfig, layout: PageLayout
) -> int:
    """Pages of the pool, when the user names no number; the weights are on the device already.

    On an accelerator: what its memory has left beside the temporaries of the largest step. On a
    CPU: room for a full batch at full length and a few large adapters, up to 1 GiB.

    Raises:
        ValueError: not even one request of full length fits.
    """
    assert options.max_model_len is not None
    item = weights.embed_tokens.dtype.itemsize
    page_bytes = config.num_hidden_layers * layout.page_elems * item
    sequence = ceil_div(options.max_model_len, layout.page_size)
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats is None:
        adapter = most_pages(options.max_lora_rank, config, layout)
        wanted = options.max_num_seqs * sequence + _ADAPTERS * adapter
        pages = min(wanted, _HOST_BYTES // page_bytes)
    else:
        usable = int(stats["bytes_limit"] * options.gpu_memory_utilization)
        temporaries = _step_temporaries(weights, config, options, layout)
        pages = (usable - stats["bytes_in_use"] - temporaries) // page_bytes
    # Coarse, so that a few MB more or less of free memory compile to the same shapes.
    pages -= pages % (256 if pages >= 4096 else 16)
    needed = sequence + 1
    if pages < needed:
        remedy = "lower max_model_len, or set num_pages"
        if stats is not None:
            remedy = "lower max_model_len, max_num_seqs or max_num_batched_tokens, or raise "
            remedy += "gpu_memory_utilization"
        raise ValueError(
            f"the pool would have {pages} pages of {page_bytes} bytes; one request of "
            f"max_model_len {options.max_model_len} needs {needed}: {remedy}"
        )
    return pages


def _step_temporaries(
    weights: LlamaWeights, config: ModelConfig, options: EngineConfig, layout: PageLayout
) -> int:
    """Bytes that the largest step needs beside its arguments; the pool's size doesn't matter."""
    bucket = buckets_of(options).largest
    shape = StepShape(bucket, False, "all", options.max_lora_rank, config, layout)
    options = replace(options, num_pages=1024)
    dtype = weights.embed_tokens.dtype
    state = jax.eval_shape(lambda: new_state(config, options, layout, dtype))
    packed = jax.ShapeDtypeStruct((sum(StepInputs.sizes(bucket).values()),), jnp.int32)
    logger.info("compiling the largest step, to see how much memory it takes")
    memory = model_step.lower(weights, *state, packed, shape=shape).compile().memory_analysis()
    assert memory is not None, "this backend does not say what memory a program takes"
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

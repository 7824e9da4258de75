# SPDX-License-Identifier: Apache-2.0
"""How much memory pool, staging and host cache have."""

import logging
import os
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax.adapters.pack import most_pages
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.engine.packing import buckets_of
from slora_jax.engine.programs import StepShape, model_step, resolved_backend
from slora_jax.engine.sampler import TokenCounts
from slora_jax.engine.state import new_state
from slora_jax.model.inputs import StepInputs
from slora_jax.model.weights import LlamaWeights

logger = logging.getLogger(__name__)

_HOST_BYTES = 1 << 30  # of a pool on the CPU
_ADAPTERS = 16  # of the largest kind that a pool on the CPU has room for
_STAGING_PAGES = 16  # so that a few small adapters are on their way together
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of page-locked memory; XLA's default is 64


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
    page_bytes = _page_bytes(weights, config, layout)
    sequence = ceil_div(options.max_model_len, layout.page_size)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        adapter = most_pages(options.max_lora_rank, config, layout)
        wanted = options.max_num_seqs * sequence + _ADAPTERS * adapter
        pages = min(wanted, _HOST_BYTES // page_bytes)
    else:
        share = options.gpu_memory_utilization
        usable = _free_bytes(share) - _step_temporaries(weights, config, options, layout)
        pages = usable // page_bytes - 3 * staging_pages(config, options, layout)
    # Coarse, so that a few MB more or less of free memory compile to the same shapes.
    pages -= pages % (256 if pages >= 4096 else 16)
    needed = sequence + 1
    if pages < needed:
        remedy = (
            "lower max_model_len, or set num_pages"
            if on_cpu
            else "lower max_model_len, max_num_seqs or max_num_batched_tokens, or raise "
            "gpu_memory_utilization"
        )
        raise ValueError(
            f"the pool would have {pages} pages of {page_bytes} bytes; one request of "
            f"max_model_len {options.max_model_len} needs {needed}: {remedy}"
        )
    return pages


def check_pool_fits(
    num_pages: int, weights: LlamaWeights, config: ModelConfig, layout: PageLayout
) -> None:
    """Refuses a pool that the device, or the host, has no memory for, before it is made.

    Raises:
        ValueError: it says how many pages there is memory for.
    """
    page_bytes = _page_bytes(weights, config, layout)
    free = _free_bytes()
    if num_pages * page_bytes > free:
        raise ValueError(
            f"num_pages {num_pages} takes {num_pages * page_bytes / 2**30:.1f} GiB, "
            f"{page_bytes} bytes a page; there is memory for {free // page_bytes} pages at most"
        )


def staging_pages(config: ModelConfig, options: EngineConfig, layout: PageLayout) -> int:
    """Pages of adapters that may be on their way to the pool at once: one of the largest, at least.

    Memory is left for three times as many: for these, for those that are being installed, and for
    one that is being pinned.
    """
    return max(most_pages(options.max_lora_rank, config, layout), _STAGING_PAGES)


def host_bytes(options: EngineConfig) -> int:
    """Bytes of host memory for adapters.

    Raises:
        ValueError: `max_cpu_lora_gib` is more than XLA will page-lock.
    """
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    asked = options.max_cpu_lora_gib
    wanted = half if asked is None else int(asked * 2**30)
    if jax.default_backend() == "cpu":
        return wanted
    limit = int(os.environ.get(_PINNED_LIMIT, 64)) * 2**30
    if asked is not None and wanted > limit:
        raise ValueError(
            f"max_cpu_lora_gib is {asked:g}, but XLA page-locks {limit / 2**30:g} GiB at most: set "
            f"the environment variable {_PINNED_LIMIT}"
        )
    return min(wanted, limit * 9 // 10)  # the allocator cannot fill it to the brim


def _page_bytes(weights: LlamaWeights, config: ModelConfig, layout: PageLayout) -> int:
    """Bytes of a page in all layers."""
    return config.num_hidden_layers * layout.page_elems * weights.embed_tokens.dtype.itemsize


def _free_bytes(share: float = 1.0) -> int:
    """Memory that is left for the pool, if only a share of all may be used."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        return int(stats["bytes_limit"] * share) - stats["bytes_in_use"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _step_temporaries(
    weights: LlamaWeights, config: ModelConfig, options: EngineConfig, layout: PageLayout
) -> int:
    """Bytes that the engine needs beside weights and pool; the pool's size doesn't matter.

    The largest step's temporaries and results, and the penalties' counts, should a request ask.
    """
    bucket = buckets_of(options).largest
    backend = resolved_backend(options)
    shape = StepShape(bucket, False, "all", options.max_lora_rank, config, layout, backend)
    options = replace(options, num_pages=1024)
    dtype = weights.embed_tokens.dtype
    state = jax.eval_shape(lambda: new_state(config, options, layout, dtype))
    packed = jax.ShapeDtypeStruct((sum(StepInputs.sizes(bucket).values()),), jnp.int32)
    logger.info("compiling the largest step, to see how much memory it takes")
    memory = model_step.lower(weights, *state, packed, shape=shape).compile().memory_analysis()
    assert memory is not None, "this backend does not say what memory a program takes"
    step = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = jax.eval_shape(lambda: TokenCounts.zeros(options.max_num_seqs, config.vocab_size))
    return step + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((counts, state[1:])))

# SPDX-License-Identifier: Apache-2.0
"""How much memory pool, staging and host cache have."""

import logging
import os
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.layout import ceil_div
from slora_jax.adapters.pack import most_pages
from slora_jax.config import EngineConfig
from slora_jax.engine.packing import buckets_of
from slora_jax.engine.programs import model_step, step_shape
from slora_jax.engine.sampler import TokenCounts
from slora_jax.engine.setup import Setup
from slora_jax.engine.state import new_state, state_shardings
from slora_jax.model.inputs import StepInputs
from slora_jax.model.weights import LlamaWeights

logger = logging.getLogger(__name__)

_HOST_BYTES = 1 << 30  # of a pool on the CPU
_ADAPTERS = 16  # of the largest kind that a pool on the CPU has room for
_STAGING_PAGES = 16  # so that a few small adapters are on their way together
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # of page-locked memory; XLA's default is 64


def pool_pages(weights: LlamaWeights, setup: Setup) -> int:
    """Pages of the pool, when the user names no number; the weights are on the devices already.

    On accelerators: what the memory of the fullest has left beside the temporaries of the largest
    step. On a CPU: room for a full batch at full length and a few large adapters, up to 1 GiB.

    Raises:
        ValueError: not even one request of full length fits.
    """
    options, layout = setup.options, setup.layout
    assert options.max_model_len is not None
    page_bytes = _page_bytes(setup)
    sequence = ceil_div(options.max_model_len, layout.page_size)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        adapter = most_pages(options.max_lora_rank, setup.model, layout)
        wanted = options.max_num_seqs * sequence + _ADAPTERS * adapter
        pages = min(wanted, _HOST_BYTES // (page_bytes * setup.model.size))
    else:
        share = options.gpu_memory_utilization
        usable = _free_bytes(setup, share) - _step_temporaries(weights, setup)
        pages = usable // page_bytes - 3 * staging_pages(setup)
    pages = setup.placement.least(pages)
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


def check_pool_fits(num_pages: int, setup: Setup) -> None:
    """Refuses a pool that the device, or the host, has no memory for, before it is made.

    Raises:
        ValueError: it says how many pages there is memory for.
    """
    page_bytes = _page_bytes(setup)
    free = _free_bytes(setup)
    if num_pages * page_bytes > free:
        raise ValueError(
            f"num_pages {num_pages} takes {num_pages * page_bytes / 2**30:.1f} GiB, "
            f"{page_bytes} bytes a page; there is memory for {free // page_bytes} pages at most"
        )


def staging_pages(setup: Setup) -> int:
    """Pages of adapters that may be on their way to the pool at once: one of the largest, at least.

    Memory is left for three times as many: for these, for those that are being installed, and for
    one that is being pinned.
    """
    largest = most_pages(setup.options.max_lora_rank, setup.model, setup.layout)
    return max(largest, _STAGING_PAGES)


def host_bytes(options: EngineConfig, processes: int = 1) -> int:
    """Bytes of host memory for adapters.

    Args:
        options: the engine's.
        processes: of the engine, on this machine.

    Raises:
        ValueError: `max_cpu_lora_gib` is more than XLA will page-lock.
    """
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // processes
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


def _page_bytes(setup: Setup) -> int:
    """Bytes that a page takes on each device, in all layers."""
    return setup.config.num_hidden_layers * setup.layout.page_elems * setup.dtype.itemsize


def _free_bytes(setup: Setup, share: float = 1.0) -> int:
    """Memory of each device that is left for the pool, if only a share of all may be used."""
    stats = [device.memory_stats() for device in setup.placement.mesh.local_devices]
    known = [int(one["bytes_limit"] * share) - one["bytes_in_use"] for one in stats if one]
    if known:
        return min(known)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(stats)


def _step_temporaries(weights: LlamaWeights, setup: Setup) -> int:
    """Bytes of each device that the engine needs beside weights and pool, whatever the pool's size.

    The largest step's temporaries and results, and the penalties' counts, should a request ask.
    """
    bucket = buckets_of(setup.options).largest
    shape = step_shape(setup, bucket, lora_mode="all")
    options = replace(setup.options, num_pages=1024)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: new_state(setup.model, options, setup.layout, setup.dtype)),
        state_shardings(setup.placement),
    )
    packed = jax.ShapeDtypeStruct(
        (sum(StepInputs.sizes(bucket).values()),), jnp.int32, sharding=setup.placement.sharding()
    )
    logger.info("compiling the largest step, to see how much memory it takes")
    memory = model_step.lower(weights, *state, packed, shape=shape).compile().memory_analysis()
    assert memory is not None, "this backend does not say what memory a program takes"
    step = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    slots, vocab = options.max_num_seqs, setup.config.vocab_size
    counts = jax.eval_shape(lambda: TokenCounts.zeros(slots, vocab))
    return step + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((counts, state[1:])))

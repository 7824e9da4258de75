# SPDX-License-Identifier: Apache-2.0
"""What every process of an engine does first: weights and pool onto its devices."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from slora_jax.adapters.reader import AdapterReader
from slora_jax.cluster import Peers
from slora_jax.config import EngineConfig
from slora_jax.engine.agreement import facts_of, processes_here
from slora_jax.engine.setup import Setup, keep_compiled_programs, set_up
from slora_jax.engine.sizing import check_pool_fits, host_bytes, pool_pages
from slora_jax.hf_config import read_model_config
from slora_jax.model.loader import dummy_weights, load_weights
from slora_jax.model.weights import LlamaWeights

logger = logging.getLogger(__name__)


def load_model(
    model_dir: Path, options: EngineConfig, peers: Peers, *, progress: bool
) -> tuple[LlamaWeights, Setup]:
    """Loads the weights and decides how large the pool is to be.

    Raises:
        ValueError: the model or an option is not supported, or there is no room; or another process
            of the engine says so.
    """
    setup = peers.together(lambda: set_up(options, read_model_config(model_dir)), facts_of)
    keep_compiled_programs(setup.options.compilation_cache_dir)
    how = setup.model, setup.dtype, setup.placement

    def load() -> LlamaWeights:
        if setup.options.load_format == "dummy":
            return dummy_weights(*how, setup.options.seed)
        return load_weights(model_dir, *how, progress=progress)

    weights = peers.together(load, lambda loaded: {})
    num_pages = setup.options.num_pages
    if num_pages is None:
        num_pages = pool_pages(weights, setup)

    def check() -> None:
        check_pool_fits(num_pages, setup)
        host_bytes(setup.options)

    peers.together(check, lambda _: {})
    options = replace(setup.options, num_pages=num_pages)
    _warn_of_small_pool(options)
    if options.max_cpu_lora_gib is None:
        share = host_bytes(options, processes_here(peers)) / 2**30
        options = replace(options, max_cpu_lora_gib=share)
    return weights, replace(setup, options=options)


def _warn_of_small_pool(options: EngineConfig) -> None:
    assert options.num_pages is not None
    assert options.max_model_len is not None
    tokens = (options.num_pages - 1) * options.page_size
    if tokens < options.max_model_len:
        logger.warning(
            "the pool's %d pages hold %d tokens, adapters included, fewer than max_model_len %d: "
            "requests end sooner; raise num_pages or gpu_memory_utilization",
            options.num_pages - 1,
            tokens,
            options.max_model_len,
        )


def adapter_reader(setup: Setup, model_dir: Path) -> AdapterReader:
    """Reads adapters for what this process's devices hold."""
    options = setup.options
    assert options.num_pages is not None
    return AdapterReader(
        setup.model,
        setup.layout,
        np.dtype(setup.dtype),
        max_rank=options.max_lora_rank,
        capacity=options.num_pages - 1,
        model_dir=None if options.load_format == "dummy" else model_dir,
        placement=setup.placement,
        time_limit_s=options.lora_load_timeout_s,
        memory_kind="device" if jax.default_backend() == "cpu" else "pinned_host",
    )

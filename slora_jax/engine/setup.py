# SPDX-License-Identifier: Apache-2.0
"""What an engine needs to know before it takes any memory."""

import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend, choose_backend
from pallas_kernels.layout import PageLayout
from sharding import LoraPartition, Placement, tensor_mesh
from slora_jax.config import EngineConfig, ModelConfig
from slora_jax.model.shards import ModelShards

logger = logging.getLogger(__name__)

_FASTER: LoraPartition = "no-comm"  # than "slora": benchmarks/tensor_parallel.py


@dataclass(frozen=True, slots=True)
class Setup:
    """What all of an engine agrees on.

    Attributes:
        options: with nothing left open but `num_pages`.
        model: what each device holds.
        layout: of the pages on each device.
        placement: the devices.
        backend: of the kernels.
    """

    options: EngineConfig
    model: ModelShards
    layout: PageLayout
    placement: Placement
    backend: Backend

    @property
    def config(self) -> ModelConfig:
        """The whole model's."""
        return self.model.config

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights, KV cache and adapters."""
        return jnp.dtype(self.options.dtype)


def set_up(options: EngineConfig, config: ModelConfig) -> Setup:
    """Fills in what depends on the model and the devices.

    Raises:
        ValueError: the model, or the devices, don't go with an option.
    """
    if options.dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        options = replace(options, dtype="float32" if on_cpu else config.torch_dtype)
    longest = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"max_model_len is {options.max_model_len}; the model's max_position_embeddings is "
            f"{longest}"
        )
    size = options.tensor_parallel_size
    partition = _FASTER if options.lora_partition == "auto" else options.lora_partition
    model = ModelShards(config, size, partition)
    placement = Placement(tensor_mesh(size))
    layout = model.layout(options.page_size)
    backend = choose_backend(
        options.kernel_backend, dtype=options.dtype, layout=layout, widths=model.widths
    )
    options = replace(
        options,
        max_model_len=options.max_model_len or longest,
        kernel_backend=backend,
        lora_partition=partition,
    )
    return Setup(options, model, layout, placement, backend)


def keep_compiled_programs(directory: str | None) -> None:
    """Names JAX's persistent cache, unless the user has: a step takes seconds to compile.

    Raises:
        ValueError: it belongs to another user, whose programs would run here.
    """
    if directory is not None and jax.config.jax_compilation_cache_dir is None:
        path = Path(directory).expanduser()
        _check_own(path)
        jax.config.update("jax_compilation_cache_dir", str(path))


def _check_own(path: Path) -> None:
    """Makes a directory that only this user may enter, or looks at the one that is there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError:
        return  # JAX will say so, and go on without
    if found.st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"compilation_cache_dir {path} belongs to another user (uid {found.st_uid}), whose "
            "programs would run here: give one of your own, or None"
        )
    if found.st_mode & stat.S_IWOTH:
        logger.warning("any user may put programs into %s, which run here: chmod o-w it", path)

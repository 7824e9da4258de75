# SPDX-License-Identifier: Apache-2.0
"""What an engine needs to know before it takes any memory."""

from dataclasses import replace
from pathlib import Path

import jax

from pallas_kernels.backend import choose_backend
from pallas_kernels.layout import PageLayout
from slora_jax.config import LAYER_MODULES, EngineConfig, ModelConfig


def resolve(options: EngineConfig, config: ModelConfig) -> EngineConfig:
    """Fills in what depends on the model and the device."""
    if options.dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        options = replace(options, dtype="float32" if on_cpu else config.torch_dtype)
    longest = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"max_model_len is {options.max_model_len}; the model's max_position_embeddings is "
            f"{longest}"
        )
    backend = choose_backend(
        options.kernel_backend,
        dtype=options.dtype,
        layout=page_layout(config, options),
        widths=[width for name in LAYER_MODULES for width in config.projection_shape(name)],
    )
    return replace(options, max_model_len=options.max_model_len or longest, kernel_backend=backend)


def page_layout(config: ModelConfig, options: EngineConfig) -> PageLayout:
    return PageLayout(config.num_key_value_heads, config.head_dim, options.page_size)


def keep_compiled_programs(directory: str | None) -> None:
    """Names JAX's persistent cache, unless the user has: a step takes seconds to compile."""
    if directory is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))

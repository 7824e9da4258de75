# SPDX-License-Identifier: Apache-2.0
"""How many pages the pool has."""

import jax
import numpy as np

from pallas_kernels.layout import PageLayout, ceil_div
from slora_jax.adapters.pack import most_pages
from slora_jax.config import EngineConfig, ModelConfig

_HOST_BYTES = 1 << 30  # of a pool on the CPU
_ADAPTERS = 16  # of the largest kind that a pool on the CPU has room for


def pool_pages(
    config: ModelConfig,
    options: EngineConfig,
    layout: PageLayout,
    dtype: np.dtype,
    temporaries: int,
) -> int:
    """Pages of the pool, when the user names no number.

    On an accelerator: what is left of its memory after the weights, which are there already, and
    the `temporaries` of the largest step, in bytes. On a CPU: room for a full batch at full length
    and a few large adapters, up to 1 GiB.

    Raises:
        ValueError: not even one request of full length and one adapter fit.
    """
    assert options.max_model_len is not None
    page_bytes = config.num_hidden_layers * layout.page_elems * dtype.itemsize
    sequence = ceil_div(options.max_model_len, layout.page_size)
    adapter = most_pages(options.max_lora_rank, config, layout)
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats is None:
        wanted = options.max_num_seqs * sequence + _ADAPTERS * adapter
        pages = min(wanted, _HOST_BYTES // page_bytes)
    else:
        usable = int(stats["bytes_limit"] * options.gpu_memory_utilization)
        pages = (usable - stats["bytes_in_use"] - temporaries) // page_bytes
    # Coarse, so that a few MB more or less of free memory compile to the same shapes.
    pages -= pages % (256 if pages >= 4096 else 16)
    needed = sequence + 1
    if pages < needed:
        raise ValueError(
            f"the pool would have {pages} pages of {page_bytes} bytes; one request of "
            f"max_model_len {options.max_model_len} needs {needed}: lower max_model_len or "
            "max_num_batched_tokens, or raise gpu_memory_utilization"
        )
    return pages

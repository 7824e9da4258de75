# SPDX-License-Identifier: Apache-2.0
"""What each device of a mesh holds of a model and of its adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pallas_kernels.layout import TILE, PageLayout
from sharding import LoraPartition, Split
from sharding.specs import lora_specs, sharded_axis
from slora_jax.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelShards:
    """A model dealt out to `size` devices. Static; with one device nothing is padded.

    Attributes:
        config: of the whole model.
        size: devices of the tensor axis.
        partition: of its adapters.

    Raises:
        ValueError: the heads, or under "slora" the hidden size, can't be dealt out.
    """

    config: ModelConfig
    size: int = 1
    partition: LoraPartition = "no-comm"

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        good = [
            n for n in range(1, heads + 1) if not heads % n and not (kv_heads % n and n % kv_heads)
        ]
        if size not in good:
            raise ValueError(
                f"tensor_parallel_size {size} does not divide the model's {heads} query heads and "
                f"{kv_heads} key/value heads among the devices: it can be one of "
                f"{', '.join(map(str, good))}"
            )
        if self.partition == "slora" and config.hidden_size % size:
            raise ValueError(
                f"lora_partition is 'slora', which deals out hidden_size {config.hidden_size}, but "
                f"tensor_parallel_size {size} does not divide it: use 'no-comm'"
            )

    @property
    def local(self) -> ModelConfig:
        """The shape of what one device holds, as a model of its own."""
        return _local(self.config, self.size)

    @property
    def in_halves(self) -> bool:
        """Whether A and B of an adapter's module are found apart; see `sharding.lora`."""
        return self.partition == "slora" and self.size > 1

    def layout(self, page_size: int) -> PageLayout:
        """Of the pages on one device."""
        return PageLayout(self.local.num_key_value_heads, self.local.head_dim, page_size)

    def splits(self, module: str) -> tuple[Split, Split]:
        """How a projection's inputs and outputs are dealt out, if they are."""
        config, size = self.config, self.size
        multiple = TILE if size > 1 else 1  # what the kernels want
        hidden = Split.padded(config.hidden_size, size)
        q = Split.heads(config.num_attention_heads, config.head_dim, size)
        kv = Split.heads(config.num_key_value_heads, config.head_dim, size)
        ffn = Split.padded(config.intermediate_size, size, multiple)
        vocab = Split.padded(config.vocab_size, size, multiple)
        return {
            "q_proj": (hidden, q),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (q, hidden),
            "gate_proj": (hidden, ffn),
            "up_proj": (hidden, ffn),
            "down_proj": (ffn, hidden),
            "embed_tokens": (vocab, hidden),
            "lm_head": (hidden, vocab),
        }[module]

    def lora_splits(self, module: str) -> tuple[Split | None, Split | None, bool]:
        """How an adapter's matrices are dealt out, by the table `sharding.specs.LORA`.

        Returns:
            The split of A's inputs, that of B's outputs (None: every device has them all), and
            whether A's ranks are dealt out, slab by slab in turn.
        """
        if self.size == 1:
            return None, None, False
        inputs, outputs = self.splits(module)
        a, b = map(sharded_axis, lora_specs(self.partition, module))
        return inputs if a == 1 else None, outputs if b == 0 else None, a == 0

    @property
    def widths(self) -> Sequence[int]:
        """Inputs and outputs of all matrices that a device multiplies by."""
        local, config = self.local, self.config
        widths = [config.hidden_size, local.num_attention_heads * local.head_dim]
        widths += [local.num_key_value_heads * local.head_dim, local.intermediate_size]
        if self.in_halves:
            widths.append(config.hidden_size // self.size)
        return widths


@lru_cache
def _local(config: ModelConfig, size: int) -> ModelConfig:
    if size == 1:
        return config
    shards = ModelShards(config, size)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=max(config.num_key_value_heads // size, 1),
        intermediate_size=shards.splits("down_proj")[0].width,
        vocab_size=shards.splits("lm_head")[1].width,
    )

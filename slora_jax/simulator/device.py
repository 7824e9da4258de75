# SPDX-License-Identifier: Apache-2.0
"""Devices as the simulator knows them: what steps cost, and how much memory there is."""

from dataclasses import dataclass

from slora_jax.scheduling.cost_model import StepCost

_HALF = 2  # bytes of a float16
_PCIE = 12e9  # bytes/s from pageable host memory, about what PCIe 4 gives
_COPIES = 2  # S-LoRA moves every byte of an adapter twice (`load_lora_A` and `load_lora_B`)


@dataclass(frozen=True, slots=True)
class Gpu:
    """From the data sheet: memory bandwidth in bytes/s, dense float16 FLOP/s."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama with full attention: parameters, layers, width; adapters on q, k, v and o."""

    parameters: float
    layers: int
    hidden: int

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values, in all layers."""
        return 2 * self.layers * self.hidden * _HALF

    @property
    def rank_bytes(self) -> int:
        """Of one rank of an adapter: A and B of four projections, in all layers."""
        return 8 * self.layers * self.hidden * _HALF

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of KV cache that take as much memory as a rank."""
        return self.rank_bytes // self.token_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """What was fitted, as factors on the data sheet's times.

    Attributes:
        base: of weights, KV cache and matrix products.
        lora: a step with any adapter takes so much more, as a share of reading the weights.
        rank: of reading the adapters in the step.
    """

    base: float
    lora: float
    rank: float


@dataclass(frozen=True, slots=True)
class Server:
    """A device with a model, as the scheduler meets it.

    Attributes:
        cost: of its steps.
        pool_tokens: tokens of KV cache that fit when no adapter is there.
        tokens_per_rank: how many of them a rank of an adapter displaces.
        max_num_seqs, max_num_batched_tokens, page_size: as in `EngineConfig`.
    """

    cost: StepCost
    pool_tokens: int
    tokens_per_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int = 16

    @property
    def num_pages(self) -> int:
        return self.pool_tokens // self.page_size + 1  # and the reserved one

    def adapter_pages(self, rank: int) -> int:
        return -(-rank * self.tokens_per_rank // self.page_size)


def step_cost(gpu: Gpu, model: ModelShape, fit: Fit) -> StepCost:
    """The cost of a step: each part by the resource that bounds it, times what was fitted."""
    weights = model.parameters * _HALF / gpu.bandwidth
    return StepCost(
        step_s=fit.base * weights,
        token_s=fit.base * 2 * model.parameters / gpu.flops,
        context_s=fit.base * model.token_bytes / gpu.bandwidth,
        lora_s=fit.lora * weights,
        rank_s=fit.rank * model.rank_bytes / gpu.bandwidth,
        install_rank_s=_COPIES * model.rank_bytes / _PCIE,
    )

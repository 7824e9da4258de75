# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's settings (sections 7.1 and 7.2): GPUs, models, ranks and default workloads.

`fitted.json` has the factors of each device; `benchmarks/fit_cost_model.py` makes it from the
paper's throughputs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slora_jax.simulator.device import Fit, Gpu, ModelShape, Server, step_cost
from slora_jax.simulator.workloads import Workload

FITTED = Path(__file__).parent / "fitted.json"

A10G = Gpu(bandwidth=600e9, flops=70e12)
A100_40 = Gpu(bandwidth=1555e9, flops=312e12)
A100_80 = Gpu(bandwidth=2039e9, flops=312e12)
LLAMA_7B = ModelShape(parameters=6.74e9, layers=32, hidden=4096)
LLAMA_13B = ModelShape(parameters=13.02e9, layers=40, hidden=5120)

S1, S2, S4 = (8,), (64, 32, 16, 8), (64, 32, 16)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU with a model on it, and the limits that its batches have.

    Attributes:
        gpu, model: of the data sheets.
        pool_tokens: S-LoRA's `--num-token` there.
        max_num_seqs, max_num_batched_tokens: this project's.
    """

    gpu: Gpu
    model: ModelShape
    pool_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def server(self, fit: Fit) -> Server:
        cost = step_cost(self.gpu, self.model, fit)
        tokens_per_rank = self.model.tokens_per_rank
        rows, tokens = self.max_num_seqs, self.max_num_batched_tokens
        return Server(cost, self.pool_tokens, tokens_per_rank, rows, tokens)


DEVICES: Mapping[str, Device] = {
    "a10g-7b": Device(A10G, LLAMA_7B, 14_500, 128, 512),
    "a100-40-13b": Device(A100_40, LLAMA_13B, 14_000, 128, 512),
    "a100-80-7b": Device(A100_80, LLAMA_7B, 125_000, 512, 1024),
    "a100-80-13b": Device(A100_80, LLAMA_13B, 65_000, 256, 1024),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A device, its adapters' ranks, and a workload."""

    device: str
    ranks: tuple[int, ...]
    workload: Workload

    def server(self) -> Server:
        """The device with what was fitted to it."""
        return DEVICES[self.device].server(fitted()[self.device])


PRESETS: Mapping[str, Preset] = {
    "a10g-s1": Preset("a10g-7b", S1, Workload(adapters=200, rate=2, seconds=300)),
    "a10g-s2": Preset("a10g-7b", S2, Workload(adapters=200, rate=2, seconds=300)),
    "a100-40-s4": Preset("a100-40-13b", S4, Workload(adapters=200, rate=2, seconds=300)),
    "a100-80-s2": Preset("a100-80-7b", S2, Workload(adapters=200, rate=10, seconds=300)),
    "a100-80-s4": Preset("a100-80-13b", S4, Workload(adapters=400, rate=6, seconds=300)),
}


@cache
def fitted() -> dict[str, Fit]:
    """The factors of every device."""
    found = json.loads(FITTED.read_text())
    return {name: Fit(**entry["fit"]) for name, entry in found.items()}

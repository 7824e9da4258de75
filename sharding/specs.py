# SPDX-License-Identifier: Apache-2.0
"""Who holds what, as tables. The letters are those of `pallas_kernels/layout.py`.

A projection is *column-parallel* if its outputs are dealt out, *row-parallel* if its inputs are:
then every device has a part of the sum, and an all-reduce adds them up (Megatron-LM, section 3).
Attention and MLP are each a column-parallel projection and a row-parallel one.
"""

from typing import Literal

from jax.sharding import PartitionSpec as P

TENSOR = "tensor"  # the axis of a mesh along which one copy of the model is dealt out

WEIGHTS = {  # by the last names of a path in the weights' tree
    "embed_tokens": P(TENSOR, None),  # V E
    "input_norm": P(None),  # E
    "qkv.weight": P(TENSOR, None),  # O E: each device's heads of q, k and v together
    "qkv.bias": P(TENSOR),
    "o.weight": P(None, TENSOR),  # E I
    "o.bias": P(TENSOR),  # whole on the first device, zeros on the others: they are added up
    "post_attention_norm": P(None),
    "gate_up.weight": P(TENSOR, None),  # 2F E: each device's part of gate and of up together
    "gate_up.bias": P(TENSOR),
    "down.weight": P(None, TENSOR),  # E F
    "down.bias": P(TENSOR),  # as of o
    "norm": P(None),
    "lm_head.weight": P(TENSOR, None),  # V E
}

POOL = P(None, None, TENSOR)  # L P elems: each device's part of every page, so that ids agree
PAGES = P(None, None, TENSOR)  # n L elems: pages on their way into the pool
REPLICATED = P()  # page table, last tokens, LoRA tables, a step's inputs, logits

ROW_PARALLEL = frozenset({"o_proj", "down_proj", "embed_tokens"})  # all others: column-parallel

LoraPartition = Literal["slora", "no-comm"]
LORA: dict[LoraPartition, dict[str, tuple[P, P]]] = {
    # A is R I, B is O R.
    "slora": {  # the paper's figure 4: every weight is held once
        "column": (P(TENSOR, None), P(TENSOR, None)),  # h is all-gathered
        "row": (P(None, TENSOR), P(TENSOR, None)),  # h is all-reduced; the base gathers y
    },
    "no-comm": {  # no collective but the base's
        "column": (P(None, None), P(TENSOR, None)),
        "row": (P(None, TENSOR), P(None, None)),  # sum of (h Bᵀ) = (sum of h) Bᵀ
    },
}


def weight_spec(path: str) -> P:
    """The spec of a weight by its path, as "layers.3.qkv.weight"."""
    name, _, last = path.rpartition(".")
    parent = name.rpartition(".")[2]
    return WEIGHTS[f"{parent}.{last}" if last in ("weight", "bias") else last]


def lora_specs(partition: LoraPartition, module: str) -> tuple[P, P]:
    """The specs of a module's A and B."""
    return LORA[partition]["row" if module in ROW_PARALLEL else "column"]


def sharded_axis(spec: P) -> int | None:
    """The axis that is dealt out, if one is."""
    return next((axis for axis, name in enumerate(spec) if name == TENSOR), None)

# SPDX-License-Identifier: Apache-2.0
"""What a model is and how the engine is set up: frozen, validated, without JAX."""

from dataclasses import dataclass
from typing import Literal, cast

from slora_jax.scheduling.options import SchedulingOptions

LAYER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OUTER_MODULES = ("embed_tokens", "lm_head")  # the projections that belong to no layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's stretched rotary embedding (`rope_scaling` of type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_position_embeddings < 1:
            raise ValueError("factor and original_max_position_embeddings must be positive")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be positive and less than "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama; field names are those of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    torch_dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        for token in self.eos_token_ids:  # one past the vocabulary is never sampled: harmless
            if token < 0:
                raise ValueError(f"eos_token_id {token} must not be negative")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")

    def projection_shape(self, module: str) -> tuple[int, int]:
        """`(inputs, outputs)` of a linear layer, the embedding or the head."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, q),
            "k_proj": (self.hidden_size, kv),
            "v_proj": (self.hidden_size, kv),
            "o_proj": (q, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
            "embed_tokens": (self.vocab_size, self.hidden_size),
            "lm_head": (self.hidden_size, self.vocab_size),
        }[module]


MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(SchedulingOptions):
    """How the engine is set up, beside the scheduling. Names are vLLM's where it has one.

    Attributes:
        dtype: of weights, KV cache and adapters. "auto": the checkpoint's on an accelerator,
            float32 on CPU, where XLA computes bfloat16 by way of float32 anyway.
        load_format: "dummy" makes random weights of the true shape on the device.
        kernel_backend: "mosaic" (Pallas Mosaic GPU, NVIDIA Hopper), "triton" (NVIDIA since
            Ampere, with the extra of that name) or "xla" (everywhere); "auto": the first of
            them that can run. The environment variable SLORA_BACKEND overrides it.
        tensor_parallel_size: devices that the model is dealt out to, of all that JAX sees.
        lora_partition: how adapters are dealt out to them. "slora": each weight once, as published,
            with collectives of its own; "no-comm": some weights on every device, and no collective
            but the base model's. "auto": no-comm, the faster one.
        page_size: S, tokens of a KV page.
        num_pages: pages of the pool, the reserved one included; None: what the device has room for.
        gpu_memory_utilization: share of the device's memory that weights and pool may take.
        max_model_len: most tokens of a request; None: the model's `max_position_embeddings`.
        max_num_seqs: most requests in a batch; None: 64, or fewer if a step has fewer tokens.
        max_num_batched_tokens: most tokens of a step; longer prompts are computed in chunks. None:
            512, or `max_num_seqs` if that is more.
        decode_batch_sizes: sizes that decode steps are compiled for and padded to, the last one
            `max_num_seqs`; None: powers of two. Fewer compile faster.
        max_loras: most adapters in the pool at once.
        max_lora_rank: largest rank that an adapter may have.
        max_cpu_loras: most adapters in host memory at once; one that was dropped is read again from
            its directory when a request needs it. None: as many as `max_cpu_lora_gib` holds.
        max_cpu_lora_gib: GiB of host memory for adapters; None: half of the machine's, on a GPU no
            more than JAX has page-locked memory for.
        lora_load_threads: threads that read adapters from their directories.
        lora_load_timeout_s: seconds that reading one may take.
        max_logprobs: most log-probabilities a position that a request may ask for; -1: all.
        seed: of requests that bring none.
        compilation_cache_dir: where compiled programs are kept for the next start, unless JAX was
            told another place already; None: nowhere. It holds for the whole process.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    kernel_backend: Literal["auto", "mosaic", "triton", "xla"] = "auto"
    tensor_parallel_size: int = 1
    lora_partition: Literal["auto", "slora", "no-comm"] = "auto"
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = cast(int, None)  # a number once it is made
    max_num_batched_tokens: int = cast(int, None)  # also
    decode_batch_sizes: tuple[int, ...] | None = None
    max_loras: int = 256
    max_lora_rank: int = 64
    max_cpu_loras: int | None = None
    max_cpu_lora_gib: float | None = None
    lora_load_threads: int = 4
    lora_load_timeout_s: float = 120.0
    max_logprobs: int = 20
    seed: int = 0
    compilation_cache_dir: str | None = "~/.cache/slora-jax"

    def __post_init__(self) -> None:
        SchedulingOptions.__post_init__(self)  # super() knows no classes with slots
        self._choose_batch()
        if self.decode_batch_sizes is not None:
            object.__setattr__(self, "decode_batch_sizes", tuple(self.decode_batch_sizes))
        sizes = self.decode_batch_sizes
        checks = {
            "tensor_parallel_size": (self.tensor_parallel_size >= 1, "at least 1"),
            "page_size": (self.page_size in (16, 32, 64), "16, 32 or 64"),
            "num_pages": (self.num_pages is None or self.num_pages >= 2, "at least 2"),
            "gpu_memory_utilization": (
                0 < self.gpu_memory_utilization <= 1,
                "above 0 and at most 1",
            ),
            "max_model_len": (self.max_model_len is None or self.max_model_len >= 2, "at least 2"),
            "max_num_seqs": (self.max_num_seqs >= 1, "at least 1"),
            "max_num_batched_tokens": (
                self.max_num_batched_tokens >= self.max_num_seqs,
                f"at least max_num_seqs ({self.max_num_seqs}), one token for each request",
            ),
            "decode_batch_sizes": (
                sizes is None
                or (
                    list(sizes) == sorted(set(sizes))
                    and sizes[:1] >= (1,)
                    and sizes[-1] == self.max_num_seqs
                ),
                f"ascending, from 1 up, and end with max_num_seqs ({self.max_num_seqs})",
            ),
            "max_loras": (self.max_loras >= 1, "at least 1"),
            "max_lora_rank": (self.max_lora_rank >= 1, "at least 1"),
            "max_cpu_loras": (self.max_cpu_loras is None or self.max_cpu_loras >= 1, "at least 1"),
            "max_cpu_lora_gib": (
                self.max_cpu_lora_gib is None or self.max_cpu_lora_gib > 0,
                "above 0",
            ),
            "lora_load_threads": (self.lora_load_threads >= 1, "at least 1"),
            "lora_load_timeout_s": (self.lora_load_timeout_s > 0, "above 0"),
            "max_logprobs": (self.max_logprobs >= -1, "at least 0, or -1 for all"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        for name, choices in (
            ("dtype", ("auto", "float32", "float16", "bfloat16")),
            ("load_format", ("auto", "dummy")),
            ("kernel_backend", ("auto", "mosaic", "triton", "xla")),
            ("lora_partition", ("auto", "slora", "no-comm")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    def _choose_batch(self) -> None:
        """What was not given goes with what was."""
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is None:
            seqs = MAX_NUM_SEQS if tokens is None else max(1, min(MAX_NUM_SEQS, tokens))
            if self.decode_batch_sizes:
                seqs = max(self.decode_batch_sizes)
        if tokens is None:
            tokens = max(MAX_NUM_BATCHED_TOKENS, seqs)
        object.__setattr__(self, "max_num_seqs", seqs)
        object.__setattr__(self, "max_num_batched_tokens", tokens)

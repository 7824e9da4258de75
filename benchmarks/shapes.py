# SPDX-License-Identifier: Apache-2.0
"""The shapes of the models that are measured."""

from slora_jax.config import ModelConfig

LLAMA_2_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)
LLAMA_2_13B = ModelConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    head_dim=128,
    max_position_embeddings=4096,
)
LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
LLAMA_3_70B = ModelConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
LLAMA_3_70B_OF_8 = ModelConfig(  # what one of 8 devices holds, so only for the kernels
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672 // 8,
    num_hidden_layers=80,
    num_attention_heads=64 // 8,
    num_key_value_heads=8 // 8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
TINY = ModelConfig(  # to try a benchmark on a CPU
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
)

MODELS = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LLAMA_2_13B,
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": LLAMA_3_70B,
    "tiny": TINY,
}
KERNEL_SHAPES = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LLAMA_2_13B,
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b/8": LLAMA_3_70B_OF_8,
}

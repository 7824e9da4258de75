# SPDX-License-Identifier: Apache-2.0
"""The golden cases that make.py builds; plain data, without imports from torch."""

from dataclasses import dataclass
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One model with its adapters and requests.

    Attributes:
        seed: Fixes weights, adapters and prompts.
        config: Arguments of LlamaConfig.
        adapters: Arguments of LoraConfig by adapter name; `save_embedding_layers`, if present, is
            for PEFT's save_pretrained instead.
        requests: (adapter or None, prompt length, tokens to generate).
        hub_config: Write config.json with the older keys that published Llamas carry.
        max_shard_size: Where save_pretrained splits the checkpoint.
        note: What a reader of this case should know.
    """

    seed: int
    config: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    requests: list[tuple[str | None, int, int]]
    note: str
    hub_config: bool = False
    max_shard_size: str = "1GB"


CASES = {
    "mha": Case(
        seed=11,
        config=dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=112, max_position_embeddings=128, rms_norm_eps=1e-5,
        ),
        adapters={
            "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                              lora_dropout=0.1),
            "rslora": dict(r=8, lora_alpha=4, target_modules=LINEAR, use_rslora=True),
            "one_layer": dict(r=6, lora_alpha=9, target_modules=["k_proj", "o_proj", "up_proj"],
                              layers_to_transform=[1], layers_pattern="layers"),
        },
        requests=[(None, 3, 12), (None, 45, 8), ("attention", 17, 10), ("rslora", 33, 10),
                  ("rslora", 4, 12), ("one_layer", 16, 10)],
        hub_config=True,
        note="Llama-2-like: config.json has neither head_dim nor rope_theta, so defaults apply. "
             "one_layer leaves layer 0 alone.",
    ),
    "gqa": Case(
        seed=9,
        config=dict(
            hidden_size=40, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=96, max_position_embeddings=128,
            rms_norm_eps=1e-3, rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
        adapters={
            # A pattern must match a suffix of whole path components; the first in file order wins,
            # and PEFT writes its files with sorted keys.
            "patterns": dict(
                r=8, lora_alpha=8, target_modules=LINEAR,
                rank_pattern={"layers.0.self_attn.q_proj": 5, "q_proj": 7, "v_proj": 12,
                              r"layers\.[12]\.mlp\.(gate|up)_proj": 3},
                alpha_pattern={r"^model.layers.2.self_attn.o_proj": 20, "k_proj|v_proj": 10,
                               "mlp.down_proj": 6.5},
            ),
            "regex": dict(r=12, lora_alpha=20, exclude_modules=["layers.1.self_attn.k_proj"],
                          target_modules=r".*\.(?:self_attn\.[qko]|mlp\.down)_proj"),
            "excluded": dict(r=5, lora_alpha=3, target_modules=["q_proj", "v_proj", "gate_proj"],
                             exclude_modules=r"model\.layers\.0\..*", use_rslora=True,
                             rank_pattern={"gate_proj": 2}, alpha_pattern={"v_proj": 6}),
        },
        requests=[(None, 5, 10), (None, 32, 8), ("patterns", 40, 10), ("patterns", 3, 12),
                  ("regex", 19, 10), ("excluded", 31, 10)],
        note="head_dim * heads is not hidden_size, and rms_norm_eps is large enough to matter.",
    ),
    "tied": Case(
        seed=21,
        config=dict(
            hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=128, max_position_embeddings=128, rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        ),
        adapters={
            "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
            "head": dict(r=6, lora_alpha=6, target_modules=["lm_head"]),
            "both": dict(r=3, lora_alpha=3, target_modules=["embed_tokens", "v_proj"],
                         use_rslora=True, ensure_weight_tying=True),
        },
        requests=[(None, 6, 10), (None, 41, 8), ("embedding", 18, 10), ("head", 35, 8),
                  ("both", 16, 10), ("both", 5, 10)],
        note="PEFT adapts each use of a tied matrix by itself: embedding leaves the head's product "
             "with the plain matrix, head leaves the input lookup plain. Only "
             "ensure_weight_tying=True (adapter both) adds lm_head's transposed factors, "
             "lora_A = embedding_B.T and lora_B = embedding_A.T, and PEFT saves those too.",
    ),
    "biased": Case(
        seed=3,
        config=dict(
            hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=104, max_position_embeddings=128, rms_norm_eps=1e-5,
            attention_bias=True, mlp_bias=True,
        ),
        adapters={
            "all_linear": dict(r=4, lora_alpha=6, target_modules="all-linear"),
            "everything": dict(r=6, lora_alpha=4, use_rslora=True, fan_in_fan_out=False,
                               target_modules=[*LINEAR, "lm_head", "embed_tokens"]),
            "lean": dict(r=10, lora_alpha=10, target_modules=["lm_head", "embed_tokens"],
                         save_embedding_layers=False),
        },
        requests=[(None, 7, 10), (None, 34, 8), ("all_linear", 44, 8), ("everything", 23, 10),
                  ("everything", 3, 12), ("lean", 17, 8)],
        note="PEFT writes all-linear's expansion, full module names without lm_head. everything "
             "also holds copies of the base's embedding and head (PEFT's save_embedding_layers); "
             "lean was saved without.",
    ),
    "llama3_rope": Case(
        seed=3,
        config=dict(
            hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=24, vocab_size=120, max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0,
                                 low_freq_factor=1.0, high_freq_factor=4.0,
                                 original_max_position_embeddings=32),
        ),
        adapters={
            "rank3": dict(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj"]),
            "rank16": dict(r=16, lora_alpha=24, target_modules=LINEAR),
        },
        requests=[(None, 45, 12), (None, 4, 10), ("rank3", 48, 10), ("rank3", 9, 10),
                  ("rank16", 37, 10)],
        hub_config=True,
        max_shard_size="100KB",
        note="Of the 12 rotary frequencies one is kept, one smoothed and ten divided by 8. Sharded "
             "checkpoint; config.json in Llama 3.1's form (rope_theta, rope_scaling).",
    ),
}  # fmt: skip

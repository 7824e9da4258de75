# SPDX-License-Identifier: Apache-2.0
"""What is loaded is what was written, fused and placed as asked; else it is refused by name."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sharding import Placement, Split, tensor_mesh
from slora_jax.config import ModelConfig
from slora_jax.model.checkpoint import Checkpoint, CheckpointError
from slora_jax.model.loader import _read_block, dummy_weights, load_weights, weight_shapes
from slora_jax.model.shards import ModelShards
from slora_jax.model.sources import weight_sources
from slora_jax.model.weights import LlamaWeights

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
)
BIASED = {"attention_bias": True, "mlp_bias": True}
HIDDEN, HEADS, KV_HEADS, FFN = 8, 4 * 6, 2 * 6, 12


def configured(**changes) -> ModelConfig:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    return ModelConfig(**(fields | changes))


def tensors(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """A checkpoint under Hugging Face's names, with every number different enough to be seen."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (11, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (11, HIDDEN)
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        for name, out, inputs, bias in (
            ("self_attn.q_proj", HEADS, HIDDEN, config.attention_bias),
            ("self_attn.k_proj", KV_HEADS, HIDDEN, config.attention_bias),
            ("self_attn.v_proj", KV_HEADS, HIDDEN, config.attention_bias),
            ("self_attn.o_proj", HIDDEN, HEADS, config.attention_bias),
            ("mlp.gate_proj", FFN, HIDDEN, config.mlp_bias),
            ("mlp.up_proj", FFN, HIDDEN, config.mlp_bias),
            ("mlp.down_proj", HIDDEN, FFN, config.mlp_bias),
        ):
            shapes[f"{layer}.{name}.weight"] = (out, inputs)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (out,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_sharded(model_dir: Path, content: dict[str, np.ndarray]) -> list[Path]:
    """Deals tensors out to two files, so that q, k and v of one layer are in different ones."""
    names = sorted(content)
    files = [model_dir / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({name: content[name] for name in names[i::2]}, file)
    weight_map = {name: files[i % 2].name for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def load(model_dir: Path, config=CONFIG, dtype=jnp.float32, size: int = 1) -> LlamaWeights:
    model, placement = ModelShards(config, size), Placement(tensor_mesh(size))
    return load_weights(model_dir, model, dtype, placement, progress=False)


def dummy(config: ModelConfig, dtype=jnp.float32, seed: int = 0) -> LlamaWeights:
    return dummy_weights(ModelShards(config), dtype, Placement(tensor_mesh(1)), seed)


def paths(weights: LlamaWeights) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@pytest.mark.parametrize("sharded", [False, True], ids=["single file", "two files"])
@pytest.mark.parametrize("biases", [{}, BIASED], ids=["no biases", "biases"])
def test_loads_every_tensor(tmp_path, sharded, biases):
    config = configured(**biases)
    content = tensors(config)
    if sharded:
        write_sharded(tmp_path, content)
    else:
        save_file(content, tmp_path / "model.safetensors")
    weights = load(tmp_path, config)

    np.testing.assert_array_equal(weights.embed_tokens, content["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights.norm, content["model.norm.weight"])
    assert weights.lm_head is not None
    np.testing.assert_array_equal(weights.lm_head.weight, content["lm_head.weight"])
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        for norm in ("input", "post_attention"):
            expected = content[f"{prefix}.{norm}_layernorm.weight"]
            np.testing.assert_array_equal(getattr(layer, f"{norm}_norm"), expected)
        for linear, names in (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.o, ("self_attn.o_proj",)),
            (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.down, ("mlp.down_proj",)),
        ):
            for kind in ("weight", "bias") if biases else ("weight",):
                expected = np.concatenate([content[f"{prefix}.{name}.{kind}"] for name in names])
                np.testing.assert_array_equal(getattr(linear, kind), expected)
            assert biases or linear.bias is None
            assert linear.scale is None


@pytest.mark.parametrize("size", [1, 2])
def test_a_device_holds_its_part_of_each_fused_tensor(tmp_path, size):
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    layer = load(tmp_path, size=size).layers[1]
    attention = "model.layers.1.self_attn"
    names = [f"{attention}.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    for device, shard in enumerate(layer.qkv.weight.addressable_shards):
        parts = [np.split(content[name], size)[device] for name in names]
        np.testing.assert_array_equal(shard.data, np.concatenate(parts))
    whole = content[f"{attention}.o_proj.weight"]
    for device, shard in enumerate(layer.o.weight.addressable_shards):
        np.testing.assert_array_equal(shard.data, np.split(whole, size, axis=1)[device])


def block(model_dir: Path, path: str, size: int, device: int, config=CONFIG) -> np.ndarray:
    source = weight_sources(ModelShards(config, size))[path]
    with Checkpoint(model_dir) as checkpoint:
        return _read_block(checkpoint, source, np.dtype(np.float32), device)


def test_blocks_past_the_end_are_padded_with_zeros(tmp_path):
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    head, down = content["lm_head.weight"], content["model.layers.0.mlp.down_proj.weight"]
    for path, whole, axis in (("lm_head.weight", head, 0), ("layers.0.down.weight", down, 1)):
        first, second = (block(tmp_path, path, 2, device) for device in (0, 1))
        assert first.shape == second.shape
        assert first.shape[axis] == 64  # what the kernels want a multiple of
        index = tuple(map(slice, whole.shape))
        np.testing.assert_array_equal(first[index], whole)
        assert np.count_nonzero(first) == whole.size
        assert not second.any()


def test_few_heads_are_held_by_several_devices(tmp_path):
    content = tensors()
    save_file(content, tmp_path / "model.safetensors")
    attention = "model.layers.0.self_attn"
    for device in range(4):
        qkv = block(tmp_path, "layers.0.qkv.weight", 4, device)
        for part, name, head in zip(
            np.split(qkv, 3), "qkv", (device, device // 2, device // 2), strict=True
        ):
            expected = content[f"{attention}.{name}_proj.weight"][6 * head : 6 * (head + 1)]
            np.testing.assert_array_equal(part, expected)


def test_a_bias_of_what_is_added_up_is_held_once(tmp_path):
    config = configured(**BIASED)
    content = tensors(config)
    save_file(content, tmp_path / "model.safetensors")
    first, second = (block(tmp_path, "layers.0.o.bias", 2, device, config) for device in (0, 1))
    np.testing.assert_array_equal(first, content["model.layers.0.self_attn.o_proj.bias"])
    np.testing.assert_array_equal(second, np.zeros_like(first))


def test_splits():
    def blocks(split: Split, devices: int) -> list[list[int]]:
        return [split.take(np.arange(1, 1 + split.size), n, 0).tolist() for n in range(devices)]

    assert blocks(Split.padded(5, 2), 2) == [[1, 2, 3], [4, 5, 0]]
    assert blocks(Split.padded(2, 3, 2), 3) == [[1, 2], [0, 0], [0, 0]]
    assert blocks(Split.heads(4, 1, 2), 2) == [[1, 2], [3, 4]]
    assert blocks(Split.heads(2, 2, 4), 4) == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert blocks(Split.once(2, 3), 3) == [[1, 2], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="2 heads and 3 devices: neither divides the other"):
        Split.heads(2, 1, 3)


def test_devices_must_divide_the_heads():
    with pytest.raises(ValueError, match=r"tensor_parallel_size 3 .* one of 1, 2, 4"):
        ModelShards(CONFIG, 3)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16, jnp.float32, np.float64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts(tmp_path, stored, dtype):
    content = {name: value.astype(stored) for name, value in tensors().items()}
    save_file(content, tmp_path / "model.safetensors")
    weights = load(tmp_path, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(weights)} == {np.dtype(dtype)}
    expected = content["model.layers.0.mlp.down_proj.weight"].astype(dtype)
    np.testing.assert_array_equal(weights.layers[0].down.weight, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_placement(tmp_path, size):
    config = configured(**BIASED)
    save_file(tensors(config), tmp_path / "model.safetensors")
    model, placement = ModelShards(config, size), Placement(tensor_mesh(size))
    expected = paths(weight_shapes(model, jnp.float32, placement))
    for weights in (load(tmp_path, config, size=size), dummy_weights(model, "float32", placement)):
        for path, array in paths(weights).items():
            assert (array.shape, array.dtype) == (expected[path].shape, expected[path].dtype)
            assert array.sharding.is_equivalent_to(expected[path].sharding, array.ndim)


def test_tied_embedding(tmp_path):
    config = configured(tie_word_embeddings=True)
    content = tensors(config)
    save_file(content, tmp_path / "model.safetensors")
    assert load(tmp_path, config).lm_head is None
    content["lm_head.weight"] = content["model.embed_tokens.weight"].copy()
    save_file(content, tmp_path / "model.safetensors")
    assert load(tmp_path, config).lm_head is None
    content["lm_head.weight"][7, 3] += 1
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        load(tmp_path, config)


def test_ignores_rotary_buffers(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    save_file(tensors() | buffers, tmp_path / "model.safetensors")
    load(tmp_path)


def test_refuses_missing_tensors(tmp_path):
    first_layer = {name: value for name, value in tensors().items() if "layers.1" not in name}
    save_file(first_layer, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"9 tensors are missing: model.layers.1.*, …"):
        load(tmp_path)


def test_refuses_unexpected_tensors(tmp_path):
    save_file(tensors(configured(**BIASED)), tmp_path / "model.safetensors")
    message = r"14 tensors have no place .*: model.layers.0.mlp.down_proj.bias, .*, …"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_refuses_wrong_shapes(tmp_path):
    content = tensors() | {"lm_head.weight": np.ones((12, HIDDEN), np.float32)}
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight should be \[11, 8\] and is \[12, 8"):
        load(tmp_path)


def test_refuses_quantised_tensors(tmp_path):
    content = tensors()
    content["lm_head.weight"] = content["lm_head.weight"].astype(np.int8)
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight of .* is I8.*quantised"):
        load(tmp_path)


def test_refuses_a_tensor_in_two_files(tmp_path):
    files = write_sharded(tmp_path, tensors())
    save_file(tensors(), files[1])
    with pytest.raises(CheckpointError, match=r"tensor .* is in .*00001.* and in .*00002"):
        load(tmp_path)


def test_refuses_missing_files(tmp_path):
    write_sharded(tmp_path, tensors())[1].unlink()
    with pytest.raises(CheckpointError, match=r"2 files, of which 1 are missing: model-00002-of"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a safetensors index"),
        ('{"weight_map": 3}', "an object with a 'weight_map'"),
        ('{"weight_map": {"norm": "../norm.safetensors"}}', "outside its directory: ../norm"),
    ],
)
def test_refuses_a_bad_index(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: b"version https://git"])
def test_names_a_damaged_file(tmp_path, damage):
    file = write_sharded(tmp_path, tensors())[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"cannot read .*model-00002-of-00002.*Download"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"PyTorch pickles.*save_pretrained\(new, safe_serialization=True\)"),
        ("consolidated.00.pth", "PyTorch pickles"),
        ("model-00001-of-00002.safetensors", r"neither model.safetensors nor .*index.json, which"),
        ("README.md", "holds no weights: neither model.safetensors nor .* nor a directory orbax"),
    ],
)
def test_says_what_is_there_instead_of_weights(tmp_path, file, message):
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_draws_a_progress_bar_of_bytes(tmp_path, capsys):
    save_file(tensors(), tmp_path / "model.safetensors")
    load_weights(tmp_path, ModelShards(CONFIG), jnp.float32, Placement(tensor_mesh(1)))
    assert "Loading weights" in capsys.readouterr().err


def test_dummy_weights_have_the_shapes_of_a_checkpoint(tmp_path):
    config = configured(**BIASED)
    save_file(tensors(config), tmp_path / "model.safetensors")
    shapes = jax.tree.map(jnp.shape, paths(load(tmp_path, config)))
    made = paths(dummy(config, jnp.bfloat16))
    assert jax.tree.map(jnp.shape, made) == shapes
    assert {x.dtype for x in made.values()} == {np.dtype(jnp.bfloat16)}
    sources = weight_sources(ModelShards(config))
    assert {path: source.block_shape for path, source in sources.items()} == shapes


def test_dummy_weights_keep_activations_sane():
    config = configured(hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    weights = dummy(config)
    for name in ("qkv", "o", "gate_up", "down"):
        first, *others = (getattr(layer, name).weight for layer in weights.layers)
        assert np.std(first) * first.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
        assert not any(np.array_equal(first, other) for other in others)
    np.testing.assert_array_equal(weights.layers[0].input_norm, 1)
    same, other = (dummy(config, seed=seed).embed_tokens for seed in (0, 1))
    np.testing.assert_array_equal(weights.embed_tokens, same)
    assert not np.array_equal(weights.embed_tokens, other)

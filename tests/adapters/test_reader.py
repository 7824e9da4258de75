# SPDX-License-Identifier: Apache-2.0
"""Adapters as they are read and packed: what the pool gets, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.layout import PageLayout
from pallas_kernels.segments import with_work
from pallas_kernels.slabs import read_matrix
from sharding import Placement, tensor_mesh
from slora_jax.adapters.errors import AdapterError
from slora_jax.adapters.pack import most_pages, num_pages, pack
from slora_jax.adapters.peft import read_adapter
from slora_jax.adapters.reader import CHUNKS, AdapterReader, chunk_sizes, signature_of
from slora_jax.config import LAYER_MODULES, OUTER_MODULES
from slora_jax.model.shards import ModelShards
from tests.adapters.make import BASE, edit_tensors, write_adapter

MODEL = ModelShards(BASE)
LAYOUT = PageLayout(BASE.num_key_value_heads, BASE.head_dim, page_size=16)


@pytest.mark.parametrize(
    "modules", [LAYER_MODULES, OUTER_MODULES, ("k_proj", "down_proj", "lm_head")]
)
def test_what_is_packed_is_read_back(tmp_path, modules):
    """Every matrix, through the tables and the pages that a kernel would follow."""
    ranks = iter(range(1, 200))
    write_adapter(tmp_path, BASE, modules=modules, rank_of=lambda path: next(ranks) % 24 + 1)
    adapter = read_adapter(tmp_path, BASE)
    packed = pack(adapter, MODEL, LAYOUT, np.dtype(np.float32))
    assert len(packed.pages) == num_pages(adapter, MODEL, LAYOUT)
    assert len(packed.pages) <= most_pages(24, MODEL, LAYOUT)
    order = np.random.default_rng(0).permutation(len(packed.pages)) + 1
    pool = np.full((BASE.num_hidden_layers, len(order) + 1, LAYOUT.page_elems), np.nan, np.float32)
    pool[:, order] = packed.pages.swapaxes(0, 1)
    tables = (jnp.asarray(x[None]) for x in (packed.rank, packed.first_tile, packed.scale))
    one = jnp.ones(1, jnp.int32), jnp.asarray(order, jnp.int32)[None]
    adapters = with_work(*one, *tables, layout=LAYOUT, tokens=1)
    groups = [(n, LAYER_MODULES, pairs) for n, pairs in enumerate(adapter.layers)]
    for line, names, pairs in [*groups, (BASE.num_hidden_layers, OUTER_MODULES, adapter.outer)]:
        for column, name in enumerate(names):
            rank = packed.rank[line, column]
            assert rank == (pairs[name].rank if name in pairs else 0)
            if not rank:
                continue
            pair, inputs = pairs[name], BASE.projection_shape(name)[0]
            assert packed.scale[line, column] == pytest.approx(pair.scale)
            first = packed.first_tile[line, column]
            layer = None if names is OUTER_MODULES else jnp.int32(line)
            for matrix, tile in (
                (pair.a, first),
                (pair.b.T, LAYOUT.b_first_tile(first, rank, inputs)),
            ):
                got = read_matrix(
                    jnp.asarray(pool),
                    layer,
                    adapters,
                    jnp.asarray([tile]),
                    jnp.asarray([rank]),
                    columns=matrix.shape[1],
                    max_rank=24,
                    layout=LAYOUT,
                )
                np.testing.assert_array_equal(got[0, :rank], matrix)


def make_reader(capacity: int = 1000) -> AdapterReader:
    return AdapterReader(
        MODEL,
        LAYOUT,
        np.dtype(np.float32),
        max_rank=64,
        capacity=capacity,
        model_dir=None,
        placement=Placement(tensor_mesh(1)),
    )


def test_the_chunks_are_the_pages(tmp_path):
    path = write_adapter(tmp_path, BASE, rank=24)
    read = make_reader().read(path)
    packed = pack(read_adapter(path, BASE), MODEL, LAYOUT, np.dtype(np.float32))
    assert {len(chunk) for chunk in read.chunks} <= set(CHUNKS)
    np.testing.assert_array_equal(np.concatenate(read.chunks), packed.pages)
    assert read.num_pages == len(packed.pages)
    assert read.nbytes == packed.pages.nbytes
    for got, want in zip(read.tables, (packed.rank, packed.first_tile, packed.scale), strict=True):
        np.testing.assert_array_equal(got, want)


@given(st.integers(0, 300))
def test_chunks_add_up(pages):
    sizes = chunk_sizes(pages)
    assert sum(sizes) == pages
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) <= set(CHUNKS)


def test_the_id_is_of_the_content(tmp_path):
    read = make_reader().read
    first = read(write_adapter(tmp_path / "1", BASE, seed=1))
    second = read(write_adapter(tmp_path / "2", BASE, seed=2))
    copy = read(write_adapter(tmp_path / "3", BASE, seed=1))
    assert first.id == copy.id != second.id


def test_the_signature_changes_with_the_files(tmp_path):
    write_adapter(tmp_path, BASE, seed=1)
    before = signature_of(tmp_path)
    assert signature_of(tmp_path) == before
    write_adapter(tmp_path, BASE, seed=2)
    assert signature_of(tmp_path) != before


def test_a_bad_adapter_is_refused(tmp_path):
    write_adapter(tmp_path, BASE)
    edit_tensors(
        tmp_path, **{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}
    )
    with pytest.raises(AdapterError):
        make_reader().read(tmp_path)


def test_an_adapter_larger_than_the_pool(tmp_path):
    write_adapter(tmp_path, BASE, rank=64)
    with pytest.raises(AdapterError, match=r"takes \d+ pages, the pool has 1: raise num_pages"):
        make_reader(capacity=1).read(tmp_path)

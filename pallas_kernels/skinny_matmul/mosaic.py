# SPDX-License-Identifier: Apache-2.0
"""`skinny_matmul` for Hopper: one wave of CTAs streams W through deep rings in shared memory.

The operands change places: rows of W are the rows of a wgmma and tokens its columns, `yᵀ = W xᵀ`,
so that few tokens waste nothing. A CTA has a tile of 64 to 256 rows of W, 64 for each warpgroup
that computes, and one warpgroup more that loads. All CTAs run at once and keep the same number of
bytes under way, so memory serves them alike. Where tiles alone would leave multiprocessors idle,
the CTAs of a cluster split the inputs and add up their parts in shared memory, each for a share of
the tokens. Where W is gated, a warpgroup has the same rows of both halves, and both sums at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import interpreted, tuned
from pallas_kernels.layout import ceil_div
from pallas_kernels.mosaic import WGMMA, accumulator, swizzled
from pallas_kernels.skinny_matmul import reference
from pallas_kernels.skinny_matmul.tuning import TUNING, Plan

ROWS = 64  # of a wgmma, and so of a warpgroup
TOKENS = 8  # the grain of a wgmma's columns and of the swizzle
MOST_TOKENS = 128  # whose accumulators fit in registers


def skinny_matmul(x, weight, *, gated: bool = False, whole: bool = False, plan: Plan | None = None):
    """See `pallas_kernels.skinny_matmul.skinny_matmul`.

    Other shapes than these are left to the reference: 1 to 128 tokens, inputs and outputs (of gated
    weights half as many as rows) that are multiples of 64. More than 8 tokens that are no multiple
    of 8 cost a padded copy of x (XLA puts it into what produces x, if it can) and one of y.

    Args:
        plan: how to deal out W; None: as tuned.
    """
    tokens, inputs = x.shape
    plan = plan or tuned(TUNING).plan(tokens, weight.shape[0], inputs, gated=gated, whole=whole)
    halves = 2 if gated else 1
    outputs = weight.shape[0] // halves
    if not 0 < tokens <= MOST_TOKENS or inputs % plan.step or outputs % ROWS:
        return reference.skinny_matmul(x, weight, gated=gated)
    if plan.gated != gated or (gated and plan.split > 1):
        raise ValueError(f"{plan} is not for weights that are {'' if gated else 'not '}gated")
    if whole and not plan.whole:
        raise ValueError(f"{plan} does not add up all inputs in their order")
    if plan.split > inputs // plan.step:
        raise ValueError(f"{plan} splits {inputs} inputs: some part would have no step")
    if tokens > TOKENS and tokens % TOKENS:
        padded = jnp.pad(x, ((0, -tokens % TOKENS), (0, 0)))
        return skinny_matmul(padded, weight, gated=gated, plan=plan)[:tokens]

    groups, split, dtype = plan.outputs // ROWS, plan.split, x.dtype
    tiles, stages, step = ceil_div(outputs, plan.outputs), plan.stages(tokens), plan.step
    share, columns = plan.share(tokens), plan.columns(tokens)
    shares = columns // share
    scratch: dict[str, Any] = dict(
        w_smem=plgpu.SMEM((stages, halves, plan.outputs, step), dtype, transforms=swizzled()),
        x_smem=plgpu.SMEM((stages, columns, step), dtype, transforms=swizzled()),
        y_smem=plgpu.SMEM((groups, share, ROWS), dtype, transforms=swizzled()),
        ready=plgpu.Barrier(num_arrivals=1 + halves, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    )
    out_type = [jax.ShapeDtypeStruct((tokens, outputs), dtype)]
    if split > 1:
        tiling = swizzled(plgpu.find_swizzle(share * 32) // 4, itemsize=4)
        # The interpreter knows no stores into another CTA's shared memory. On an H200 the way
        # through memory gave stale sums: a cluster's barrier orders no stores to memory.
        through_memory = interpreted()
        parts = (groups, shares if through_memory else split, ROWS, share)
        scratch["parts_smem"] = plgpu.SMEM(parts, jnp.float32, transforms=tiling)
        if through_memory:
            out_type.append(jax.ShapeDtypeStruct((tiles, split, *parts), jnp.float32))
            scratch["shared"] = plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=groups)
        else:
            scratch["shared"] = plgpu.Barrier(num_arrivals=split - 1, num_barriers=groups)

    y, *_ = plgpu.kernel(
        partial(_kernel, plan=plan),
        out_type=out_type,
        grid=(tiles,),
        grid_names=("tile",),
        cluster=(split,),
        cluster_names=("part",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="gated_matmul" if gated else "skinny_matmul",
    )(x, weight)
    return y


def _kernel(x, weight, y, parts=None, *, plan, w_smem, x_smem, y_smem, ready, free, **exchange):
    """Body of one warpgroup.

    `exchange`: where the CTAs of a cluster add up, see `_add_up`; nothing if the inputs are whole.
    """
    (stages, columns, width), halves = x_smem.shape, w_smem.shape[1]
    groups, share, _ = y_smem.shape
    tile, part, group = (lax.axis_index(name) for name in ("tile", "part", "warpgroup"))
    steps = x.shape[1] // width
    first = lax.div(part * steps, jnp.int32(plan.split))
    count = lax.div((part + 1) * steps, jnp.int32(plan.split)) - first

    def slot(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(group == groups)
    def load():
        def fetch(step):
            at = lax.rem(step + tile, count) if plan.stagger else step
            inputs = pl.ds(pl.multiple_of((first + at) * width, width), width)
            # Tokens past the last are zeros to TMA. 0 is traced, or JAX would refuse the slice.
            tokens = pl.ds(0 * tile, columns)
            of_step = slot(step)
            arrive = ready.at[of_step]
            for half in range(halves):
                row = half * y.shape[1] + tile * plan.outputs
                rows = pl.ds(pl.multiple_of(row, ROWS), plan.outputs)
                there = w_smem.at[of_step, half]
                plgpu.copy_gmem_to_smem(weight.at[rows, inputs], there, arrive)
            plgpu.copy_gmem_to_smem(x.at[tokens, inputs], x_smem.at[of_step], arrive)

        for step in range(stages):
            pl.when(step < count)(lambda step=step: fetch(jnp.int32(step)))

        @pl.loop(stages, count)
        def _(step):
            plgpu.barrier_wait(free.at[slot(step)])
            fetch(step)

        for step in range(stages):  # nobody may leave a barrier that he has not seen complete
            pl.when(step < count)(lambda step=step: plgpu.barrier_wait(free.at[step]))

    @pl.when(group < groups)
    def compute():
        def products(*accs):
            rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)

            @pl.loop(0, count)
            def _(step):
                of_step = slot(step)
                plgpu.barrier_wait(ready.at[of_step])
                for half, acc in enumerate(accs):
                    w = w_smem.at[of_step, half, rows]
                    plgpu.wgmma(acc, w, x_smem.at[of_step].transpose((1, 0)))
                plgpu.wgmma_wait(halves)  # for the step before, while this one multiplies
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[slot(step - 1)]))

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot(count - 1)])
            return [acc[...] for acc in accs]

        def store(*sums):
            """Writes y of this CTA's share of the tokens."""
            # Each sum is rounded as if it were stored: a token without adapter gets the same in a
            # step in which others' gates are adapted, where `silu_gated` does this.
            result, *up = (one.astype(y.dtype).astype(jnp.float32) for one in sums)
            if up:
                result = result / (1.0 + jnp.exp(-result)) * up[0]
            y_smem.at[group].transpose((1, 0))[...] = result.astype(y.dtype)
            plgpu.commit_smem()
            tokens = pl.ds(pl.multiple_of(part * share, TOKENS), share)
            rows = pl.ds(pl.multiple_of(tile * plan.outputs + group * ROWS, ROWS), ROWS)
            plgpu.copy_smem_to_gmem(y_smem.at[group], y.at[tokens, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        sums = pl.run_scoped(products, *[accumulator(ROWS, columns)] * halves)
        if plan.split == 1:
            store(*sums)
        else:
            parts_gmem = None if parts is None else parts.at[tile]
            _add_up(sums[0], part, group, plan.split, store, parts_gmem, **exchange)


def _add_up(sums, part, group, split, store, parts_gmem, *, shared, parts_smem):
    """Exchanges sums with the other CTAs of the cluster, and stores the total of a share of tokens.

    Parts are added in the same order every time, so that results are the same bit for bit.

    Args:
        sums: [ROWS, shares * share], of this part of the inputs.
        store: is called with the total of this CTA's share, [ROWS, share].
        parts_gmem: [split, groups, shares, ROWS, share], to exchange through memory; else None.
        shared: barrier of a warpgroup: all parts are there.
        parts_smem: [groups, shares, ROWS, share] that leave through memory, or
            [groups, split, ROWS, share] that other CTAs have put here.
    """
    share = parts_smem.shape[-1]
    shares = sums.shape[1] // share
    pieces = [sums[:, i * share : (i + 1) * share] for i in range(shares)]
    if parts_gmem is None:
        for i, piece in enumerate(pieces):

            @pl.when(part != i)
            def _(i=i, piece=piece):
                to = {"cluster_idx": jnp.int32(i), "cluster_dim": "part"}
                plgpu.async_store_smem(piece, parts_smem.at[group, part], shared.at[group], **to)

            @pl.when(part == i)
            def _(piece=piece):
                parts_smem[group, part] = piece

        plgpu.commit_smem()
    else:
        for i, piece in enumerate(pieces):
            parts_smem[group, i] = piece
        plgpu.commit_smem()
        # TMA stores, as their end can be waited for: the barrier orders no plain stores to memory.
        for i in range(shares):
            plgpu.copy_smem_to_gmem(parts_smem.at[group, i], parts_gmem.at[part, group, i])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(shared.at[group])
        plgpu.barrier_wait(shared.at[group])

    @pl.when(part < shares)
    def _():
        if parts_gmem is None:
            plgpu.barrier_wait(shared.at[group])
            parts = [parts_smem.at[group, p] for p in range(split)]
        else:
            parts = [parts_gmem.at[p, group, part] for p in range(split)]
        total = plgpu.load(parts[0], layout=WGMMA, optimized=False)
        for ref in parts[1:]:
            total += plgpu.load(ref, layout=WGMMA, optimized=False)
        store(total)

# SPDX-License-Identifier: Apache-2.0
"""The cost model finds what steps cost, and is not led astray."""

import numpy as np
import pytest

from slora_jax.core import Install, Request, RowPlan, SamplingParams, StepPlan
from slora_jax.scheduling.cost_model import CostModel, StepCost, StepLoad, step_load

TRUE = StepCost(6e-3, 8e-6, 9e-8, 1e-3, 1.2e-6, 3e-5)


def loads(seed: int, count: int) -> list[StepLoad]:
    """Steps of a server: mostly decodes, some with prompts, installs and none but the base."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        rows = int(rng.integers(1, 128))
        prompts = int(rng.integers(0, 512)) * int(rng.random() < 0.3)
        ranks = 0 if rng.random() < 0.2 else int(rng.integers(8, 2000))
        installs = int(rng.choice([8, 64])) * int(rng.random() < 0.1)
        found.append(StepLoad(rows + prompts, rows * int(rng.integers(16, 900)), ranks, installs))
    return found


def errors(model: CostModel, cost: StepCost) -> np.ndarray:
    """Relative errors on steps that it has not seen."""
    unseen = loads(99, 200)
    return np.abs([model.predict(one) / cost.seconds(one) - 1 for one in unseen])


def test_it_learns_the_costs():
    model = CostModel()
    for load in loads(0, 600):
        model.observe(load, TRUE.seconds(load))
    assert errors(model, TRUE).max() < 0.01
    assert model.as_dict()["rank_s"] == pytest.approx(TRUE.rank_s, rel=0.02)


def test_noise_and_outliers_do_not_matter():
    """Each tenth step pauses for a second; the others vary by 5 %. The first steps compile."""
    rng = np.random.default_rng(1)
    model = CostModel()
    for n, load in enumerate(loads(0, 2000)):
        pause = 5.0 if n < 4 else float(n % 10 == 0)
        model.observe(load, TRUE.seconds(load) * rng.normal(1, 0.05) + pause)
    assert np.median(errors(model, TRUE)) < 0.1
    assert errors(model, TRUE).max() < 0.25


def test_it_follows_a_device_that_gets_slower():
    slower = StepCost(12e-3, 8e-6, 9e-8, 1e-3, 2.4e-6, 3e-5)
    model = CostModel(forgetting=0.99)
    for load in loads(0, 500):
        model.observe(load, TRUE.seconds(load))
    for load in loads(1, 1000):
        model.observe(load, slower.seconds(load))
    assert errors(model, slower).max() < 0.02


def test_one_kind_of_step_is_enough_to_predict_it():
    """Steps that are all alike leave the single costs open, but not their sum."""
    model, load = CostModel(), StepLoad(64, 20_000, 1000, 0)
    for _ in range(5000):
        model.observe(load, TRUE.seconds(load))
    assert model.predict(load) == pytest.approx(TRUE.seconds(load), rel=1e-3)
    assert min(model.as_dict().values()) >= 0


def test_no_cost_is_negative():
    """Were larger steps faster, the rest of the model would say so without absurd predictions."""
    model = CostModel()
    for load in loads(0, 500):
        model.observe(load, 1e-2 / (1 + load.tokens))
    assert min(model.as_dict().values()) >= 0


def test_it_does_not_guess_before_it_has_warmed_up():
    model = CostModel(warm_up=8)
    for load in loads(0, 7):
        model.observe(load, TRUE.seconds(load))
    assert model.predict(StepLoad(1, 1, 0, 0)) is None
    assert model.predict_next(512) is None
    model.observe(StepLoad(64, 20_000, 1000, 0), TRUE.seconds(StepLoad(64, 20_000, 1000, 0)))
    assert model.predict_next(512) == model.predict(StepLoad(512, 20_000, 1000, 0))


def test_the_load_of_a_plan():
    def row(adapter: str | None, start: int, count: int) -> RowPlan:
        request = Request(id="", prompt=[1], params=SamplingParams(), adapter_id=adapter)
        return RowPlan(request, 0, None, start, (1,) * count, True, 0)

    rows = (row("a", 10, 1), row("a", 0, 20), row("b", 5, 1), row(None, 99, 1))
    plan = StepPlan(rows, (), (Install("b", 1, (4,)),), ())
    ranks = {"a": 16, "b": 64}
    assert step_load(plan, ranks.__getitem__) == StepLoad(23, 11 + 20 + 6 + 100, 80, 64)

# SPDX-License-Identifier: Apache-2.0
"""A model with as many key/value heads as query heads, and biases, on 2, 4 and 8 devices."""

import pytest

from tests.sharding.models import MHA
from tests.sharding.serving import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("mha"), MHA)


# What is shared or split of keys and values differs from `test_gqa`, which has all combinations.
@pytest.mark.parametrize(
    ("devices", "partition"),
    [
        pytest.param(2, "slora", marks=pytest.mark.long),
        (4, "no-comm"),
        pytest.param(8, "slora", marks=pytest.mark.long),
    ],
)
def test_as_on_one_device(case, devices, partition):
    engine = case.engine(tensor_parallel_size=devices, lora_partition=partition)
    case.check_served(engine)
    case.check_pool(engine)

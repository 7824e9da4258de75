# SPDX-License-Identifier: Apache-2.0
"""A model with few key/value heads and a tied head, on 2, 4 and 8 devices."""

import pytest

from tests.sharding.models import GQA
from tests.sharding.serving import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("gqa"), GQA)


@pytest.mark.parametrize(
    ("devices", "partition"),
    [(8, "slora")]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [(2, "no-comm"), (2, "slora"), (4, "no-comm"), (4, "slora"), (8, "no-comm")]
    ],
)
def test_as_on_one_device(case, devices, partition):
    engine = case.engine(tensor_parallel_size=devices, lora_partition=partition)
    case.check_served(engine)
    case.check_pool(engine)

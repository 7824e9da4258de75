# SPDX-License-Identifier: Apache-2.0
"""A model with few key/value heads and a tied head, on 2, 4 and 8 devices."""

import pytest

from tests.sharding.models import GQA
from tests.sharding.serving import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("gqa"), GQA)


@pytest.mark.parametrize("partition", ["no-comm", "slora"])
@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.long), 8])
def test_as_on_one_device(case, devices, partition):
    engine = case.engine(tensor_parallel_size=devices, lora_partition=partition)
    case.check_served(engine)
    case.check_pool(engine)

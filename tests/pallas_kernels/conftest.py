# SPDX-License-Identifier: Apache-2.0
"""Every operation is tested on pages of several shapes."""

import pytest

from pallas_kernels.layout import PageLayout
from tests.pallas_kernels.pages import LAYOUTS, Pages


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request) -> PageLayout:
    return request.param


@pytest.fixture
def pages(layout) -> Pages:
    return Pages(layout)

# SPDX-License-Identifier: Apache-2.0
"""A newcomer's first run of the tests is the one that every submission has passed."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ci_runs_what_the_readme_says():
    [command] = re.findall(
        r"^(uv run pytest.*?) *#", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    steps = (ROOT / ".ci/run").read_text().splitlines()
    assert command in steps
    assert "PYTEST_ADDOPTS" not in "".join(steps)

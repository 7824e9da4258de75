# SPDX-License-Identifier: Apache-2.0
"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.long
def test_python_example():
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    [shown] = re.findall(r"print\(.*\)\s+# (\[.*\])", code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == f"{shown}\none token at a time"


def test_every_path_exists():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target

# SPDX-License-Identifier: Apache-2.0
"""Tables of the report, in Markdown."""

from collections.abc import Iterable, Sequence


def table(heads: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """Nothing without rows."""
    if not rows:
        return ""
    lines = [list(heads), ["---"] * len(rows[0]), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

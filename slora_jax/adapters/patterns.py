# SPDX-License-Identifier: Apache-2.0
"""PEFT's regular expressions of module paths, matched in linear time.

PEFT matches them with Python's `re`, which takes exponential time for some and holds the
interpreter's lock meanwhile. RE2 is linear. It lacks what cannot be (references, looking around),
and the few things that it reads differently are refused, so that what is accepted means the same.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import re2

from slora_jax.adapters.errors import AdapterError

_MOST_PATTERNS = 1024  # Llama-3.1-405B has 884 modules
_MOST_BYTES = 1 << 20  # of one compiled pattern; 900 module paths as alternatives have half of it
_MOST_INSTRUCTIONS = 200_000  # of all; a module path has about 50. A match takes time by these
# Python: up to n, a set of sets and the like (for which it warns). RE2: literally, POSIX classes.
_AMBIGUOUS = re.compile(r"\{,|\[\[|\[:|--|&&|~~|\|\|")


class ModulePatterns[T]:
    """Values by regular expressions of module paths.

    A module has the value of the first pattern that matches its path, or whole components at its
    end.

    Args:
        field: of the config, for messages.
        values: by pattern.
        file: of the config, for messages.

    Raises:
        AdapterError: a pattern is not one, or not supported; or there are too many.
    """

    def __init__(self, field: str, values: Mapping[str, T], file: Path) -> None:
        if len(values) > _MOST_PATTERNS:
            raise AdapterError(
                f"{file}: {field} has {len(values)} patterns, more than {_MOST_PATTERNS}. "
                "Write one for several modules"
            )
        self._patterns = [(key, _compile(field, key, file), one) for key, one in values.items()]
        size = sum(pattern.programsize for _, pattern, _ in self._patterns)
        if size > _MOST_INSTRUCTIONS:
            raise AdapterError(
                f"{file}: the patterns of {field} compile to {size} instructions, more than "
                f"{_MOST_INSTRUCTIONS}. Write shorter ones, without repetitions of fixed numbers"
            )

    def find(self, module_path: str) -> tuple[str, T] | None:
        """The pattern and the value of a module such as `model.layers.0.mlp.up_proj`."""
        found = ((key, value) for key, one, value in self._patterns if one.match(module_path))
        return next(found, None)


def _compile(field: str, key: str, file: Path) -> "re2._Regexp":
    pattern = rf"(.*\.)?({key})$"
    try:
        if _AMBIGUOUS.search(key) or not key.isascii():
            raise re2.error("there is another way to write this")
        re.compile(pattern)  # what PEFT would refuse
        return re2.compile(pattern, _options())
    except (re.error, re2.error, RecursionError, OverflowError) as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        raise AdapterError(
            f"{file}: {field} has the key {key!r}, which is not a regular expression, or one that "
            f"cannot be matched in linear time ({reason}). Write the modules' paths or ends of "
            "them, without looking around, references, {,n} or sets in sets"
        ) from error


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MOST_BYTES
    options.never_capture = True
    options.log_errors = False
    return options

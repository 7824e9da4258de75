# SPDX-License-Identifier: Apache-2.0
"""Why an adapter is not served."""

_HEAD, _TAIL = 3000, 1000  # characters of a message; files may hold values of any length


class AdapterError(ValueError):
    """An adapter that cannot be served; the message says why, in which file, and what to do."""

    def __init__(self, message: str) -> None:
        if len(message) > _HEAD + _TAIL:
            message = f"{message[:_HEAD]} … {message[-_TAIL:]}"
        super().__init__(message)


class AdapterUnavailable(AdapterError):
    """An adapter that cannot be read now: its files or the disk may be at fault, or the time."""

# SPDX-License-Identifier: Apache-2.0
"""Reads files that anybody may have put there: regular ones only, within a size and a time."""

import io
import os
import stat
import time
from pathlib import Path

from slora_jax.adapters.errors import AdapterError, AdapterUnavailable

_CHUNK = 16 << 20  # bytes between two looks at the clock


class Deadline:
    """A moment after which a load is given up.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def check(self, path: Path) -> None:
        """Raises AdapterUnavailable once it has passed."""
        if time.monotonic() > self._until:
            raise AdapterUnavailable(
                f"{path}: not read within {self._seconds:g} s. Try again, or raise "
                "lora_load_timeout_s"
            )


def read_file(file: Path, most: int, too_large: str, deadline: Deadline) -> bytes:
    """The whole content.

    Args:
        file: its links are followed.
        most: bytes that are accepted.
        too_large: what to do about a larger file.
        deadline: looked at between chunks.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: not a regular file, or larger.
        AdapterUnavailable: it can't be read now, or not in time.
    """
    try:
        with io.FileIO(_open(file), "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size > most:
                raise AdapterError(f"{file}: has {size} bytes, more than {most}. {too_large}")
            content = io.BytesIO()
            while chunk := source.read(_CHUNK):
                content.write(chunk)
                if content.tell() > most:  # it grows, or has no size of its own
                    raise AdapterError(f"{file}: has more than {most} bytes. {too_large}")
                deadline.check(file)
            return content.getvalue()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except OSError as error:
        raise AdapterUnavailable(
            f"{file}: cannot be read ({error.strerror}). Check the file and its permissions"
        ) from error


def _open(file: Path) -> int:
    """Opens a regular file. What else there is, such as a FIFO or a device, may do anything."""
    _check_regular(os.stat(file), file)
    # Another file may be there by now: opening a FIFO then does not wait for a writer.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), file)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result, file: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "device")
        raise AdapterError(f"{file}: is a {kind}, not a file. Give a directory of regular files")

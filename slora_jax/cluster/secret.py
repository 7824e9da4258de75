# SPDX-License-Identifier: Apache-2.0
"""The secret that all processes of a cluster share, and that nobody else may read."""

import os
import stat
from pathlib import Path

SECRET_VARIABLE = "SLORA_CLUSTER_SECRET"
LEAST_BYTES = 16  # of a secret
_MOST_BYTES = 4096
_HOW_TO_MAKE_ONE = "make one with: openssl rand -hex 32"


def check_secret(secret: bytes | None) -> None:
    """Raises ValueError if the secret of several processes is missing or too short."""
    if secret is None:
        raise ValueError(
            "several processes need a secret that all of them know: give cluster_secret_file, or "
            f"the environment variable {SECRET_VARIABLE}; {_HOW_TO_MAKE_ONE}"
        )
    if len(secret) < LEAST_BYTES:
        raise ValueError(
            f"the cluster's secret has {len(secret)} bytes, and needs at least {LEAST_BYTES}; "
            f"{_HOW_TO_MAKE_ONE}"
        )


def find_secret(file: str | Path | None) -> bytes | None:
    """The secret in a file, else in the environment, without white space around it.

    Raises:
        ValueError: the file can't be read, or other users could read or have written it.
    """
    if file is not None:
        return _read(Path(file))
    text = os.environ.get(SECRET_VARIABLE, "").strip()
    return text.encode() or None


def _read(file: Path) -> bytes:
    name = f"cluster_secret_file {file}"
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{name} is not a regular file")
        if found.st_uid not in (os.geteuid(), 0):
            raise ValueError(
                f"{name} belongs to another user (uid {found.st_uid}): use one of your own"
            )
        # A group may read what root lent it, as Kubernetes mounts secrets for other users.
        lent = found.st_uid == 0 and os.geteuid() != 0
        if stat.S_IMODE(found.st_mode) & (0o037 if lent else 0o077):
            raise ValueError(
                f"{name} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}): "
                f"chmod 600 {file}"
            )
        data = os.read(descriptor, _MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{name} is longer than {_MOST_BYTES} bytes")
    return data.strip()

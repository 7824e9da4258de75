# SPDX-License-Identifier: Apache-2.0
"""Several processes that serve one model: how they find each other, and know each other.

`Cluster.join` is the way in. It runs without JAX until all processes have proved to each other that
they know the cluster's secret; SECURITY.md says what that protects, and what it does not.
"""

from slora_jax.cluster.channel import Channel, ClusterError
from slora_jax.cluster.cluster import DEFAULT_TIMEOUT_S, ENVIRONMENT, Cluster
from slora_jax.cluster.peers import ALONE, Peers, understand
from slora_jax.cluster.secret import SECRET_VARIABLE

__all__ = [
    "ALONE",
    "DEFAULT_TIMEOUT_S",
    "ENVIRONMENT",
    "SECRET_VARIABLE",
    "Channel",
    "Cluster",
    "ClusterError",
    "Peers",
    "understand",
]

# SPDX-License-Identifier: Apache-2.0
"""Serving one base Llama and thousands of LoRA adapters from one page pool.

The public names are imported on first use, so that the scheduler and the command line's help can be
imported without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slora_jax.adapters.errors import AdapterError as AdapterError
    from slora_jax.adapters.errors import AdapterUnavailable as AdapterUnavailable
    from slora_jax.config import EngineConfig as EngineConfig
    from slora_jax.config import ModelConfig as ModelConfig
    from slora_jax.core import EngineDeadError as EngineDeadError
    from slora_jax.core import FinishReason as FinishReason
    from slora_jax.core import OverloadedError as OverloadedError
    from slora_jax.core import RequestError as RequestError
    from slora_jax.core import RequestOutput as RequestOutput
    from slora_jax.core import SamplingParams as SamplingParams
    from slora_jax.engine.engine import Engine as Engine
    from slora_jax.engine.following import Follower as Follower

__version__ = "0.1.0"

_HOME = {
    "AdapterError": "slora_jax.adapters.errors",
    "AdapterUnavailable": "slora_jax.adapters.errors",
    "Engine": "slora_jax.engine.engine",
    "EngineConfig": "slora_jax.config",
    "EngineDeadError": "slora_jax.core",
    "FinishReason": "slora_jax.core",
    "Follower": "slora_jax.engine.following",
    "ModelConfig": "slora_jax.config",
    "OverloadedError": "slora_jax.core",
    "RequestError": "slora_jax.core",
    "RequestOutput": "slora_jax.core",
    "SamplingParams": "slora_jax.core",
}

__all__ = [
    "AdapterError",
    "AdapterUnavailable",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "Follower",
    "ModelConfig",
    "OverloadedError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

# SPDX-License-Identifier: Apache-2.0
"""How the server is set up, beside its engine."""

from dataclasses import dataclass
from pathlib import Path

from server.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(Limits):
    """Names are vLLM's where it has one.

    Attributes:
        model: Hugging Face directory of the base model.
        served_model_names: what requests call it; responses use the first.
        lora_modules: PEFT directories by name, loaded at the start.
        lora_dir: a directory of adapters' directories, each loaded on its first request.
        allow_runtime_lora_updating: serve `/v1/load_lora_adapter` and its siblings.
        lora_roots: directories that adapters may be loaded from at run time, beside `lora_dir`.
        max_loras: as given by the user; None: the engine's default.
        api_keys: one of them must be sent as a bearer token; empty: none is asked for.
        admin_api_keys: one of them must be sent to load and unload adapters.
        shutdown_timeout_s: seconds that requests in progress have to end after SIGTERM.
        restart: start the engine again when it dies.
        enable_log_requests: log prompts and parameters.
    """

    model: Path
    served_model_names: tuple[str, ...]
    lora_modules: tuple[tuple[str, Path], ...] = ()
    lora_dir: Path | None = None
    allow_runtime_lora_updating: bool = False
    lora_roots: tuple[Path, ...] = ()
    max_loras: int | None = None
    api_keys: tuple[str, ...] = ()
    admin_api_keys: tuple[str, ...] = ()
    shutdown_timeout_s: float = 30.0
    restart: bool = False
    enable_log_requests: bool = False

    def __post_init__(self) -> None:
        Limits.__post_init__(self)  # super() knows no classes with slots
        checks = {
            "served_model_names": (bool(self.served_model_names), "at least one name"),
            "api_keys": (all(self.api_keys), "non-empty strings"),
            "admin_api_keys": (
                all(self.admin_api_keys)
                and bool(
                    self.admin_api_keys or not (self.api_keys and self.allow_runtime_lora_updating)
                ),
                "given with api_keys and allow_runtime_lora_updating, or each client could replace "
                "the adapters of all: name the key that may, an API key if any client may",
            ),
            "shutdown_timeout_s": (self.shutdown_timeout_s >= 0, "at least 0"),
            "lora_roots": (
                not self.allow_runtime_lora_updating or bool(self.lora_roots or self.lora_dir),
                "given with allow_runtime_lora_updating: name the directories that adapters may "
                "be loaded from, or a lora_dir",
            ),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name} must be {allowed}")
        for root in (*self.lora_roots, *([self.lora_dir] if self.lora_dir else [])):
            if not root.is_dir():
                raise ValueError(f"{root}: no such directory")

    @property
    def base_name(self) -> str:
        return self.served_model_names[0]

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """Directories that adapters may be loaded from at run time."""
        return self.lora_roots + ((self.lora_dir,) if self.lora_dir else ())

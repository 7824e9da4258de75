# SPDX-License-Identifier: Apache-2.0
"""The options that all commands share: the model, its adapters, and the engine's settings."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from slora_jax.cli import CommandError
from slora_jax.cluster import (
    ALONE,
    DEFAULT_TIMEOUT_S,
    ENVIRONMENT,
    SECRET_VARIABLE,
    Cluster,
    ClusterError,
)
from slora_jax.config import EngineConfig
from slora_jax.openai.models import is_adapter_name
from slora_jax.scheduling.options import PolicyName, SchedulingOptions

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

# One option for each field of `SchedulingOptions` and `EngineConfig`: types and defaults are there.
_SCHEDULING_HELP: Mapping[str, str] = {
    "scheduling_policy": "who is admitted next: first come, last come, early abort, adapter "
    "clustering, fairness between adapters, priorities",
    "scheduling_lookahead": "requests without room that a step looks past",
    "max_overtakes": "requests that may be admitted past one that finds no room",
    "prefetch_lookahead": "requests next in line whose adapters are fetched before their turn",
    "admission_watermark": "share of the pool that an admission leaves free",
    "slo_first_token_s": "abort: seconds in which a first token is due",
    "slo_margin_s": "abort: seconds kept in hand beside the predicted time",
    "slo_rate_window_s": "abort: seconds over which arrivals and admissions are counted",
    "slo_rate_smoothing": "abort: weight of the latest window in the smoothed rates",
    "cluster_adapters": "cluster: most distinct adapters in the batch",
    "cluster_mode": "cluster: whether others fill up room that is left",
    "vtc_input_weight": "vtc: service that a token of the prompt counts for",
    "vtc_output_weight": "vtc: the same of the output",
    "vtc_adapter_weights": "vtc: shares of adapters (default: 1 each)",
    "priority_ageing_s": "priority: seconds of waiting that are worth one level",
}
_ENGINE_HELP: Mapping[str, str] = {
    "dtype": "of weights, KV cache and adapters; auto: the checkpoint's, on a CPU float32",
    "load_format": "dummy: random weights of the model's shape",
    "tensor_parallel_size": "devices that the model is dealt out to",
    "lora_partition": "how adapters are dealt out: each weight once, as S-LoRA does, or some on "
    "every device, without communication of its own; auto: no-comm",
    "page_size": "tokens of a KV page",
    "num_pages": "pages of the pool (default: what the device has room for)",
    "gpu_memory_utilization": "share of the device's memory for weights and pool",
    "max_model_len": "most tokens of a request (default: what the model was made for)",
    "max_num_seqs": "most requests in a batch (default: 64, or as many as a step has tokens)",
    "max_num_batched_tokens": "most tokens of a step; longer prompts are cut in chunks (default: "
    "512, or max-num-seqs)",
    "decode_batch_sizes": "batch sizes to compile for, up to max-num-seqs (default: powers of two)",
    "kernel_backend": "mosaic: kernels for NVIDIA Hopper; triton: since Ampere; xla: everywhere",
    "max_loras": "most adapters in the pool at once",
    "max_lora_rank": "largest rank of an adapter",
    "max_cpu_loras": "most adapters in host memory; others are read again (default: no limit)",
    "max_cpu_lora_gib": "GiB of host memory for adapters (default: half of it)",
    "lora_load_threads": "threads that read adapters from the disk",
    "lora_load_timeout_s": "seconds that reading an adapter may take",
    "max_logprobs": "most log-probabilities a position that may be asked for; -1: all",
    "seed": "of requests that bring none",
    "compilation_cache_dir": "where compiled programs are kept for the next start",
}


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds `--model` and what it and its adapters are called.

    Args:
        parser: of a command.
        required: whether there must be a model; else the shipped one is the default.
    """
    group = parser.add_argument_group("model and adapters")
    text = "Hugging Face directory of the base model"
    group.add_argument(
        "--model",
        required=required,
        metavar="DIR",
        help=text if required else f"{text} (default: the shipped one, with its adapters)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests call the base model (default: DIR as given, or its last part)",
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        default=[],
        type=_named_dir,
        metavar="NAME=DIR",
        help="PEFT directories of adapters, and what requests call them",
    )
    group.add_argument(
        "--lora-dir", metavar="DIR", help="a directory of adapters' directories, which name them"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the engine's settings, with the defaults of `EngineConfig`."""
    _add_fields(parser.add_argument_group("engine"), EngineConfig, _ENGINE_HELP)
    add_scheduling_arguments(parser)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what several processes need to be one engine."""
    group = parser.add_argument_group(
        "several processes",
        "whose devices hold one model together; the same command for all but --process-id",
    )
    texts = {
        "coordinator_address": (
            "HOST:PORT",
            str,
            "where process 0 listens for the others; [ADDRESS]:PORT for IPv6",
        ),
        "num_processes": ("N", int, "how many there are"),
        "process_id": ("N", int, "which of them this is; 0 takes requests, the others follow it"),
    }
    for name, (metavar, kind, text) in texts.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=metavar,
            help=f"{text} (default: the variable {ENVIRONMENT[name]})",
        )
    group.add_argument(
        "--cluster-secret-file",
        metavar="FILE",
        help="a secret that all of them know; readable by this user alone (default: the variable "
        f"{SECRET_VARIABLE}); made by: openssl rand -hex 32",
    )
    group.add_argument(
        "--cluster-timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="N",
        help="seconds in which all must have come (default: %(default)s)",
    )


def cluster_of(args: argparse.Namespace) -> Cluster | None:
    """The parsed `add_cluster_arguments`, or what the environment says; None: one process.

    Raises:
        CommandError: something is missing or out of range.
    """
    try:
        return Cluster.of(
            args.coordinator_address,
            args.num_processes,
            args.process_id,
            args.cluster_secret_file,
            args.cluster_timeout_s,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def follow(args: argparse.Namespace, cluster: Cluster, *, progress: bool) -> int:
    """Carries out what process 0 does, until that ends.

    Raises:
        CommandError: the model or an option is refused, or process 0 is gone or refuses this one.
    """
    try:
        peers = cluster.join()
        from slora_jax.engine.following import Follower

        Follower(args.model, peers=peers, progress=progress, **engine_options(args)).run()
    except (ValueError, OSError, ClusterError) as error:
        raise CommandError(str(error)) from error
    return 0


def add_scheduling_arguments(parser: argparse.ArgumentParser, *, choice: bool = True) -> None:
    """Adds the policies' settings, with the defaults of `SchedulingOptions`.

    Args:
        parser: of a command.
        choice: whether `--scheduling-policy` is one of them.
    """
    texts = {k: v for k, v in _SCHEDULING_HELP.items() if choice or k != "scheduling_policy"}
    _add_fields(parser.add_argument_group("scheduling"), SchedulingOptions, texts)


def _add_fields(group: Any, options: type[SchedulingOptions], texts: Mapping[str, str]) -> None:
    """Adds an option for each field of a dataclass that there is a text for."""
    hints = get_type_hints(options)
    for field in fields(options):
        if field.name not in texts:
            continue
        text = texts[field.name]
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=field.default,
            help=text if field.default is None else f"{text} (default: {field.default})",
            **_value_options(hints[field.name]),
        )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed `add_engine_arguments`, as keyword arguments of `Engine`."""
    values = {field.name: getattr(args, field.name) for field in fields(EngineConfig)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def scheduling_options(args: argparse.Namespace, policy: str) -> SchedulingOptions:
    """The parsed `add_scheduling_arguments` without the choice, for a policy.

    Raises:
        CommandError: a value is out of its range.
    """
    names = [field.name for field in fields(SchedulingOptions)]
    values = {name: getattr(args, name) for name in names if name != "scheduling_policy"}
    try:
        return SchedulingOptions(**values, scheduling_policy=cast(PolicyName, policy))
    except ValueError as error:
        raise CommandError(str(error)) from error


def base_names(args: argparse.Namespace) -> tuple[str, ...]:
    """What requests may call the base model."""
    return tuple(args.served_model_name or (args.model, Path(args.model).resolve().name))


def adapter_dirs(args: argparse.Namespace) -> dict[str, Path]:
    """The adapters' directories by name.

    Raises:
        CommandError: `--lora-dir` holds none, or two adapters or one and the base share a name.
    """
    named: list[tuple[str, Path]] = list(args.lora_modules)
    if args.lora_dir is not None:
        if not Path(args.lora_dir).is_dir():
            raise CommandError(f"--lora-dir {args.lora_dir}: no such directory")
        configs = sorted(Path(args.lora_dir).glob("*/adapter_config.json"))
        if not configs:
            raise CommandError(
                f"--lora-dir {args.lora_dir}: no directory in it has an adapter_config.json"
            )
        named += [(config.parent.name, config.parent) for config in configs]
    return check_adapter_names(args, named)


def check_adapter_names(
    args: argparse.Namespace, named: Iterable[tuple[str, Path]] | None = None
) -> dict[str, Path]:
    """Adapters' directories by name; those of `--lora-modules` if none are given.

    Raises:
        CommandError: two adapters or one and the base share a name.
    """
    adapters: dict[str, Path] = {}
    for name, path in args.lora_modules if named is None else named:
        if name in base_names(args):
            raise CommandError(
                f"the adapter {name!r} has the name of the base model: choose another, or another "
                "--served-model-name"
            )
        if not is_adapter_name(name):
            raise CommandError(f"an adapter can't be called {name!r}: rename it, without commas")
        if name in adapters:
            raise CommandError(f"two adapters are called {name!r}: {adapters[name]} and {path}")
        adapters[name] = path
    return adapters


def start_engine(
    args: argparse.Namespace, *, progress: bool
) -> "tuple[Engine, dict[str, Exception]]":
    """Loads the model and all adapters.

    Args:
        args: of `add_model_arguments`, `add_engine_arguments` and `add_cluster_arguments`.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The engine, and why adapters of `--lora-dir` are refused, by name.

    Raises:
        CommandError: the model, an adapter of `--lora-modules` or an option is refused, or another
            process is missing.
    """
    adapters = adapter_dirs(args)  # cheap mistakes first
    cluster = cluster_of(args)
    try:
        peers = ALONE if cluster is None else cluster.join()
        from slora_jax.engine.engine import Engine  # JAX takes a second to import

        engine = Engine(args.model, peers=peers, progress=progress, **engine_options(args))
    except (ValueError, OSError, ClusterError) as error:
        raise CommandError(str(error)) from error
    refused = engine.load_each_adapter(adapters, progress=progress)
    if any(name in refused for name, _ in args.lora_modules):
        raise CommandError(
            "; ".join(f"the adapter {name!r} is refused: {why}" for name, why in refused.items())
        )
    return engine, refused


def _named_dir(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(path)


class _NamedNumbers(argparse.Action):
    """Collects NAME=NUMBER values in a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for text in values or ():
            name, equals, number = str(text).rpartition("=")
            try:
                found[name] = float(number)
            except ValueError:
                equals = ""
            if not (name and equals):
                raise argparse.ArgumentError(self, f"{text!r} is not NAME=NUMBER")
        setattr(namespace, self.dest, found)


def _value_options(hint: Any) -> dict[str, Any]:
    """How argparse reads values of a type: a `Literal`, a tuple, a plain type, each or None."""
    hint = getattr(hint, "__value__", hint)  # of a named type
    if get_origin(hint) is UnionType:
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "nargs": "+", "metavar": "N"}
    if get_origin(hint) is Mapping:
        return {"action": _NamedNumbers, "nargs": "+", "metavar": "NAME=N"}
    return {"type": hint, "metavar": "N"}

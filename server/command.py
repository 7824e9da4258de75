# SPDX-License-Identifier: Apache-2.0
"""`slora serve`: an OpenAI-compatible server for one base model and its adapters."""

import argparse
import asyncio
import gc
import logging
import os
import resource
import socket
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from server.app import make_app
from server.config import ServerConfig
from server.engine_client import State
from server.frontend import FrontEnd
from server.http_protocol import BoundedHttp, Connections
from server.limits import Limits
from server.logs import log_as_json, logger
from slora_jax.cli import CommandError
from slora_jax.cli.options import (
    add_cluster_arguments,
    add_engine_arguments,
    add_model_arguments,
    base_names,
    check_adapter_names,
    cluster_of,
    engine_options,
    follow,
)
from slora_jax.config import MAX_NUM_SEQS, EngineConfig
from slora_jax.demo import BASE_MODEL, adapter_dirs
from slora_jax.tokenizer import TokenizerError

_DEMO_NAME = "slora-demo"
_DEMO_OPTIONS = {  # small and quick to compile
    "num_pages": 1024,
    "max_loras": 16,
}
_DEMO_STEP_TOKENS, _DEMO_BATCH = 128, 8
_API_KEY_VARIABLE = "SLORA_API_KEY"
_ADMIN_KEY_VARIABLE = "SLORA_ADMIN_API_KEY"
_SWITCH_S = 0.001  # that the event loop waits for a thread that is busy; Python's default is 5 ms
_SPARE_FILES = 256  # descriptors beside those of connections

_HELP = {
    "allow_runtime_lora_updating": "serve /v1/load_lora_adapter and /v1/unload_lora_adapter",
    "lora_roots": "directories that adapters may be loaded from at run time, beside --lora-dir",
    "shutdown_timeout_s": "seconds that requests in progress have to end after SIGTERM",
    "restart": "start the engine again when it dies",
    "enable_log_requests": "log prompts and parameters",
}
_LIMITS_HELP = {
    "max_connections": "open connections; more close those that wait, or get a 503",
    "max_header_kib": "KiB of a request's headers, else 431",
    "max_headers": "headers of a request, else 431",
    "header_timeout_s": "seconds in which headers must arrive, else 408",
    "body_timeout_s": "seconds in which a body must arrive, else 408",
    "send_timeout_s": "seconds in which a client must read what has been written for it",
    "max_body_mib": "MiB of a request's body, else 413",
    "max_bodies_mib": "MiB of all bodies of requests in progress, else 429",
    "max_body_values": "keys and values in a body, each token id included, else 400",
    "max_prompts": "prompts of a request, else 400",
    "max_messages": "messages of a conversation, else 400",
    "max_stop_strings": "stop strings of a request, else 400",
    "max_stop_chars": "characters of a stop string, else 400",
    "max_stop_token_ids": "stop token ids of a request, else 400",
    "max_queued_requests": "choices that may wait for a place in the batch, else 429",
    "max_tenant_requests": "choices in progress of one API key or adapter, else 429",
    "tenant_requests_per_minute": "requests of one API key or adapter, else 429",
    "tenant_tokens_per_minute": "tokens of prompts and outputs of one API key or adapter, else 429",
    "request_timeout_s": "seconds from a request's arrival to its end, else 503",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slora serve`."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: a free one (default: %(default)s)"
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help=f"clients must send one of them (default: the variable {_API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--admin-api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="those that load and unload adapters must send one of them "
        f"(default: the variable {_ADMIN_KEY_VARIABLE})",
    )
    defaults = {field.name: field.default for field in fields(ServerConfig)}
    for name, text in _HELP.items():
        flag, default = f"--{name.replace('_', '-')}", defaults[name]
        if isinstance(default, bool):
            group.add_argument(flag, action="store_true", help=text)
        elif name == "lora_roots":
            group.add_argument(flag, nargs="+", type=Path, default=[], metavar="DIR", help=text)
        else:
            kind = int if isinstance(default, int) else float
            shown = text if default is None else f"{text} (default: %(default)s)"
            group.add_argument(flag, type=kind, default=default, metavar="N", help=shown)
    group.add_argument("--quiet", action="store_true", help="log warnings only")
    group.add_argument(
        "--enable-lora", action="store_true", help="accepted for vLLM's sake: it always is"
    )
    _add_limits(parser)
    add_model_arguments(parser, required=False)
    add_engine_arguments(parser)
    add_cluster_arguments(parser)
    parser.set_defaults(max_loras=None)  # whether it was given is what gateways hear of


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits of what clients may cost")
    for field in fields(Limits):
        kind = int if field.type in (int, int | None) else float
        shown = "none" if field.default is None else "%(default)s"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar="N",
            help=f"{_LIMITS_HELP[field.name]} (default: {shown})",
        )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it; 0 if it ended as told.

    Raises:
        CommandError: an option is not supported, the port is taken, or the engine could not start.
    """
    max_loras = args.max_loras
    _fill_in_demo(args)
    if args.max_loras is None:
        args.max_loras = EngineConfig().max_loras
    cluster = cluster_of(args)
    progress = Console(stderr=True).is_terminal and not args.quiet
    if cluster is not None and cluster.process_id:
        return follow(args, cluster, progress=progress)
    if cluster is not None and args.restart:
        raise CommandError("--restart can't start the other processes again: leave it out")
    log_as_json(logging.WARNING if args.quiet else logging.INFO)
    try:
        config = _server_config(args, max_loras)
        options = engine_options(args)
        EngineConfig(**options)  # cheap mistakes first
        front = FrontEnd(config, options, cluster, progress=progress, quiet=args.quiet)
    except (ValueError, TokenizerError) as error:
        raise CommandError(str(error)) from error
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # nothing of the libraries is garbage: looking through them takes a while
    with _listen(args.host, args.port) as listening:  # before anything is loaded
        server = _Server(args, front)
        server.run([listening])
    if front.client.ready is None and front.client.state is State.DEAD and not server.told:
        raise CommandError(str(front.client.failure))
    return 0


def _connections(most: int) -> int:
    """How many connections there may be, with as many file descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + _SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    allowed = max(wanted - _SPARE_FILES, 1)
    if allowed < most:
        logger.warning(
            "fewer connections than --max-connections: the limit of open files is too low",
            extra={"connections": allowed, "files": wanted},
        )
    return allowed


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise CommandError(f"can't listen on {host}, port {port}: {error}") from error


def _fill_in_demo(args: argparse.Namespace) -> None:
    """Without a model, the shipped one and its adapters are served."""
    if args.model is not None:
        return
    args.model = str(BASE_MODEL)
    args.served_model_name = args.served_model_name or [_DEMO_NAME]
    args.lora_modules = [*adapter_dirs().items(), *args.lora_modules]
    defaults = {field.name: field.default for field in fields(EngineConfig)} | {"max_loras": None}
    for name, value in _DEMO_OPTIONS.items():
        if getattr(args, name) == defaults[name]:
            setattr(args, name, value)
    _size_demo(args)


def _size_demo(args: argparse.Namespace) -> None:
    """Few programs to compile, whatever the user has chosen of the sizes."""
    seqs, tokens, sizes = args.max_num_seqs, args.max_num_batched_tokens, args.decode_batch_sizes
    if tokens is None:
        args.max_num_batched_tokens = max(_DEMO_STEP_TOKENS, seqs or 0, *(sizes or ()))
    if sizes is None:
        most = seqs or min(MAX_NUM_SEQS, args.max_num_batched_tokens)
        args.decode_batch_sizes = (most,) if most <= _DEMO_BATCH else (_DEMO_BATCH, most)


def _server_config(args: argparse.Namespace, max_loras: int | None) -> ServerConfig:
    """Raises ValueError if a value is out of its range."""
    keys = args.api_key or os.environ.get(_API_KEY_VARIABLE, "").split()
    admin_keys = args.admin_api_key or os.environ.get(_ADMIN_KEY_VARIABLE, "").split()
    named = (*_HELP, *(field.name for field in fields(Limits)))
    given = {name: getattr(args, name) for name in named if name != "lora_roots"}
    check_adapter_names(args)
    return ServerConfig(
        **given,
        model=Path(args.model),
        served_model_names=base_names(args),
        lora_modules=tuple((name, Path(os.path.abspath(path))) for name, path in args.lora_modules),
        lora_dir=None if args.lora_dir is None else Path(os.path.abspath(args.lora_dir)),
        lora_roots=tuple(args.lora_roots),
        max_loras=max_loras,
        api_keys=tuple(keys),
        admin_api_keys=tuple(admin_keys),
    )


_LAST_WORDS_S = (
    0.5  # for those that were cut off, and those that were on their way to a busy server
)


class _Server(uvicorn.Server):
    """Drains before it stops: `/health` goes on saying so meanwhile."""

    def __init__(self, args: argparse.Namespace, front: FrontEnd) -> None:
        http = partial(
            BoundedHttp,
            limits=front.config,
            connections=Connections(_connections(front.config.max_connections)),
        )
        super().__init__(
            uvicorn.Config(
                make_app(front),
                http=http,  # type: ignore[arg-type]  # it makes a protocol for each connection
                ws="none",
                host=args.host,
                port=args.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,  # of connections that only stay open
            )
        )
        self._front = front
        self._draining: asyncio.Task[None] | None = None
        self.told = False

    async def on_tick(self, counter: int) -> bool:
        if self.told and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        if self._front.client.ready is None and self._front.client.state is State.DEAD:
            return True  # it never started: there is nothing to serve
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal has it drain, the next one stop at once."""
        if self.told:
            self.should_exit = self.force_exit = True
        self.told = True

    async def _drain(self) -> None:
        await self._front.drain()
        await asyncio.sleep(_LAST_WORDS_S)
        self.should_exit = True

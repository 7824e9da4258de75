# SPDX-License-Identifier: Apache-2.0
"""The `slora` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

# Each command's module and what it does. The server's stands above this package, which does not
# import it: the module is loaded by name when the command is asked for.
_COMMANDS = {
    "convert": (f"{__name__}.convert", "convert a base model from safetensors to Orbax, or back"),
    "demo": (f"{__name__}.demo", "serve the adapters of this package, all in one batch"),
    "generate": (f"{__name__}.generate", "serve a file of completion requests"),
    "serve": ("server.command", "serve HTTP: OpenAI's API, metrics, and a page to try it"),
    "simulate": (f"{__name__}.simulate", "compare scheduling policies on a simulated device"),
}


class CommandError(Exception):
    """A command cannot start as asked; the message is all that the user needs to see."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 2 where a command could not start."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    level = logging.WARNING if getattr(args, "quiet", False) else logging.INFO
    try:
        with _log_to_stderr(level):
            return args.run(args)
    except CommandError as error:
        print(f"slora {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"slora {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for `argv`; only the module of the subcommand that it names is imported."""
    parser = argparse.ArgumentParser(
        prog="slora", description="Serve one base Llama and many LoRA adapters from one page pool."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (path, summary) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            module = import_module(path)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time: rich replaces it while it draws a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Shows this package's messages, above all what is being compiled, while a command runs."""
    logger, handler = logging.getLogger("slora_jax"), _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)

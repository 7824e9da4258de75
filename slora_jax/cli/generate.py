# SPDX-License-Identifier: Apache-2.0
"""`slora generate`: a file of completion requests in, a file of responses out.

Lines go through the engine a bounded number at a time, and results are written in input order as
soon as all before them are, so that a file may be of any length.
"""

import argparse
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from slora_jax.cli import CommandError
from slora_jax.cli.options import (
    add_cluster_arguments,
    add_engine_arguments,
    add_model_arguments,
    base_names,
    cluster_of,
    follow,
    start_engine,
)
from slora_jax.core import RequestError, RequestOutput
from slora_jax.openai.completions import CompletionReply, CompletionRequest, CompletionResponse
from slora_jax.openai.errors import ErrorResponse, error_of, parse_body
from slora_jax.openai.selection import find_adapters
from slora_jax.openai.tokens import TokenTexts

if TYPE_CHECKING:
    from slora_jax.engine.engine import Engine

_BATCHES_AHEAD = 4  # of requests in the engine: enough that no slot waits for this loop
_STANDARD_STREAM = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slora generate`."""
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="one body of a /v1/completions request a line; - for stdin",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="one response or error object a line, in the same order; - for stdout",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar, no messages, no summary"
    )
    add_model_arguments(parser)
    add_engine_arguments(parser)
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves the whole file; 0 even if single lines failed: output and summary say so."""
    console = Console(stderr=True)
    draw = console.is_terminal and not args.quiet
    cluster = cluster_of(args)
    if cluster is not None and cluster.process_id:
        return follow(args, cluster, progress=draw)
    _check_files(args.input, args.output)
    with _open(args.input, "rb") as source:
        engine, refused = start_engine(args, progress=draw)
        for name, error in refused.items():
            print(f"the adapter {name!r} is refused: {error}", file=sys.stderr)
        batch = Batch(engine, base_names(args), refused)
        total = _count_requests(args.input)
        tally = _Tally()
        # Opened only now: what cannot start must not empty the results of an earlier run.
        with _open(args.output, "wb") as sink, _progress(console, draw) as bar:
            task = bar.add_task("requests", total=total)
            for result in batch.serve(source):
                sink.write(result.to_json().encode() + b"\n")
                sink.flush()
                tally.add(result)
                bar.advance(task)
    if not args.quiet:
        print(tally.summary(), file=sys.stderr)
    return 0


@dataclass(slots=True)
class _Tally:
    """What has been written since the batch began."""

    done: int = 0
    failed: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, result: CompletionResponse | ErrorResponse) -> None:
        if isinstance(result, ErrorResponse):
            self.failed += 1
        else:
            self.done += 1
            self.tokens += result.usage.completion_tokens

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return (
            f"{self.done} done, {self.failed} failed, {self.tokens} tokens in {seconds:.1f} s "
            f"({self.tokens / seconds:.0f} tokens/s)"
        )


@dataclass(slots=True, eq=False)
class _Line:
    """One line of the input on its way; its choices' outputs by the engine's request ids."""

    request: CompletionRequest | None = None
    outputs: dict[str, RequestOutput | None] = field(default_factory=dict)
    result: CompletionResponse | ErrorResponse | None = None


class Batch:
    """Serves lines of JSON through an engine that nobody else uses.

    Args:
        engine: with all adapters loaded.
        base_names: what requests call the base model.
        refused: why adapters could not be loaded, by name; lines that name one fail with that.
    """

    def __init__(
        self,
        engine: "Engine",
        base_names: Sequence[str],
        refused: Mapping[str, Exception] = MappingProxyType({}),
    ) -> None:
        self._engine = engine
        self._refused = refused
        self._base_names = base_names
        self._texts = TokenTexts(engine.tokenizer)
        self._most_running = _BATCHES_AHEAD * engine.options.max_num_seqs
        self._running: dict[str, _Line] = {}  # by the engine's request ids
        self._lines: deque[_Line] = deque()  # not handed out yet, in input order

    def serve(self, lines: Iterable[bytes]) -> Iterator[CompletionResponse | ErrorResponse]:
        """Yields one result for each line that is not blank, in order.

        What finishes while a slower line before it runs is kept until then.
        """
        for line in lines:
            if line.strip():
                self._lines.append(self._submit(line))
            while len(self._running) >= self._most_running:
                self._step()
            yield from self._take_finished()
        while self._engine.has_unfinished:
            self._step()
            yield from self._take_finished()

    def _submit(self, body: bytes) -> _Line:
        """Hands a line's choices to the engine: all of them, or none and there is an error."""
        line = _Line()
        try:
            line.request = parse_body(CompletionRequest, body)
            self._add_requests(line, line.request)
        except RequestError as error:
            for request_id in line.outputs:
                self._engine.abort(request_id)
                del self._running[request_id]
            line.result = ErrorResponse.of(error)
        return line

    def _add_requests(self, line: _Line, request: CompletionRequest) -> None:
        if request.stream:
            raise RequestError("stream is not supported: a file has no streams", "stream")
        prompts, known = request.prompts, {*self._engine.adapters.store, *self._refused}
        adapters = find_adapters(request, self._base_names, known)
        for name in filter(None, adapters):
            if name in self._refused:
                why = f"the adapter {name!r} is refused: {self._refused[name]}"
                raise RequestError(why, "model")
        for prompt, adapter in zip(prompts, adapters, strict=True):
            if isinstance(prompt, str) and self._engine.tokenizer is not None:
                prompt = self._engine.tokenizer.encode(prompt, request.add_special_tokens)
            params = request.sampling_params()
            for choice in range(request.n):
                request_id = self._engine.add_request(
                    prompt, params.of_choice(choice), adapter=adapter, priority=request.priority
                )
                line.outputs[request_id] = None
                self._running[request_id] = line

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._finish(self._running.pop(output.request_id), output)

    def _finish(self, line: _Line, output: RequestOutput) -> None:
        line.outputs[output.request_id] = output
        outputs = [output for output in line.outputs.values() if output is not None]
        if len(outputs) == len(line.outputs):
            assert line.request is not None
            errors = [error for error in map(error_of, outputs) if error is not None]
            if errors:
                line.result = ErrorResponse.of(errors[0])
            else:
                reply = CompletionReply(line.request, uuid.uuid4().hex, self._texts)
                line.result = reply.response(outputs)

    def _take_finished(self) -> Iterator[CompletionResponse | ErrorResponse]:
        while self._lines and (result := self._lines[0].result) is not None:
            self._lines.popleft()
            yield result


def _check_files(source: str, sink: str) -> None:
    """Refuses to write over the input."""
    if source == _STANDARD_STREAM or not (Path(source).exists() and Path(sink).exists()):
        return
    if Path(source).samefile(sink):
        raise CommandError(f"--input and --output are the same file, {source}")


def _open(path: str, mode: Literal["rb", "wb"]) -> AbstractContextManager[BinaryIO]:
    if path == _STANDARD_STREAM:
        return nullcontext(sys.stdin.buffer if mode == "rb" else sys.stdout.buffer)
    try:
        return Path(path).open(mode)
    except OSError as error:
        raise CommandError(f"cannot open {path}: {error.strerror}") from error


def _count_requests(path: str) -> int | None:
    """For the progress bar; None if the input can be read only once."""
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _progress(console: Console, draw: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not draw,
    )

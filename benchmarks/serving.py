# SPDX-License-Identifier: Apache-2.0
"""What HTTP costs: the same requests through `slora serve`, all streams open, and without it.

python -m benchmarks.serving --shape llama-2-7b --batch 256 --streams 500

Both engines are made alike, in processes of their own, one after the other. A request's time per
token is taken between its first and its last one: offline where the engine hands them out, over
HTTP where the client reads them.
"""

import argparse
import asyncio
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Timing, Work
from benchmarks.record import ROOT, Recorder, say
from benchmarks.shapes import MODELS
from benchmarks.synthetic import adapter_pages, write_adapters, write_model, write_tokenizer
from pallas_kernels.layout import PageLayout, ceil_div

PAGE_SIZE = 16
START_S = 500.0


@dataclass(frozen=True, slots=True)
class Served:
    """What one way of serving took, in seconds.

    Attributes:
        per_token: of each request, on average, from its first token to its last.
        first_token: of each request, from when all were sent.
        gaps: between two tokens of a request, or between two pieces of its stream.
        whole: from the first request to the last token.
    """

    per_token: list[float]
    first_token: list[float]
    gaps: list[float]
    whole: float


def prompts(args: argparse.Namespace, vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab, (args.streams, args.prompt)).tolist()


def adapter_of(args: argparse.Namespace, number: int) -> str | None:
    return f"adapter-{number % args.adapters}" if args.adapters else None


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `EngineConfig`, the same for both ways."""
    config = MODELS[args.shape]
    layout = PageLayout(config.num_key_value_heads, config.head_dim, PAGE_SIZE)
    pages = args.batch * ceil_div(args.prompt + args.output, PAGE_SIZE)
    pages += args.adapters * adapter_pages(config, layout, args.rank)
    return {
        "load_format": "dummy",
        "page_size": PAGE_SIZE,
        "num_pages": pages * 11 // 10,
        "max_model_len": args.prompt + args.output,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": max(512, args.batch),
        "decode_batch_sizes": sorted({max(args.batch // 4, 1), args.batch}),
        "max_loras": max(args.adapters, 1),
        "max_lora_rank": args.rank,
        "lora_load_threads": 8,
    }


def check_pieces(http: Served) -> None:
    """Refuses what says nothing: a stream that came in one piece took no time per token."""
    if not all(http.per_token):
        raise RuntimeError("a stream came in one piece: ask for more tokens with --output")


# Without HTTP


def offline(args: argparse.Namespace, directory: Path) -> Served:
    """All requests at once, in an engine of this process."""
    from slora_jax import Engine, SamplingParams

    adapters = {path.name: path for path in (directory / "adapters").glob("adapter-*")}
    engine = Engine(directory / "model", adapters=adapters, **engine_options(args))
    engine.warm_up()
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    times: dict[str, list[float]] = {}
    start = time.perf_counter()
    for number, prompt in enumerate(prompts(args, engine.config.vocab_size)):
        times[engine.add_request(prompt, params, adapter=adapter_of(args, number))] = []
    while engine.has_unfinished:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            times[output.request_id].append(now)
    return served(start, list(times.values()), args.output)


def served(start: float, times: Sequence[Sequence[float]], tokens: int) -> Served:
    """From when each request's tokens came."""
    return Served(
        per_token=[(one[-1] - one[0]) / (tokens - 1) for one in times],
        first_token=[one[0] - start for one in times],
        gaps=[b - a for one in times for a, b in itertools.pairwise(one)],
        whole=max(one[-1] for one in times) - start,
    )


# Over HTTP


def over_http(args: argparse.Namespace, directory: Path) -> Served:
    """All requests at once, each a stream of its own, from a server of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "slora_jax.cli", "serve", "--port", str(port), "--quiet"]
    command += ["--model", str(directory / "model"), "--served-model-name", "base"]
    paths = sorted((directory / "adapters").glob("adapter-*"))
    if paths:
        command += ["--lora-modules", *(f"{path.name}={path}" for path in paths)]
    for name, value in engine_options(args).items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        _wait_until_ready(port, process)
        bodies = [
            {
                "model": adapter_of(args, number) or "base",
                "prompt": prompt,
                "max_tokens": args.output,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            for number, prompt in enumerate(prompts(args, MODELS[args.shape].vocab_size))
        ]
        # A front end's first request waits for imports; the engine has been warmed up too.
        asyncio.run(_read_all(port, [{**bodies[0], "max_tokens": 2}]))
        start, times = asyncio.run(_read_all(port, bodies))
        return served(start, times, args.output)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_ready(port: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


async def _read_all(port: int, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[list[float]]]:
    """Opens all connections, sends all requests at once; when each one's pieces came."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in bodies]
    start = time.perf_counter()
    reads = [_read(*one, body) for one, body in zip(connections, bodies, strict=True)]
    return start, await asyncio.gather(*reads)


async def _read(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]
) -> list[float]:
    """No HTTP library: five hundred streams are to cost the client little."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    received, times = b"", []
    while b"data: [DONE]" not in received[-64:]:
        piece = await reader.read(1 << 16)
        assert piece, f"the stream broke off: {received[-500:]!r}"
        if b'"choices"' in piece:
            times.append(time.perf_counter())
        received += piece
    assert received.startswith(b"HTTP/1.1 200"), received[:500]
    assert b'"error"' not in received, received[-500:]
    writer.close()
    return times


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, required=True)
    parser.add_argument("--batch", type=int, default=256, help="most requests that run")
    parser.add_argument("--streams", type=int, default=500, help="requests, all open at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each")
    parser.add_argument("--output", type=int, default=128, help="tokens of each")
    parser.add_argument("--adapters", type=int, default=64, help="that the requests ask for")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--results", type=Path, metavar="FILE", help="to append the results to")
    parser.add_argument("--offline", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.offline is not None:  # this is the process of its own
        print(json.dumps(asdict(offline(args, args.offline))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory, config = Path(name), MODELS[args.shape]
        write_tokenizer(write_model(directory / "model", config), config.vocab_size)
        written = write_adapters(
            directory / "written", config, count=max(args.adapters, 1), rank=args.rank
        )
        (directory / "adapters").mkdir()
        for adapter in list(written)[: args.adapters]:
            (directory / "adapters" / adapter).symlink_to(written[adapter])
        say("without HTTP")
        command = [sys.executable, "-m", "benchmarks.serving", *(argv or sys.argv[1:])]
        command += ["--offline", str(directory)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        alone = Served(**json.loads(done.stdout.splitlines()[-1]))
        say("over HTTP")
        http = over_http(args, directory)
    check_pieces(http)
    _record(args, alone, http)
    return 0


def _record(args: argparse.Namespace, alone: Served, http: Served) -> None:
    """The limit of a token over HTTP is what it takes without."""

    def ms(seconds: float) -> float:
        return round(1e3 * seconds, 3)

    tokens = args.streams * args.output
    timing = Timing.of([1e6 * one for one in http.per_token])
    limit = 1e6 * statistics.median(alone.per_token)
    Recorder(args.results).add(
        "serving",
        timing,
        Work(0, 0),
        limit,
        shape=args.shape,
        batch=args.batch,
        streams=args.streams,
        prompt=args.prompt,
        output=args.output,
        adapters=args.adapters,
        rank=args.rank,
        step_ms=ms(statistics.median(http.per_token)),
        step_ms_offline=ms(statistics.median(alone.per_token)),
        gap_p99_ms=ms(float(np.quantile(http.gaps, 0.99))),
        gap_p99_ms_offline=ms(float(np.quantile(alone.gaps, 0.99))),
        ttft_ms=ms(statistics.median(http.first_token)),
        ttft_ms_offline=ms(statistics.median(alone.first_token)),
        tokens_per_s=round(tokens / http.whole, 1),
        tokens_per_s_offline=round(tokens / alone.whole, 1),
    )


if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's trace on vLLM. It needs vLLM 0.26 or later, in an environment of its own beside JAX.

python -m benchmarks.baselines.vllm_lora --setting S1 --adapters 5,1000 --rate 60 --duration 60 \
    --results benchmarks/results/baselines.jsonl

The same trace, lengths, batch and definitions as `benchmarks.trace`; random weights, no prefix
cache, CUDA graphs. vLLM keeps `--slots` adapters on the device, each in a slot of the largest rank,
and all of them in host memory. An engine is started for each row: its slots are memory.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.replay import Given, replay
from benchmarks.settings import (
    SETTINGS,
    Setting,
    add_result_arguments,
    add_workload_arguments,
    arrivals_of,
    prompts_of,
    runs_of,
    workload_fields,
)
from benchmarks.shared_adapters import name_of
from benchmarks.synthetic import MODULES, write_adapters, write_model
from benchmarks.trace import counts
from benchmarks.trace_figures import figures
from slora_jax.simulator.workloads import Arrival


def write_all(directory: Path, setting: Setting, count: int) -> list[Path]:
    """Adapters of the setting's ranks, in PEFT's format; those of a rank share a file."""
    by_rank = {
        rank: list(
            write_adapters(directory / str(rank), setting.config, count=count, rank=rank).values()
        )
        for rank in dict.fromkeys(setting.ranks)
    }
    return [by_rank[setting.ranks[i % len(setting.ranks)]][i] for i in range(count)]


class VllmServing:
    """A `Serving` over vLLM's engine.

    Args:
        args: the command's.
        model: the base model's directory.
        adapters: theirs.
    """

    def __init__(self, args: argparse.Namespace, model: Path, adapters: Sequence[Path]):
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports]
            RequestOutputKind,
        )

        self._vllm, self._delta = vllm, RequestOutputKind.DELTA
        setting = SETTINGS[args.setting]
        options: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "hf_overrides": {"architectures": ["LlamaForCausalLM"]},
            "max_model_len": 2 * setting.longest,
            "max_num_seqs": args.batch,
            "max_num_batched_tokens": args.step_tokens,
            "gpu_memory_utilization": 0.9,
            "enable_prefix_caching": False,
        }
        if adapters:
            options |= {
                "enable_lora": True,
                "max_loras": min(len(adapters), args.slots),
                "max_cpu_loras": len(adapters),
                "max_lora_rank": max(setting.ranks),
                "lora_target_modules": list(MODULES),
            }
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**options))
        self._requests = [
            LoRARequest(name_of(number), number + 1, str(path))
            for number, path in enumerate(adapters)
        ]
        for request in self._requests:  # into host memory, before anybody waits for them
            self._engine.add_lora(request)
        self._trace = 0
        self.prompts: list[list[int]] = []

    @property
    def is_busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    def add(self, number: int, one: Arrival) -> str:
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=one.output,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._delta,
        )
        lora = None if one.adapter is None else self._requests[one.adapter]
        request_id = f"{self._trace}-{number}"
        prompt = {"prompt_token_ids": self.prompts[number]}
        self._engine.add_request(request_id, prompt, params, lora_request=lora)
        return request_id

    def step(self) -> list[Given]:
        given = []
        for output in self._engine.step():
            metrics = output.metrics
            waited = 0.0 if metrics is None else metrics.scheduled_ts - metrics.queued_ts
            given.append(Given(output.request_id, len(output.outputs[0].token_ids), waited))
        return given

    def end(self, added: int) -> None:
        """Aborts what is left of a trace of which so many requests came."""
        self._engine.abort_request([f"{self._trace}-{number}" for number in range(added)])
        while self.is_busy:
            self._engine.step()
        self._trace += 1

    def close(self) -> None:
        """Ends the engine's process, whose memory the next one needs."""
        self._engine.engine_core.shutdown()


def serve(serving: VllmServing, arrivals: Sequence[Arrival], args: argparse.Namespace) -> dict:
    """The figures of a trace."""
    serving.prompts = prompts_of(args, arrivals)
    served, end = replay(serving, arrivals, args.duration, drain=False)
    serving.end(len(served))
    return figures(served, end, args.duration)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument(
        "--adapters", type=counts, default=[5, 100], metavar="N,…", help="a row each"
    )
    parser.add_argument("--batch", type=int, default=256, help="most requests that run")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens of a step")
    parser.add_argument("--slots", type=int, default=256, help="most adapters on the device")
    add_result_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX only names the device
    # but has started CUDA in this process then, which a fork would not survive.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    import vllm  # pyright: ignore[reportMissingImports]

    setting = SETTINGS[args.setting]
    recorder = Recorder(args.results)
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory, "model"), setting.config)
        paths = write_all(Path(directory, "adapters"), setting, max(args.adapters))
        for adapters in args.adapters:
            say(f"starting vLLM for {adapters} adapters")
            serving = VllmServing(args, model, paths[:adapters])
            serve(serving, [Arrival(0.0, 0 if adapters else None, 64, 16)] * args.batch, args)
            for run in runs_of(args):
                found = serve(serving, arrivals_of(args, adapters), args)
                say(f"{adapters} adapters: {found['req_s']} req/s, {found['out_tok_s']} tok/s")
                us = 1e6 / max(found["out_tok_s"], 1e-9)
                recorder.add(
                    "vllm_lora",
                    Timing(us, us, us),
                    Work(0, 0),
                    None,
                    dtype="bfloat16",
                    batch=args.batch,
                    step_tokens=args.step_tokens,
                    slots=args.slots,
                    **workload_fields(args, adapters),
                    run=run,
                    vllm=vllm.__version__,
                    **found,
                )
            serving.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

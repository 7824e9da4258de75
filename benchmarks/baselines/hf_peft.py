# SPDX-License-Identifier: Apache-2.0
"""S-LoRA's trace on Hugging Face Transformers and PEFT. It needs torch, transformers and peft.

python -m benchmarks.baselines.hf_peft --setting S1 --adapters 5,100 --rate 60 --duration 60 \
    --results benchmarks/results/baselines.jsonl

Random weights of the true shape in bfloat16, Transformers' default attention (torch's scaled dot
product), prompts padded on the left, greedy; batches of one adapter each, as large as fit
(`batching.py`).
"""

import argparse
import os
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.baselines.batching import OneAdapterAtATime
from benchmarks.measure import Timing, Work
from benchmarks.record import Recorder, say
from benchmarks.replay import replay
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
from benchmarks.synthetic import MODULES
from benchmarks.trace import counts
from benchmarks.trace_figures import figures
from slora_jax.simulator.workloads import Arrival

KV_SHARE = 0.8  # of the free memory: the rest is for activations, and for growing the cache


class PeftDecoder:
    """A `Decoder` on torch.

    Args:
        setting: the model and the adapters' ranks.
        adapters: how many.
    """

    def __init__(self, setting: Setting, adapters: int):
        import torch  # pyright: ignore[reportMissingImports]
        from peft import (  # pyright: ignore[reportMissingImports]
            LoraConfig,
            get_peft_model,
        )
        from transformers import LlamaConfig, LlamaForCausalLM

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = setting.config
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_position_embeddings,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self._device):
            model = LlamaForCausalLM(config).eval()
            for number in range(adapters):
                rank = setting.ranks[number % len(setting.ranks)]
                lora = LoraConfig(
                    r=rank, lora_alpha=rank, target_modules=list(MODULES), init_lora_weights=False
                )
                if number == 0:
                    model = get_peft_model(model, lora, adapter_name=name_of(0))
                else:
                    model.add_adapter(name_of(number), lora)
        torch.set_default_dtype(before)
        self._model = model.to(torch.bfloat16).requires_grad_(False)
        self._vocab = shape.vocab_size
        self.prompts: list[list[int]] = []
        layers, width = shape.num_hidden_layers, shape.num_key_value_heads * shape.head_dim
        self._kv_bytes = 2 * 2 * layers * width  # of a token
        self._longest = 2 * setting.longest

    def most(self) -> int:
        """Requests of the greatest length whose keys and values fit in memory."""
        if self._device == "cpu":
            return 8
        free, _ = self._torch.cuda.mem_get_info()
        return int(KV_SHARE * free / (self._kv_bytes * self._longest))

    def start(self, adapter: int | None, numbers: Sequence[int]) -> None:
        torch = self._torch
        if adapter is not None:
            self._model.set_adapter(name_of(adapter))
        prompts = [self.prompts[number] for number in numbers]
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        self._mask = torch.from_numpy(mask).to(self._device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = None
        self._forward(torch.from_numpy(ids).to(self._device), self._positions)

    def step(self) -> None:
        torch = self._torch
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        self._forward(self._tokens, self._positions)

    def _forward(self, ids, positions) -> None:
        with self._torch.inference_mode():
            out = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cache = out.past_key_values
            self._tokens = out.logits[:, -1:].argmax(-1)
            self._tokens.cpu()  # a server reads them


def serve(
    decoder: PeftDecoder, arrivals: Sequence[Arrival], args: argparse.Namespace, most: int
) -> dict:
    """The figures of a trace."""
    decoder.prompts = prompts_of(args, arrivals)
    serving = OneAdapterAtATime(decoder, most, time.perf_counter)
    served, end = replay(serving, arrivals, args.duration, drain=False)
    sizes = serving.batches
    return figures(served, end, args.duration) | {
        "batches": len(sizes),
        "batch_mean": round(sum(sizes) / max(len(sizes), 1), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_workload_arguments(parser)
    parser.add_argument(
        "--adapters", type=counts, default=[5, 100], metavar="N,…", help="a row each"
    )
    parser.add_argument(
        "--batch", type=int, help="most requests of a batch; as many as fit if unset"
    )
    add_result_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX only names the device
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    setting = SETTINGS[args.setting]
    recorder = Recorder(args.results)
    say("making the model and its adapters")
    decoder = PeftDecoder(setting, max(args.adapters))
    most = args.batch or decoder.most()
    say(f"batches of at most {most}")
    warm_up = [Arrival(0.0, 0 if max(args.adapters) else None, 8, 4)] * 2
    serve(decoder, warm_up, args, most)
    for run in runs_of(args):
        for adapters in args.adapters:
            found = serve(decoder, arrivals_of(args, adapters), args, most)
            say(f"{adapters} adapters: {found['req_s']} req/s, {found['out_tok_s']} tok/s")
            us = 1e6 / max(found["out_tok_s"], 1e-9)
            recorder.add(
                "hf_peft",
                Timing(us, us, us),
                Work(0, 0),
                None,
                dtype="bfloat16",
                batch=most,
                **workload_fields(args, adapters),
                run=run,
                torch=torch.__version__,
                transformers=transformers.__version__,
                peft=peft.__version__,
                **found,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

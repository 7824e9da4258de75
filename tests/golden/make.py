# SPDX-License-Identifier: Apache-2.0
"""Makes the golden files: tiny random Llamas, LoRA adapters, and what Transformers + PEFT say.

    python tests/golden/make.py [folder]

needs torch, transformers and peft, and rewrites every case's folder from fixed seeds. `reference`
runs one request through Transformers + PEFT, so a test can also compare live where they are
installed. Importing this module needs only NumPy. README.md describes the files.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cases import Case

MIN_GAP = 1e-2  # nats between the two likeliest tokens, far above float32 noise
MIN_EFFECT = 0.05  # nats by which an adapter must move some log-probability


def reference(
    model_dir: Path, adapter_dir: Path | None, prompt_ids: list[int], max_tokens: int
) -> tuple[list[int], np.ndarray]:
    """Runs one request alone through Transformers and PEFT: float32, eager attention, no cache.

    Args:
        model_dir: A checkpoint's folder.
        adapter_dir: A PEFT adapter's folder, or None for the base model.
        prompt_ids: The prompt.
        max_tokens: How many tokens to generate; end-of-sequence ids don't stop it.

    Returns:
        The greedy continuation [max_tokens], and log-probabilities [T, V] in float32 with
        T = len(prompt_ids) + max_tokens - 1. Row t is the distribution of token t + 1 of the
        prompt and continuation together; the one after the last token is left out.
    """
    import torch

    model = _load_base(model_dir)
    if adapter_dir is not None:
        from peft import PeftModel

        with warnings.catch_warnings():  # PEFT warns about an untied adapter of tied weights
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    torch.set_float32_matmul_precision("highest")
    ids = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]  # [len(ids), V]
            ids.append(int(logits[-1].argmax()))
        logprobs = torch.log_softmax(logits.float(), dim=-1)
    return ids[len(prompt_ids) :], logprobs.numpy()


def _load_base(model_dir: Path) -> Any:
    """Loads a checkpoint as a float32 Transformers model."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )


def _fill(param: Any, std: float, rng: np.random.Generator, mean: float = 0.0) -> None:
    """Overwrites a torch parameter with normal noise, drawn by NumPy: the same on every CPU."""
    import torch

    noise = rng.standard_normal(tuple(param.shape), dtype=np.float32)
    with torch.no_grad():
        param.copy_(torch.from_numpy(noise * np.float32(std) + np.float32(mean)))


def make_model(case: "Case", folder: Path, rng: np.random.Generator) -> None:
    """Saves a random Llama whose layers all matter and whose logits have a deviation near 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # Without token ids of its own a model can't end a generation early.
    model = LlamaForCausalLM(LlamaConfig(**case.config, bos_token_id=None, eos_token_id=None))
    head_std = 2 * model.config.hidden_size**-0.5  # the last norm's output has unit variance
    for name, param in model.named_parameters():
        if "norm" in name:
            _fill(param, 0.2, rng, mean=1.0)
        elif name.endswith("bias"):
            _fill(param, 0.3, rng)
        elif "lm_head" in name or ("embed" in name and model.config.tie_word_embeddings):
            _fill(param, head_std, rng)
        elif "embed" in name:
            _fill(param, 1.0, rng)
        else:
            _fill(param, 1.3 * param.shape[1] ** -0.5, rng)
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink()
    if case.hub_config:
        _to_hub_config(folder / "config.json")


def _to_hub_config(path: Path) -> None:
    """Rewrites a config.json of Transformers 5 to the keys of the Llamas on the hub."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    if theta != 10000.0:
        config["rope_theta"] = theta
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_adapter(
    model_dir: Path, fields: dict[str, Any], folder: Path, rng: np.random.Generator
) -> None:
    """Saves a random adapter, neither factor zero, as PEFT's save_pretrained writes it."""
    from peft import LoraConfig, get_peft_model

    fields = dict(fields)
    save_embedding_layers = fields.pop("save_embedding_layers", "auto")
    with warnings.catch_warnings():  # about tied weights and saved embeddings, both on purpose
        warnings.simplefilter("ignore")
        model = get_peft_model(_load_base(model_dir), LoraConfig(task_type="CAUSAL_LM", **fields))
        for name, param in model.named_parameters():
            if "lora_embedding_A" in name:  # [r, vocabulary]: picked, not summed over
                _fill(param, 1.0, rng)
            elif "lora_A" in name:  # [r, in]
                _fill(param, param.shape[1] ** -0.5, rng)
            elif "lora_B" in name or "lora_embedding_B" in name:  # [out, r]
                _fill(param, 0.5 * param.shape[1] ** -0.5, rng)
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT keeps module names in sets, whose order changes from run to run, and the local path.
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config[key], list):
            config[key].sort()
    config["base_model_name_or_path"] = None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_effects(case: "Case", folder: Path, prompt: list[int]) -> None:
    """Asserts that base and adapters all differ clearly from one another on one prompt."""
    outputs: dict[str | None, np.ndarray] = {}
    for name in (None, *case.adapters):
        adapter_dir = folder / "adapters" / name if name else None
        _, outputs[name] = reference(folder / "model", adapter_dir, prompt, 1)
        for other, logprobs in outputs.items():
            effect = np.abs(outputs[name] - logprobs).max()
            assert name == other or effect > MIN_EFFECT, (folder.name, name, other, effect)


def make_case(case: "Case", folder: Path) -> None:
    """Writes one case's folder anew and prints its smallest top-2 gap and its size."""
    import peft
    import torch
    import transformers
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(case.seed)
    make_model(case, folder / "model", rng)
    for name, fields in case.adapters.items():
        make_adapter(folder / "model", fields, folder / "adapters" / name, rng)

    requests, tensors = [], {}
    for i, (adapter, length, max_tokens) in enumerate(case.requests):
        prompt = rng.integers(case.config["vocab_size"], size=length).tolist()
        adapter_dir = folder / "adapters" / adapter if adapter else None
        tokens, logprobs = reference(folder / "model", adapter_dir, prompt, max_tokens)
        top2 = np.sort(logprobs[length - 1 :], axis=-1)[:, -2:]  # [max_tokens, 2]
        gaps = (top2[:, 1] - top2[:, 0]).tolist()
        assert len(set(tokens)) > 2, "a model that repeats itself tests little; take another seed"
        tensors[f"logprobs.{i}"] = logprobs
        requests.append({"adapter": adapter, "prompt": prompt, "tokens": tokens, "gaps": gaps})
    _check_effects(case, folder, max((r["prompt"] for r in requests), key=len))
    min_gap = min(gap for r in requests for gap in r["gaps"])
    assert min_gap > MIN_GAP, f"{folder.name}: a gap of {min_gap:.1e}; take another seed"

    versions = {m.__name__: str(m.__version__) for m in (torch, transformers, peft)}
    document = {
        "note": case.note, "versions": versions, "min_gap": min_gap, "requests": requests,
    }  # fmt: skip
    (folder / "reference.json").write_text(json.dumps(document, indent=1) + "\n")
    save_file(tensors, folder / "reference.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    spread = np.concatenate(list(tensors.values())).std(axis=-1).mean()
    distinct = len({token for r in requests for token in r["tokens"]})
    print(f"{folder.name:12} smallest gap {min_gap:.4f}  deviation of logits {spread:.2f}  "
          f"distinct tokens {distinct:3}  {size / 1024:.0f} KiB")  # fmt: skip


def main() -> None:
    """Makes every case below the folder named on the command line, or beside this file."""
    import torch
    from cases import CASES
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of sums, and so the last bits, may depend on it
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, case in CASES.items():
        make_case(case, root / name)


if __name__ == "__main__":
    main()

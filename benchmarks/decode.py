"""Decoding speed of one stream, greedy: this project's engines against Hugging Face `generate`.

All run the same random weights (speed does not depend on their values) in one process, interleaved: `classic` is
GPT2LMHeadModel with ReLU and the sinusoidal table as `wpe`. On a CPU, the CPU engine runs in its three precisions.
Everything that computes in fp32 must generate equal ids. Prints a table, then one JSON line. Needs `transformers`.
`tinystories bench decode --peers` compares with more programs on CPUs; this script also runs on CUDA (--device cuda).

    python benchmarks/decode.py                                   seed-89m, 200 tokens, 5 runs each
    python benchmarks/decode.py --preset nano --vocab 512 --tokens 20 --runs 2
"""

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from script import run_main

from tinystories.checkpoint import WEIGHTS, ModelFiles, state_dict_to_save
from tinystories.config import SamplingConfig
from tinystories.config_file import load_config
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.protocol import Engine
from tinystories.engine.torch_engine import TorchEngine
from tinystories.files import sha256
from tinystories.formats.hf.mapping import to_transformers
from tinystories.generate.sampling import sample
from tinystories.model import GPT
from tinystories.weights.load import load_fp32, quantize

GREEDY = SamplingConfig(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="seed-89m", help="preset or TOML file; its sizes are used with the classic architecture"
    )
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--prompt-tokens", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    base_config = load_config(options.preset).model
    config = dataclasses.replace(
        base_config, architecture="classic", n_kv_head=0, tied=False, vocab_size=options.vocab, dropout=0.0
    )
    if options.prompt_tokens + options.tokens > config.n_ctx:
        parser.error(f"--prompt-tokens plus --tokens must be at most the context length, {config.n_ctx}")
    model = GPT(config).eval()
    prompt = torch.randint(config.vocab_size, (options.prompt_tokens,)).tolist()
    decoders = {
        "hugging_face": make_hf_decoder(model, options.device, prompt, options.tokens),
        "torch": make_engine_decoder(
            TorchEngine(model, device=options.device, precision="fp32", owns_model=True), prompt, options.tokens
        ),
    }
    if options.device == "cpu":
        for precision, weights in build_cpu_weights(model).items():
            engine = CpuEngine(config, weights, EngineConfig(n_slots=1, threads=options.threads))
            decoders[f"cpu {precision}"] = make_engine_decoder(engine, prompt, options.tokens)
    seconds, ids = time_interleaved(decoders, options.runs)
    for name in ids.keys() - {"cpu int8", "cpu int4"}:
        assert ids[name] == ids["hugging_face"], f"{name} and Hugging Face generated different ids"

    rates = {name: [options.tokens / s for s in times] for name, times in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    round_ratios = {
        name: [b / a for a, b in zip(s, seconds["hugging_face"], strict=True)] for name, s in seconds.items()
    }
    ratios = {name: statistics.median(values) for name, values in round_ratios.items()}
    print(f"{'':14}{'tokens/s':>10}{'min':>8}{'max':>8}{'ratio':>8}{'min':>8}{'max':>8}")
    for name, values in rates.items():
        row = [medians[name], min(values), max(values)]
        print(f"{name:14}{row[0]:10.1f}{row[1]:8.1f}{row[2]:8.1f}", end="")
        print(f"{ratios[name]:8.2f}{min(round_ratios[name]):8.2f}{max(round_ratios[name]):8.2f}")
    measurements = {"tokens_per_s": medians, "ratio": ratios, "runs": rates, "parameters": config.n_params}
    print(json.dumps({"benchmark": "decode", **vars(options), **measurements, **software_versions()}))


def build_cpu_weights(model: GPT) -> dict[str, dict[str, Any]]:
    """Return the weights in each precision of the CPU engine, as if loaded from a model directory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(state_dict_to_save(model), folder / WEIGHTS)
        checksums = {WEIGHTS: sha256(folder / WEIGHTS)}
        files = ModelFiles(folder, model.config, {}, SamplingConfig(), checksums)
        return {
            "fp32": {name: np.array(weight) for name, weight in load_fp32(files).items()},
            "int8": dict(quantize(files, "int8")),
            "int4": dict(quantize(files, "int4")),
        }


def make_engine_decoder(engine: Engine, prompt: list[int], n_tokens: int) -> Callable[[], list[int]]:
    def run() -> list[int]:
        u = np.zeros(1, dtype=np.float32)
        logits = engine.prefill(0, prompt)[None]
        ids = sample(logits, GREEDY, u)
        while len(ids) < n_tokens:
            ids += sample(engine.step([0], ids[-1:]), GREEDY, u)
        return ids

    return run


def make_hf_decoder(model: GPT, device: str, prompt: list[int], n_tokens: int) -> Callable[[], list[int]]:
    hf_model = to_transformers(model.config, state_dict_to_save(model)).to(
        device
    )  # a copy: ours repacks the model afterwards
    hf_model.generation_config.eos_token_id = None
    tokens = torch.tensor([prompt], device=device)

    def run() -> list[int]:
        with torch.inference_mode():
            out = hf_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        ids: list[int] = out[0, len(prompt) :].tolist()
        return ids

    return run


def time_interleaved(
    decoders: dict[str, Callable[[], list[int]]], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Run the decoders interleaved (A/B/A/B) after a warmup run each; return the seconds per run and the last ids."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    ids: dict[str, list[int]] = {}
    for i in range(runs + 1):
        for name, run in decoders.items():
            start_time = time.perf_counter()
            ids[name] = run()
            if i > 0:
                seconds[name].append(time.perf_counter() - start_time)
    return seconds, ids


def software_versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}


if __name__ == "__main__":
    run_main(main)

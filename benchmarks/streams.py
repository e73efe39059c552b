"""Tokens per second of one and of many concurrent streams on a GPU: the torch engine against Hugging Face `generate`.

Both run the same random weights (speed does not depend on their values) in the same precision, interleaved (A B A B
...), on the same prompts. `greedy` is greedy decoding; `sampled` is the default of `tinystories generate` (temperature
0.8, min-p 0.05) through our own generation loop, including detokenization. transformers runs in its fastest
configuration: a static cache, and on CUDA its compiled decoding step with CUDA graphs. Times include prefill and follow
two warmup runs. Prints a table and a JSON line for each number of streams; the ratio is the median over the rounds. The
ids of both are compared: in bf16 they eventually diverge where two ids are almost equally likely.

    python benchmarks/streams.py --preset modern-89m --vocab 50257 --streams 1,256,32 --device cuda
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from script import parse_settings, run_main

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.config_file import load_config
from tinystories.data.build_tokenizer import build_from_spec
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.device import select_device, select_precision
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.formats.hf.mapping import to_transformers
from tinystories.generate.batching import Request, generate_all
from tinystories.generate.sampling import sample
from tinystories.model import GPT

TokenIds = list[list[int]]
Generate = Callable[[TokenIds, int], TokenIds]  # (prompts, number of new ids) -> new ids of each
GREEDY = SamplingConfig(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="modern-89m", help="preset or TOML file with the model sizes")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--streams", default="1,256,32", help="numbers of streams, comma-separated")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="new tokens per stream")
    parser.add_argument("--runs", type=int, default=5, help="rounds; each program runs once per round")
    parser.add_argument("--device", default="auto")
    options, overrides = parser.parse_known_args()
    settings = parse_settings(overrides)
    shape = load_config(options.preset, settings).model
    config = dataclasses.replace(shape, vocab_size=options.vocab, dropout=0.0)
    if options.prompt_tokens + options.tokens > config.n_ctx:
        raise UserError(f"--prompt-tokens plus --tokens must be at most the context length, {config.n_ctx}")
    device = select_device(options.device)
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # variance-preserving initialization
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    hf_generator = make_hf_generator(model, device)
    for n_streams in map(int, options.streams.split(",")):
        print(json.dumps(compare(options, config, model, hf_generator, device, n_streams)), flush=True)


def compare(
    options: argparse.Namespace,
    config: ModelConfig,
    model: GPT,
    hf_generator: Generate,
    device: torch.device,
    n_streams: int,
) -> dict[str, Any]:
    """Time all generators on `n_streams` streams, interleaved."""
    our_model = GPT(config).eval()
    our_model.load_state_dict(model.state_dict())
    engine = TorchEngine(our_model, n_slots=n_streams, device=device, owns_model=True)
    rng = np.random.default_rng(n_streams)
    prompts = rng.integers(config.vocab_size, size=(n_streams, options.prompt_tokens)).tolist()
    generators: dict[str, Generate] = {
        "ours, greedy": make_greedy_generator(engine),
        "ours, sampled": make_story_generator(engine, build_plain_tokenizer(config.vocab_size)),
        "transformers, greedy": hf_generator,
    }
    ids = {name: [write(prompts, options.tokens) for _ in range(2)][-1] for name, write in generators.items()}
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(options.runs):
        for name, write in generators.items():
            start_time = time.perf_counter()
            write(prompts, options.tokens)
            seconds[name].append(time.perf_counter() - start_time)
    return report(options, engine, n_streams, seconds, ids)


def make_greedy_generator(engine: TorchEngine) -> Generate:
    def generate(prompts: TokenIds, n_tokens: int) -> TokenIds:
        slots, u = list(range(len(prompts))), np.zeros(len(prompts), dtype=np.float32)
        sequences = [sample(engine.prefill(slot, prompts[slot])[None], GREEDY, u[:1]) for slot in slots]
        while len(sequences[0]) < n_tokens:
            new = sample(engine.step(slots, [ids[-1] for ids in sequences]), GREEDY, u)
            for ids, token in zip(sequences, new, strict=True):
                ids.append(token)
        return sequences

    return generate


def make_story_generator(engine: TorchEngine, tokenizer: Tokenizer) -> Generate:
    def generate(prompts: TokenIds, n_tokens: int) -> TokenIds:
        texts = ["x" * len(prompt) for prompt in prompts]
        requests = (
            Request(prompt=text, max_tokens=n_tokens, number=i, ignore_end=True) for i, text in enumerate(texts)
        )
        return [list(story.ids) for story in generate_all(engine, tokenizer, requests)]

    return generate


def build_plain_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a byte-level tokenizer with `vocab_size` ids; the unused ones decode to nothing."""
    parts = build_from_spec("bpe:257", lambda: ["a"]).json_data
    vocab = parts["model"]["vocab"]
    extra = {f"<unused {i}>": i for i in range(len(vocab), vocab_size - 1)}  # the last is END
    return Tokenizer(json.dumps({**parts, "model": {**parts["model"], "vocab": vocab | extra}}))


def make_hf_generator(model: GPT, device: torch.device) -> Generate:
    from transformers import CompileConfig

    hf_model = to_transformers(model.config, dict(model.state_dict())).eval()
    dtype = torch.bfloat16 if select_precision(device) == "bf16" else torch.float32
    hf_model = hf_model.to(device=device, dtype=dtype)
    hf_model.generation_config.eos_token_id = None
    compile_options = {"compile_config": CompileConfig(mode="reduce-overhead")} if device.type == "cuda" else {}

    def generate(prompts: TokenIds, n_tokens: int) -> TokenIds:
        tokens = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            output = hf_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                **compile_options,
            )
        ids: TokenIds = output[:, tokens.shape[1] :].tolist()
        return ids

    return generate


def report(
    options: argparse.Namespace,
    engine: TorchEngine,
    n_streams: int,
    seconds: dict[str, list[float]],
    ids: dict[str, TokenIds],
) -> dict[str, Any]:
    """Print the table for one number of streams, and return its JSON line."""
    hf_seconds = seconds["transformers, greedy"]
    rates = {name: n_streams * options.tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(b / a for a, b in zip(times, hf_seconds, strict=True))
        for name, times in seconds.items()
    }
    pairs = list(zip(ids["ours, greedy"], ids["transformers, greedy"], strict=True))
    matching = sum(a == b for our_ids, hf_ids in pairs for a, b in zip(our_ids, hf_ids, strict=True)) / (
        n_streams * options.tokens
    )
    print(f"\n{n_streams} streams of {options.tokens} tokens, {engine.device}, {engine.precision}")
    for name, rate in rates.items():
        print(f"{name:24} {rate:12,.0f} tokens/s {ratios[name]:8.2f}")
    device_name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else platform.machine()
    return {
        "benchmark": "streams",
        "preset": options.preset,
        "device": device_name,
        "precision": engine.precision,
        "streams": n_streams,
        "tokens": options.tokens,
        "tokens_per_s": rates,
        "ratio": ratios,
        "same_ids": matching,
        "peak_gb": torch.cuda.max_memory_allocated(engine.device) / 1e9 if engine.device.type == "cuda" else None,
    }


if __name__ == "__main__":
    run_main(main)

"""The programs that `tinystories bench` compares, all running the same weights: each is a function from prompts to ids.

`python -m tinystories.bench.competitors NAME PRECISION FOLDER WORKLOAD` runs one of them as a child process, from the
files of `bench/setup.py`; `runner.BenchProcess` talks to it over stdin and stdout.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.checkpoint import ModelFiles
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.protocol import Engine
from tinystories.errors import UserError

Prompts = list[list[int]]
GenerateFn = Callable[[Prompts, int], Prompts]  # (prompts, n) -> n new ids for each prompt, decoded greedily
SHAPE_FILE, WEIGHTS_FILE = "shape.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a benchmark runs: threads, batch size and length."""

    threads: int
    streams: int  # batch size: sequences that are decoded together
    tokens: int  # length of one sequence, prompt included
    shortlist: int = 0  # rows of the LM head that our CPU engine computes (the first ones); 0 computes all


def read_model_files(folder: Path) -> ModelFiles:
    """Describe the weights in `folder` by its shape file (without a tokenizer)."""
    shape = json.loads((folder / SHAPE_FILE).read_text(encoding="utf-8"))
    return ModelFiles(folder, ModelConfig(**shape["config"]), {}, SamplingConfig(), {WEIGHTS_FILE: shape["sha256"]})


def make_cpu_generator(folder: Path, precision: str, workload: Workload) -> GenerateFn:
    from tinystories.engine.cpu.engine import CpuEngine

    engine = CpuEngine.load(
        read_model_files(folder),
        EngineConfig(precision=precision, n_slots=workload.streams, threads=workload.threads),
        shortlist_ids=np.arange(workload.shortlist) if workload.shortlist else None,
    )
    return from_engine(engine)


def make_torch_generator(folder: Path, precision: str, workload: Workload) -> GenerateFn:
    import torch

    from tinystories.engine.torch_engine import TorchEngine

    torch.set_num_threads(workload.threads)
    engine_config = EngineConfig(n_slots=workload.streams, device="cpu", precision=precision)
    return from_engine(TorchEngine.load(read_model_files(folder), engine_config))


def from_engine(engine: Engine) -> GenerateFn:
    """Greedy batched decoding with one of our engines."""
    from tinystories.generate.sampling import sample

    greedy = SamplingConfig(temperature=0.0)

    def generate(prompts: Prompts, n: int) -> Prompts:
        u = np.zeros(len(prompts), dtype=np.float32)
        slots = list(range(len(prompts)))
        generated = [sample(engine.prefill(slot, prompts[slot])[None], greedy, u[:1]) for slot in slots]
        while len(generated[0]) < n:
            new_ids = sample(engine.step(slots, [ids[-1] for ids in generated]), greedy, u)
            for ids, new in zip(generated, new_ids, strict=True):
                ids.append(new)
        return generated

    return generate


def make_transformers_generator(folder: Path, precision: str, workload: Workload) -> GenerateFn:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(workload.threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    assert precision == "fp32"

    def generate(prompts: Prompts, n: int) -> Prompts:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            sequences = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False, pad_token_id=0
            )
        ids: Prompts = sequences[:, tokens.shape[1] :].tolist()
        return ids

    return generate


def make_ctranslate2_generator(folder: Path, precision: str, workload: Workload) -> GenerateFn:
    from ctranslate2 import Generator

    generator = Generator(
        str(folder / f"ct2-{precision}"),
        device="cpu",
        compute_type="float32" if precision == "fp32" else precision,
        intra_threads=workload.threads,
    )

    def generate(prompts: Prompts, n: int) -> Prompts:
        results = generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def silence_log(llama: Any) -> None:
    """Disable llama.cpp's log. The module holds the callback, so that it is not garbage-collected while in use."""
    llama.tinystories_log = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(llama.tinystories_log, None)


def make_llama_cpp_generator(folder: Path, precision: str, workload: Workload) -> GenerateFn:
    """Use llama.cpp's C API, because the Python class `Llama` adds overhead to every token."""
    import llama_cpp as llama

    silence_log(llama)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(folder / f"{precision}.gguf").encode(), llama.llama_model_default_params()
    )
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max = workload.tokens * workload.streams, workload.streams
    params.n_batch = params.n_ubatch = max(512, workload.streams)
    params.n_threads = params.n_threads_batch = workload.threads
    context = llama.llama_init_from_model(model, params) if model else None
    if not context:
        raise UserError(f"llama.cpp cannot load {folder / f'{precision}.gguf'}")
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(params.n_batch, 0, 1)
    vocab_size = read_model_files(folder).config.vocab_size

    def decode_greedy(rows: list[tuple[int, int, int]]) -> list[int]:
        """Decode rows of (id, position, stream) and return the argmax ids.

        Rows of different streams (a decode step) give one id each; rows of one stream (prefill) give that of the last.
        """
        all_rows = len({stream for *_, stream in rows}) == len(rows)
        batch.n_tokens = len(rows)
        for i, (token, position, stream) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, stream
            batch.logits[i] = all_rows or i == len(rows) - 1
        if llama.llama_decode(context, batch):
            raise UserError("llama.cpp's KV cache is too small for these tokens")
        n = len(rows) if all_rows else 1
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (n, vocab_size))
        ids: list[int] = logits.argmax(axis=1).tolist()
        return ids

    def generate(prompts: Prompts, n: int) -> Prompts:
        llama.llama_memory_clear(memory, True)
        generated = [decode_greedy([(id, at, s) for at, id in enumerate(prompt)]) for s, prompt in enumerate(prompts)]
        while len(generated[0]) < n:
            rows = [(ids[-1], len(prompts[s]) + len(ids) - 1, s) for s, ids in enumerate(generated)]
            for ids, new in zip(generated, decode_greedy(rows), strict=True):
                ids.append(new)
        return generated

    return generate


def peak_memory_mb() -> float | None:
    """Return this process's peak resident memory in MB (10^6 bytes); None where /proc does not exist."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), None)


GENERATORS = {
    "tinystories": make_cpu_generator,
    "torch": make_torch_generator,
    "transformers": make_transformers_generator,
    "ctranslate2": make_ctranslate2_generator,
    "llama.cpp": make_llama_cpp_generator,
}


def main() -> None:
    """After {"ready"}, answer each JSON line {"prompts", "tokens"} with {"seconds", "cpu_seconds", "ids", "peak_mb"}.

    `cpu_seconds` is processor time, of all threads together.
    """
    name, precision, folder, workload_json = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")  # stdout is for replies; what libraries print goes to stderr
    os.dup2(2, 1)
    generate = GENERATORS[name](Path(folder), precision, Workload(**json.loads(workload_json)))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started_at = time.perf_counter(), time.process_time()
        ids = generate(request["prompts"], request["tokens"])
        ended_at = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = (end - start for start, end in zip(started_at, ended_at, strict=True))
        reply = {"seconds": seconds, "cpu_seconds": cpu_seconds, "ids": ids, "peak_mb": peak_memory_mb()}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()

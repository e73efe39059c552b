"""Programs that write with the same weights as ours, each as one function from prompts to new ids.

`python -m tinystories.interop.peers NAME PRECISION FOLDER ...` is one of them as a process; `contest` speaks with it.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.checkpoint import ModelFiles, sha256, write_json
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.engine.protocol import Engine
from tinystories.errors import UserError
from tinystories.interop import gguf

Prompts = list[list[int]]
Write = Callable[[Prompts, int], Prompts]  # as many new ids for each prompt, the likeliest each time
SHAPE, WEIGHTS = "shape.json", "model.safetensors"
# Packages that must be there; `tinystories` itself needs none.
PACKAGES = {
    "tinystories": (),
    "torch": ("torch", "jaxtyping"),
    "transformers": ("torch", "transformers"),
    "ctranslate2": ("torch", "transformers", "ctranslate2"),
    "llama.cpp": ("llama_cpp", "gguf"),
}
PRECISIONS = {
    "tinystories": ("fp32", "int8", "int4"),
    "torch": ("fp32",),
    "transformers": ("fp32",),
    "ctranslate2": ("fp32", "int8"),
    "llama.cpp": ("fp32", "int8", "int4"),
}
GGUF_TYPES = {"fp32": 0, "int8": 7, "int4": 2}  # LLAMA_FTYPE_ALL_F32, _MOSTLY_Q8_0, _MOSTLY_Q4_0


@dataclasses.dataclass(frozen=True)
class Room:
    threads: int
    streams: int
    tokens: int  # of a stream, prompt and all
    device: str = "cpu"
    shortlist: int = 0  # the head of our CPU engine has so many rows (the first); 0: all


def why_not(name: str, config: ModelConfig) -> str | None:
    """Why a peer cannot take part; None if it can."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install 'tinystories-gpt[bench]'"
    if name == "llama.cpp":
        return gguf.why_not(config)
    if name == "ctranslate2" and not config.qk_norm and config.architecture != "classic":
        return "is only built for models with QK-norm"
    if name == "ctranslate2" and not config.scaled_scores:
        return "scales attention scores"
    return None


def version(name: str) -> str:
    package = {"tinystories": "tinystories-gpt", "llama.cpp": "llama-cpp-python"}.get(name, name)
    return importlib.metadata.version(package)


def build(folder: Path, name: str, precision: str) -> None:
    """What the peer reads, made from the weights in `folder`; once."""
    if name == "tinystories":
        from tinystories.engine.cpu.weights import packed

        if precision != "fp32":
            packed(files_of(folder), precision)  # type: ignore[arg-type]
    elif name == "llama.cpp":
        build_gguf(folder, precision)
    elif name in ("transformers", "ctranslate2"):
        if not (folder / "hf").exists():
            save_hf(folder)
        if name == "ctranslate2":
            from ctranslate2.converters import TransformersConverter

            quantization = "float32" if precision == "fp32" else precision
            TransformersConverter(str(folder / "hf")).convert(
                str(folder / f"ct2-{precision}"), quantization=quantization
            )


def build_gguf(folder: Path, precision: str) -> None:
    from tinystories.engine.cpu.weights import source_of

    whole = folder / "fp32.gguf"
    files = files_of(folder)
    if not whole.exists():
        gguf.write_gguf(files.config, source_of(files), whole)
    if precision == "fp32":
        return
    import llama_cpp

    silence(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = GGUF_TYPES[precision], os.cpu_count() or 1
    params.pure = precision == "int4"  # else its head stays in 6 bits, which is slower
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(folder / f"{precision}.gguf").encode(), params):
        raise UserError(f"llama.cpp could not make a {precision} file of these weights")


def save_hf(folder: Path) -> None:
    """A directory of transformers, with a tokeniser whose words are the ids themselves (CTranslate2 wants one)."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    from tinystories.interop.hf import to_transformers

    disable_progress_bar()
    config = files_of(folder).config
    to_transformers(config, load_file(folder / WEIGHTS)).save_pretrained(folder / "hf")
    words = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", bos_token="0", eos_token="0").save_pretrained(
        folder / "hf"
    )


def files_of(folder: Path) -> ModelFiles:
    shape = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
    return ModelFiles(folder, ModelConfig(**shape["config"]), {}, SamplingConfig(), {WEIGHTS: shape["sha256"]})


def describe(folder: Path, config: ModelConfig) -> None:
    """Says of the weights in `folder` what model they are."""
    write_json(folder / SHAPE, {"config": dataclasses.asdict(config), "sha256": sha256(folder / WEIGHTS)})


def writer(name: str, precision: str, folder: Path, room: Room) -> Write:
    if name == "tinystories":
        return cpu_engine(folder, precision, room)
    return {"torch": torch_engine, "transformers": hugging_face, "ctranslate2": ctranslate2, "llama.cpp": llama_cpp}[
        name
    ](folder, precision, room)


def cpu_engine(folder: Path, precision: str, room: Room) -> Write:
    from tinystories.engine.cpu.engine import CpuEngine

    engine = CpuEngine.load(
        files_of(folder),
        precision=precision,  # type: ignore[arg-type]
        n_slots=room.streams,
        threads=room.threads,
        shortlist=np.arange(room.shortlist) if room.shortlist else None,
    )
    return by_protocol(engine)


def torch_engine(folder: Path, precision: str, room: Room) -> Write:
    import torch

    from tinystories.engine.torch_engine import TorchEngine

    torch.set_num_threads(room.threads)
    return by_protocol(
        TorchEngine.load(files_of(folder), n_slots=room.streams, device=room.device, precision=precision)
    )


def by_protocol(engine: Engine) -> Write:
    from tinystories.generate.sampling import next_ids

    greedy = SamplingConfig(temperature=0.0)

    def write(prompts: Prompts, n: int) -> Prompts:
        u = np.zeros(len(prompts), dtype=np.float32)
        slots = list(range(len(prompts)))
        told = [next_ids(engine.prefill(slot, prompts[slot])[None], greedy, u[:1]) for slot in slots]
        while len(told[0]) < n:
            for ids, new in zip(told, next_ids(engine.step(slots, [ids[-1] for ids in told]), greedy, u), strict=True):
                ids.append(new)
        return told

    return write


def hugging_face(folder: Path, precision: str, room: Room) -> Write:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(room.threads)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).to(room.device).eval()
    model.generation_config.eos_token_id = None
    assert precision == "fp32"

    def write(prompts: Prompts, n: int) -> Prompts:
        tokens = torch.tensor(prompts, device=room.device)
        with torch.inference_mode():
            told = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False, pad_token_id=0
            )
        ids: Prompts = told[:, tokens.shape[1] :].tolist()
        return ids

    return write


def ctranslate2(folder: Path, precision: str, room: Room) -> Write:
    from ctranslate2 import Generator

    kind = "float32" if precision == "fp32" else precision
    generator = Generator(
        str(folder / f"ct2-{precision}"), device=room.device, compute_type=kind, intra_threads=room.threads
    )

    def write(prompts: Prompts, n: int) -> Prompts:
        results = generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return write


def silence(llama: Any) -> None:
    """llama.cpp's log; the callback must outlive it, so it is kept on the module."""
    llama.tinystories_log = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(llama.tinystories_log, None)


def llama_cpp(folder: Path, precision: str, room: Room) -> Write:
    """By its C interface: the Python class around it costs time of its own for each token."""
    import llama_cpp as llama

    silence(llama)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(folder / f"{precision}.gguf").encode(), llama.llama_model_default_params()
    )
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max = room.tokens * room.streams, room.streams
    params.n_batch = params.n_ubatch = max(512, room.streams)
    params.n_threads = params.n_threads_batch = room.threads
    context = llama.llama_init_from_model(model, params) if model else None
    if not context:
        raise UserError("llama.cpp cannot load the file")
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(params.n_batch, 0, 1)
    vocab_size = files_of(folder).config.vocab_size

    def likeliest(rows: list[tuple[int, int, int]]) -> list[int]:
        """After rows of (id, position, stream): of the last row where they are of one stream, else of each."""
        whole = len({stream for *_, stream in rows}) == len(rows)
        batch.n_tokens = len(rows)
        for i, (token, position, stream) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, stream
            batch.logits[i] = whole or i == len(rows) - 1
        if llama.llama_decode(context, batch):
            raise UserError("llama.cpp has no room for these tokens")
        n = len(rows) if whole else 1
        logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (n, vocab_size))
        ids: list[int] = logits.argmax(axis=1).tolist()
        return ids

    def write(prompts: Prompts, n: int) -> Prompts:
        llama.llama_memory_clear(memory, True)
        told = [likeliest([(id, at, s) for at, id in enumerate(prompt)]) for s, prompt in enumerate(prompts)]
        while len(told[0]) < n:
            rows = [(ids[-1], len(prompts[s]) + len(ids) - 1, s) for s, ids in enumerate(told)]
            for ids, new in zip(told, likeliest(rows), strict=True):
                ids.append(new)
        return told

    return write


def peak_megabytes() -> float | None:
    """Largest memory this process has had resident; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), None)


def answers(write: Write, requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in requests:
        request = json.loads(line)
        began = time.perf_counter()
        ids = write(request["prompts"], request["tokens"])
        yield {"seconds": time.perf_counter() - began, "ids": ids, "peak_mb": peak_megabytes()}


def main() -> None:
    name, precision, folder, room = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    write = writer(name, precision, Path(folder), Room(**json.loads(room)))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for answer in answers(write, sys.stdin):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()

"""A folder of Hugging Face transformers: written so that `from_pretrained` needs no code of ours, and read."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.config import SamplingConfig, build
from tinystories.data.tokenizer import END, Tokenizer, one_line
from tinystories.errors import UserError, naming
from tinystories.interop import original
from tinystories.interop.hf import for_transformers, from_transformers
from tinystories.interop.portable import Portable
from tinystories.interop.vocabulary import with_end

Array = npt.NDArray[Any]

CLASSES = {"gpt2": "GPT2", "gpt_neo": "GPTNeo", "llama": "Llama", "qwen3": "Qwen3"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
GPT2_IDS = 50257
FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)
NEEDS = 'reading a Hugging Face folder back needs transformers: pip install "tinystories-gpt[export]"'


def write(model: Portable, path: Path, precision: str) -> None:
    """Fill a new folder. The tokenizer puts END before a text, as the model has learned to read."""
    assert precision == "f32"
    settings, weights = for_transformers(model.config, model.weights)
    end_id = model.tokenizer.end_id
    ends = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    settings |= ends | {"architectures": [f"{CLASSES[settings['model_type']]}ForCausalLM"], "dtype": "float32"}
    path.mkdir()
    checkpoint.save_weights(path / checkpoint.WEIGHTS, weights)
    checkpoint.write_json(path / "config.json", settings)
    sampling = {name: getattr(model.sampling, name) for name in SAMPLING}
    if sampling["temperature"] == 0:  # greedy, which transformers says otherwise
        sampling = {"do_sample": False, "repetition_penalty": sampling["repetition_penalty"]}
    else:
        sampling["do_sample"] = True
    checkpoint.write_json(path / "generation_config.json", sampling | ends | {"max_length": model.config.n_ctx})
    begin = {"SpecialToken": {"id": END, "type_id": 0}}
    parts = model.tokenizer.parts | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END: {"id": END, "ids": [end_id], "tokens": [END]}},
        }
    }
    (path / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8", newline="\n")
    kind = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END),
        "model_max_length": model.config.n_ctx,
        "clean_up_tokenization_spaces": False,
    }
    checkpoint.write_json(path / "tokenizer_config.json", kind)


def hint(path: Path) -> str:
    return f"next, in Python: transformers.pipeline('text-generation', {str(path)!r})('Once upon a time')"


def logits(path: Path, ids: list[int]) -> Array:
    """(T, V) logits of transformers' own model of the folder; its tokenizer must read a text as ours does."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ModuleNotFoundError:
        raise UserError(NEEDS) from None
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ours = Tokenizer.load(path)
    text = ours.decode(ids[1:])
    if tokenizer(text).input_ids != [ours.end_id, *ours.encode(text)]:
        raise UserError("transformers' tokenizer reads a text as other ids than ours; nothing was written")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        found: Array = model(torch.tensor([ids])).logits[0].numpy()
    return found


def read(path: Path, tokenizer: Path | None) -> Portable:
    """A folder of gpt2, gpt_neo, llama or qwen3. `UserError` where it is none, or damaged."""
    with naming(path):
        settings = checkpoint.read_json(path / "config.json")
        config, weights = from_transformers(settings, stored_weights(path))
        generation = path / "generation_config.json"
        chosen = checkpoint.read_json(generation) if generation.is_file() else {}
        return Portable(
            config=config,
            weights=weights,
            tokenizer=tokenizer_of(path, tokenizer, settings, config.vocab_size),
            sampling=sampling_of(chosen, generation),
            provenance={"imported_from": path.name, "format": f"Hugging Face {settings['model_type']}"},
        )


def stored_weights(path: Path) -> dict[str, Array]:
    """All weights of a folder, in one file or several, fp32."""
    for name, contents in ((checkpoint.WEIGHTS, safetensors_of), ("pytorch_model.bin", state_dict_of)):
        files, index = [name], path / f"{name}.index.json"
        if not (path / name).is_file():
            if not index.is_file():
                continue
            places = checkpoint.read_json(index).get("weight_map")
            named = list(places.values()) if isinstance(places, dict) else []
            if not named or not all(isinstance(file, str) and FILE_NAME.fullmatch(file) for file in named):
                raise UserError(f"{index} names files outside its folder, or none; download the model again")
            files = sorted(set(named))
        for file in files:
            if not (path / file).is_file():
                raise UserError(f"{path / file} is missing, or no file; download the model again")
        return {name: weight for file in files for name, weight in contents(path / file)}
    raise UserError(f"{path} holds no weights (model.safetensors or pytorch_model.bin)")


def state_dict_of(path: Path) -> Iterator[tuple[str, Array]]:
    for name, tensor in original.load(path)[0].items():
        if tensor.is_floating_point():
            yield name, tensor.float().numpy(force=True)


def safetensors_of(path: Path) -> Iterator[tuple[str, Array]]:
    from safetensors import SafetensorError, deserialize

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    try:
        tensors = deserialize(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    for name, facts in tensors:
        if facts["dtype"] not in kinds:
            continue  # masks and counters; a weight that is missing is noticed later
        array = np.frombuffer(facts["data"], kinds[facts["dtype"]])
        if facts["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # `Portable.check` refuses what comes of it
            array = array.reshape(facts["shape"]).astype(np.float32, copy=False)
        yield name, array


def tokenizer_of(path: Path, given: Path | None, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The folder's, with END where its stories begin (or end); GPT-2's where it has none and as many ids."""
    file = given or path / "tokenizer.json"
    end_id = next((settings[name] for name in ("bos_token_id", "eos_token_id") if settings.get(name) is not None), None)
    if isinstance(end_id, list) and end_id:
        end_id = end_id[0]
    text = Tokenizer.load(file).text if given or file.is_file() else from_merges(path, vocab_size)
    if end_id is None and json.loads(text)["added_tokens"]:
        return Tokenizer(text, str(file))
    if type(end_id) is not int:
        raise UserError(f"{path}/config.json: neither bos_token_id nor eos_token_id says what ends a story")
    return with_end(text, end_id, str(file))


def from_merges(path: Path, vocab_size: int) -> str:
    """tokenizer.json of GPT-2's older two files, or GPT-2's own."""
    from tinystories.data.vocabulary import byte_level, gpt2

    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        try:
            lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path}/merges.txt is not UTF-8 text; download the model again") from None
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        try:
            text: str = byte_level(checkpoint.read_json(path / "vocab.json"), pairs).to_str()  # type: ignore[arg-type]
        except Exception as error:  # of the Rust library
            raise UserError(f"{path}/merges.txt and vocab.json are no tokenizer: {one_line(error)}") from None
        return text
    if vocab_size == GPT2_IDS:
        return gpt2().text
    raise UserError(f"{path} brings no tokenizer; give one with --tokenizer FILE")


def sampling_of(chosen: Mapping[str, Any], where: Path) -> SamplingConfig:
    """Its own settings, where it has some; ours for the rest."""
    if chosen.get("do_sample") is False and "temperature" not in chosen:
        return SamplingConfig(temperature=0.0)
    return build(SamplingConfig, {name: chosen[name] for name in SAMPLING if chosen.get(name) is not None}, str(where))

"""Hugging Face model folders: written so that `from_pretrained` loads them without custom code, and read."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinystories import checkpoint
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer, sanitize
from tinystories.errors import UserError, error_context
from tinystories.files import write_json
from tinystories.formats.bundle import Array, ModelBundle, parse_sampling
from tinystories.formats.hf.mapping import from_transformers, to_hf_config_and_weights
from tinystories.formats.hf.tokenizer import load_tokenizer
from tinystories.formats.protocol import Format, import_package
from tinystories.formats.split_files import find_parts
from tinystories.formats.torch_file import FLOAT_TYPES, load_state_dict

MODEL_CLASSES = {"gpt2": "GPT2", "gpt_neo": "GPTNeo", "llama": "Llama", "qwen3": "Qwen3"}
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)


def write(model: ModelBundle, path: Path, precision: str) -> None:
    """Write the model to a new folder `path`.

    The folder's tokenizer puts END before a text, because the model was trained on stories that begin with END.
    """
    assert precision == "f32"
    settings, weights = to_hf_config_and_weights(model.config, model.weights)
    end_id = model.tokenizer.end_id
    special_ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    settings |= special_ids | {
        "architectures": [f"{MODEL_CLASSES[settings['model_type']]}ForCausalLM"],
        "dtype": "float32",
    }
    path.mkdir()
    checkpoint.save_weights(path / checkpoint.WEIGHTS, weights)
    write_json(path / "config.json", settings)
    sampling = {name: getattr(model.sampling, name) for name in SAMPLING_FIELDS}
    if sampling["temperature"] == 0:  # greedy, which transformers expresses as do_sample=false
        sampling = {"do_sample": False, "repetition_penalty": sampling["repetition_penalty"]}
    else:
        sampling["do_sample"] = True
    write_json(path / "generation_config.json", sampling | special_ids | {"max_length": model.config.n_ctx})
    bos = {"SpecialToken": {"id": END, "type_id": 0}}
    parts = model.tokenizer.json_data | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END: {"id": END, "ids": [end_id], "tokens": [END]}},
        }
    }
    (path / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8", newline="\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END),
        "model_max_length": model.config.n_ctx,
        "clean_up_tokenization_spaces": False,
    }
    write_json(path / "tokenizer_config.json", tokenizer_config)


def next_steps(path: Path) -> str:
    return f"next, in Python: transformers.pipeline('text-generation', {str(path)!r})('Once upon a time')"


def logits(path: Path, ids: list[int]) -> Array:
    """Return (T, V) logits of the folder's model as transformers computes them.

    `UserError` if transformers is missing, or if its tokenizer encodes the text of `ids` differently from ours.
    """
    torch, transformers = (
        import_package(name, "verifying a Hugging Face export") for name in ("torch", "transformers")
    )
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    our_tokenizer = Tokenizer.load(path)
    text = our_tokenizer.decode(ids[1:])
    if tokenizer(text).input_ids != [our_tokenizer.end_id, *our_tokenizer.encode(text)]:
        raise UserError(
            "verification failed: transformers' tokenizer encodes a text differently from ours; nothing was written"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        file_logits: Array = model(torch.tensor([ids])).logits[0].numpy()
    return file_logits


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a folder of model_type gpt2, gpt_neo, llama or qwen3; `UserError` if it is another or damaged.

    `tokenizer`: a tokenizer.json that replaces the folder's own.
    """
    with error_context(path):
        settings = checkpoint.read_json(path / "config.json")
        weights, other_types = load_weights(path)
        config, weights = from_transformers(settings, weights, str(path), other_types)
        generation_path = path / "generation_config.json"
        generation_config = checkpoint.read_json(generation_path) if generation_path.is_file() else {}
        return ModelBundle(
            config=config,
            weights=weights,
            tokenizer=load_tokenizer(path, tokenizer, config.vocab_size),
            sampling=read_sampling(generation_config, generation_path),
            provenance={"imported_from": path.name, "format": f"Hugging Face {settings['model_type']}"},
        )


def load_weights(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Load all weights of a folder, split or not, as fp32. No code in the files is run.

    Also return the types of the tensors that are left out, by name: they are not fp64, fp32, fp16 or bf16.
    """
    weights: dict[str, Array] = {}
    other_types: dict[str, str] = {}
    for name, read_tensors in ((checkpoint.WEIGHTS, read_safetensors), ("pytorch_model.bin", read_state_dict)):
        if files := find_weight_files(path, name):
            for file in files:
                weights |= read_tensors(file, other_types)
            return weights, other_types
    raise UserError(f"{path} contains no weights (model.safetensors or pytorch_model.bin)")


def find_weight_files(path: Path, name: str) -> list[Path]:
    """Return the file `name` of a folder, or the files that it is split into; none if there are neither."""
    if (path / name).is_file():
        return [path / name]
    index_path = path / f"{name}.index.json"
    if not index_path.is_file():
        return find_parts(path, Path(name).stem, Path(name).suffix)
    weight_map = checkpoint.read_json(index_path).get("weight_map")
    file_names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not file_names or not all(isinstance(file, str) and FILE_NAME.fullmatch(file) for file in file_names):
        raise UserError(f"{index_path} names files outside its folder, or none at all; download the model again")
    files = [path / file for file in sorted(set(file_names))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, or not a regular file; download the model again")
    return files


def read_state_dict(path: Path, other_types: dict[str, str]) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of a PyTorch file as fp32; add the types of those that are not weights to `other_types`."""
    for name, tensor in load_state_dict(path)[0].items():
        if str(tensor.dtype) in FLOAT_TYPES:
            yield name, tensor.float().numpy(force=True)
        else:
            other_types[name] = str(tensor.dtype)


def read_safetensors(path: Path, other_types: dict[str, str]) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of a file as fp32; add the types of those that are not weights to `other_types`.

    bf16 is widened by its bits, since NumPy lacks it.
    """
    from safetensors import SafetensorError, deserialize

    dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    try:
        tensors = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {sanitize(error)}") from None
    for name, info in tensors:
        if info["dtype"] not in dtypes:
            other_types[name] = info["dtype"]
            continue
        array = np.frombuffer(info["data"], dtypes[info["dtype"]])
        if info["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # `ModelBundle.check` rejects infinities
            array = array.reshape(info["shape"]).astype(np.float32, copy=False)
        yield name, array


def read_sampling(generation_config: Mapping[str, Any], where: Path) -> SamplingConfig:
    """Return the sampling settings of generation_config.json, with our defaults for those it lacks."""
    if generation_config.get("do_sample") is False and "temperature" not in generation_config:
        return SamplingConfig(temperature=0.0)
    return parse_sampling({name: generation_config.get(name) for name in SAMPLING_FIELDS}, where)


HF = Format(
    name="hf",
    can_read=checkpoint.is_model,
    read=read,
    write=write,
    logits=logits,
    max_divergence={"f32": 0},
    next_steps=next_steps,
    is_folder=True,
)

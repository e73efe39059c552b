"""Load the weights of a model directory in fp32, int8 or int4.

Quantized weights are cached next to the model, in packed-int8.safetensors or packed-int4.safetensors. The metadata of
this file names the weights it was made from and holds a SHA-256 of its contents.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tinystories import checkpoint
from tinystories.checkpoint import BUNDLED_MODEL, INT8_WEIGHTS, ModelFiles
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.errors import UserError, one_line, quoted
from tinystories.files import atomic_directory
from tinystories.weights.names import EMBEDDING, POSITION_EMBEDDING, check_weights, expected_shapes
from tinystories.weights.quantize import (
    DEQUANTIZERS,
    QUANTIZERS,
    convert_int8_layout_2,
    int8_sizes_layout_2,
    quantized_sizes,
)
from tinystories.weights.safetensors_file import PADDING, PARSE_ERRORS, Array, SafetensorsFile, write_safetensors

log = logging.getLogger(__name__)

Precision = Literal["fp32", "int8", "int4"]
# Of the blocks in quantized files. Cached files of another version are made again; int8-only ones are converted.
LAYOUT_VERSIONS: dict[Precision, str] = {"int8": "3", "int4": "2"}


def load_fp32(files: ModelFiles) -> Mapping[str, Array]:
    """Load the model's fp32 weights by name; raise UserError unless names, shapes and dtypes match and all are finite.

    The weights of an int8-only directory are dequantized; others are views of the file's buffer.
    """
    if files.is_int8_only:
        return dequantize(files)
    path = files.weights_path
    try:
        file = SafetensorsFile(path)
    except PARSE_ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    check_weights({name: weight.shape for name, weight in file.items()}, files.config, str(path))
    for name, weight in file.items():
        if weight.dtype != np.float32:
            raise UserError(f"{path}: {name} has dtype {weight.dtype}, not fp32")
        with np.errstate(invalid="ignore"):
            is_finite = np.isfinite(weight.sum(dtype=np.float64))
        if not is_finite:
            raise UserError(f"{path}: {name} has values that are not finite; use another checkpoint")
    return file


def load_or_quantize(files: ModelFiles, precision: Precision) -> Mapping[str, Array]:
    """Load quantized weights from the cached file next to the model, or quantize and cache them.

    The cached file is used if its checksum matches and it was made from the weights that config.json names. The model's
    own weights are hashed only if their size or modification time is not what the cached file recorded. If the folder
    is not writable, a warning is logged and the quantized weights stay in memory. Raises UserError if the model's own
    weights do not match their checksum or are not valid.
    """
    if files.is_int8_only and precision == "int8":
        return load_int8_only(files)
    if files.folder.resolve() == BUNDLED_MODEL.resolve():  # small, and site-packages is not ours to write to
        files.verify_weights()
        return quantize(files, precision)
    path, status = quantized_path(files, precision), files.weights_path.stat()
    metadata = quantized_metadata(files, precision)
    source_stat = {"source_bytes": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}
    if path.exists():
        try:
            file = open_quantized(path, files.config, precision, metadata)
        except PARSE_ERRORS as error:
            log.warning("%s cannot be used (%s): quantizing the weights again", path, one_line(error))
        else:
            # If not: the model was copied, or its weights were replaced without an update of config.json.
            if not source_stat.items() <= file.metadata.items():
                files.verify_weights()
            return file
    else:
        # A warning: Python shows it also where logging is not configured.
        log.warning("quantizing the weights to %s (once): %s", precision, path)
    files.verify_weights()
    tensors = quantize(files, precision)
    try:
        write_safetensors(path, tensors, metadata | source_stat)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start quantizes again", path, one_line(error))
        return tensors
    return SafetensorsFile(path)


def load_int8_only(files: ModelFiles) -> Mapping[str, Array]:
    """Load the quantized weights of a directory that has only int8 weights (see `write_int8_model`).

    They are views of the file's buffer. Those in layout 2, which earlier versions wrote, are converted to the present
    layout in memory. Raises UserError if they are damaged, as they cannot be made again.
    """
    path = files.weights_path
    try:
        file = open_quantized(path, files.config, "int8", {})
        if file.metadata.get("layout") == LAYOUT_VERSIONS["int8"]:
            return file
        if file.metadata.get("layout") == "2":
            return convert_layout_2(file, files.config)
        raise ValueError("it was made by another version of tinystories")
    except PARSE_ERRORS as error:
        raise UserError(
            f"{path} is damaged ({error}) and there is no other copy of these weights here; restore it from its source"
        ) from None


def write_int8_model(files: ModelFiles, folder: Path, sampling: SamplingConfig | None = None) -> None:
    """Write a model directory with int8 weights only: a quarter of the size, readable by every engine.

    Its tokenizer.json has no whitespace. `sampling` replaces the model's default sampling settings. The weights of a
    model that has only int8 ones are copied. Raises UserError if the weights do not match their checksum.
    """
    files.verify_weights()
    tokenizer_json = json.dumps(files.tokenizer().json_data, ensure_ascii=False, separators=(",", ":"))
    tensors = load_int8_only(files) if files.is_int8_only else quantize(files, "int8")
    tensors = {name: array for name, array in tensors.items() if not name.endswith(PADDING)}
    with atomic_directory(folder) as draft:
        write_safetensors(draft / INT8_WEIGHTS, tensors, quantized_metadata(files, "int8"))
        (draft / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8", newline="\n")
        checkpoint.write_config(draft, files.config, sampling or files.sampling, files.provenance, INT8_WEIGHTS)


def convert_layout_2(file: SafetensorsFile, config: ModelConfig) -> dict[str, Array]:
    """Return the tensors of an int8 file in layout 2 in the present layout."""
    tensors = {name: array for name, array in file.items() if not name.endswith(PADDING)}
    for name, shape in expected_shapes(config).items():
        values, scales = f"{name}.int8", f"{name}.scales"
        if values in tensors:
            tensors[values], tensors[scales] = convert_int8_layout_2(tensors[values], tensors[scales], *shape)
    return tensors


def quantized_path(files: ModelFiles, precision: Precision) -> Path:
    """Return where the quantized weights of a model are cached."""
    return files.folder / f"packed-{precision}.safetensors"


def quantized_metadata(files: ModelFiles, precision: Precision) -> dict[str, str]:
    """Return the metadata by which a quantized file names its format and its source."""
    return {"layout": LAYOUT_VERSIONS[precision], "precision": precision, "source_sha256": files.weights_sha256}


def open_quantized(
    path: Path, config: ModelConfig, precision: Precision, metadata: Mapping[str, str]
) -> SafetensorsFile:
    """Map a quantized file. Raises one of `PARSE_ERRORS` if it is damaged or its metadata lacks an item of `metadata`.

    Checks dtypes and sizes too, because the machine code cannot check them. Padding tensors are ignored.
    """
    file = SafetensorsFile(path)
    if not metadata.items() <= file.metadata.items():
        raise ValueError("it was made from other weights or by another version of tinystories")
    if file.metadata.get("sha256") != file.digest():
        raise ValueError("it does not match its checksum")
    expected: dict[str, tuple[type, int]] = {}
    for name, shape in expected_shapes(config).items():
        if encoding := quantized_encoding(name, shape, config, precision):
            is_layout_2 = encoding == "int8" and file.metadata.get("layout") == "2"
            values, scales = int8_sizes_layout_2(*shape) if is_layout_2 else quantized_sizes(encoding, *shape)
            expected[f"{name}.{encoding}"], expected[f"{name}.scales"] = values, scales
        else:
            expected[name] = np.float32, int(np.prod(shape))
    for name in file:
        if name not in expected and not name.endswith(PADDING):
            raise ValueError(f"unknown tensor {quoted(name)}")
    for name, (dtype, size) in expected.items():
        if name not in file or file[name].dtype != dtype or file[name].size != size:
            raise ValueError(f"{name} is missing, or its size or dtype is wrong")
    return file


def quantized_encoding(name: str, shape: tuple[int, ...], config: ModelConfig, precision: Precision) -> str | None:
    """Return how a weight is stored in a quantized file: a key of `QUANTIZERS`, or None for fp32.

    Only matrices are quantized. An embedding that is not tied to the LM head is stored as int8 rows in plain order,
    since only single rows of it are read.
    """
    if len(shape) == 1 or name == POSITION_EMBEDDING:
        return None
    return "rows" if name == EMBEDDING and not config.tied else precision


def quantize(files: ModelFiles, precision: Precision) -> dict[str, Array]:
    """Quantize the weights of a model; return the tensors of the quantized file."""
    return quantize_weights(files.config, load_fp32(files), precision)


def quantize_weights(config: ModelConfig, weights: Mapping[str, Array], precision: Precision) -> dict[str, Array]:
    """Quantize fp32 weights, by their names in `model.safetensors`; return the tensors of the quantized file."""
    tensors: dict[str, Array] = {}
    for name, weight in weights.items():
        if encoding := quantized_encoding(name, weight.shape, config, precision):
            tensors[f"{name}.{encoding}"], tensors[f"{name}.scales"] = QUANTIZERS[encoding](weight)
        else:
            tensors[name] = weight
    return tensors


def dequantize(files: ModelFiles) -> dict[str, Array]:
    """Load the weights of a directory that has only int8 weights and dequantize them to fp32.

    Returns arrays by their names in `model.safetensors`, in the shapes of `expected_shapes`.
    """
    return dequantize_weights(files.config, load_int8_only(files))


def dequantize_weights(config: ModelConfig, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return weights in any precision, as loaded by this module, as fp32 arrays.

    They are named as in `model.safetensors` and have the shapes of `expected_shapes`. fp32 weights are not copied.
    """
    fp32_weights: dict[str, Array] = {}
    for name, shape in expected_shapes(config).items():
        encoding = next((encoding for encoding in DEQUANTIZERS if f"{name}.{encoding}" in weights), None)
        if encoding is None:
            fp32_weights[name] = weights[name].reshape(shape)
        else:
            matrix = DEQUANTIZERS[encoding](weights[f"{name}.{encoding}"], weights[f"{name}.scales"], *shape)
            fp32_weights[name] = np.ascontiguousarray(matrix)
    return fp32_weights

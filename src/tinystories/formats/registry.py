"""All formats by name. A file is of the first format, in this order, that recognizes it."""

from tinystories.formats.gguf.format import GGUF
from tinystories.formats.hf.format import HF
from tinystories.formats.html.format import HTML
from tinystories.formats.llama2c.format import LLAMA2C
from tinystories.formats.onnx.format import ONNX
from tinystories.formats.protocol import Format
from tinystories.formats.pt.format import PT

FORMATS: dict[str, Format] = {item.name: item for item in (GGUF, HF, PT, LLAMA2C, ONNX, HTML)}
EXPORT_NAMES = [name for name, item in FORMATS.items() if item.write is not None]

"""What llama.cpp makes of a GGUF file. A process of its own: the package leaves a file open when it ends.

Request on stdin, answer on stdout, as JSON.
"""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any


def ask(path: Path, **request: Any) -> Any:
    """`texts` to ids (END in front) and back, and `tokens` greedy ids after `prompt`."""
    return process("answer", {"path": str(path), **request})


def quantize(path: Path, out: Path, kind: int) -> None:
    """By llama.cpp's own quantiser; `kind` is a llama_ftype."""
    assert process("quantized", {"path": str(path), "out": str(out), "kind": kind}) == 0


def process(name: str, request: dict[str, Any]) -> Any:
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def answer(path: str, prompt: list[int], tokens: int, texts: list[str]) -> dict[str, Any]:
    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(path, n_ctx=0, n_threads=1, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    ids = [llama.tokenize(text.encode(), add_bos=True) for text in texts]
    return {
        "told": list(islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), tokens)),
        "ids": ids,
        "texts": [llama.detokenize(one[1:]).decode() for one in ids],
        "end": [llama.token_bos(), llama.token_eos()],
    }


def quantized(path: str, out: str, kind: int) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, 1
    code: int = llama_cpp.llama_model_quantize(path.encode(), out.encode(), params)
    return code


if __name__ == "__main__":
    made = {"answer": answer, "quantized": quantized}[sys.argv[1]](**json.loads(sys.stdin.read()))
    sys.stdout.write("\n" + json.dumps(made) + "\n")

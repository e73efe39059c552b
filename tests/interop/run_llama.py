"""What llama.cpp makes of a GGUF file. A process of its own: the package leaves a file open when it ends.

Request on stdin, answer on stdout, as JSON: `texts` to ids and back, and `tokens` greedy ids after `prompt`.
"""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any


def ask(path: Path, **request: Any) -> Any:
    done = run(
        [sys.executable, __file__],
        input=json.dumps({"path": str(path), **request}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def answer(path: str, prompt: list[int], tokens: int, texts: list[str]) -> dict[str, Any]:
    from itertools import islice

    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(path, n_ctx=0, n_threads=1, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    ids = [llama.tokenize(text.encode(), add_bos=True) for text in texts]
    return {
        "told": list(islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), tokens)),
        "ids": ids,
        "texts": [llama.detokenize(one).decode() for one in ids],
        "end": [llama.token_bos(), llama.token_eos()],
    }


if __name__ == "__main__":
    print(json.dumps(answer(**json.loads(sys.stdin.read()))))

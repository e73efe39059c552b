"""Runs the page's own program in Node.js, with a few lines of script after it."""

import base64
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tinystories.config import SamplingConfig
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html.document import PACKAGE, PROGRAM
from tinystories.formats.html.model_data import build_page_data, load_int8
from tinystories.generate.storyteller import Storyteller
from tinystories.single_page import join_modules

# All that the program's modules export can be used by its name.
PROGRAM_AND_NAMES = f"{join_modules(PACKAGE, PROGRAM)}\nObject.assign(globalThis, ...Object.values(modules));"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is missing (apt-get install nodejs)")
OWN_SETTINGS = SamplingConfig(
    temperature=0.9, min_p=0.02, repetition_penalty=1.3, repetition_window=20, penalize_names=False
)


def engine_storyteller(model: ModelBundle) -> Storyteller:
    engine = CpuEngine(model.config, load_int8(model), EngineConfig(n_slots=4, threads=1))
    return Storyteller(engine, model.tokenizer, model.sampling)


def run_script(script: str, data: Any = None) -> Any:
    """Return what `answer(data)` returns, a function that the script defines after the page's program."""
    assert NODE is not None
    tail = """
    Promise.resolve(answer(JSON.parse(require('fs').readFileSync(0, 'utf8')))).then((result) => {
      process.stdout.write(JSON.stringify(result), () => process.exit(0));
    });
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.js"
        path.write_text(f"{PROGRAM_AND_NAMES}\n{script}\n{tail}\n", encoding="utf-8")
        process = subprocess.run(
            [NODE, str(path)], input=json.dumps(data), capture_output=True, encoding="utf-8", check=False, timeout=250
        )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def page_data(model: ModelBundle) -> dict[str, Any]:
    """What a page has of a model, as JSON; `openStoryteller(data)` in a script opens it."""
    header, weights = build_page_data(model)
    return {"header": header, "weights": base64.b64encode(weights).decode()}


OPEN = """
function openStoryteller({ header, weights, plain = false }) {
  const storyteller = new Storyteller(header, { plain });
  storyteller.engine.addWeights(weights);
  return storyteller;
}
"""

"""The page of `export --format html` in headless Chromium: size, time to the first word, tokens/s, memory.

    python benchmarks/html_page.py --rounds 5                        the bundled storyteller
    python benchmarks/html_page.py --preset modern-89m --tokens 60   random weights, GPT-2's 50,257 ids (needs tiktoken)

In each round a fresh browser opens the file from disk, offline, with a seed in its address, so that it tells a story at
once; then the CPU engine tells the same story with one thread. Of the page:

* first word: from the start of navigation until the word is on the page, by the page's own clock;
* tokens/s: by the clock of the worker, and per second of processor time of its thread, which does not count the first
  tokens. On a machine that does other work only the second says something about the program;
* memory of the renderer process while it tells: private (without pages shared with other processes), resident, and the
  largest that it was; beside them an empty page.

`--node` measures WebAssembly and plain JavaScript in Node.js too, by processor time. Needs playwright and Debian's
chromium. Prints each round, medians, and a JSON line.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from script import run_main

from tinystories.bench.setup import WEIGHTS_FILE, write_random_weights
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config_file import load_config
from tinystories.data.build_tokenizer import load_gpt2
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html import check
from tinystories.formats.html.format import write
from tinystories.formats.html.model_data import load_int8
from tinystories.generate.batching import Request
from tinystories.generate.storyteller import Storyteller
from tinystories.weights.safetensors_file import SafetensorsFile

TIMEOUT_MS = 300_000
WATCH = """
const OriginalWorker = Worker;
window.Worker = class extends OriginalWorker {
  constructor(address) {
    super(address);
    this.addEventListener('message', ({ data: { n, seconds, reason } }) => {
      if (n) window.latest = { n, seconds, reason };
    });
  }
};
new MutationObserver(() => {
  if (!window.firstWord && document.querySelector('.word:not(.given)')) window.firstWord = performance.now();
}).observe(document, { childList: true, subtree: true });
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="model directory (default: the bundled one)")
    parser.add_argument("--preset", help="random weights of this preset instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=900, help="stop a story after so much")
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--node", action="store_true", help="also measure WebAssembly and plain JavaScript in Node.js")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = read_random_model(options.preset, Path(folder)) if options.preset else ModelBundle.read(options.model)
        path = Path(folder) / "story.html"
        write(model, path, "int8")
        results = measure_size(model, path)
        engine = CpuEngine(model.config, load_int8(model), EngineConfig(n_slots=1, threads=1))
        storyteller = Storyteller(engine, model.tokenizer, model.sampling)
        rounds = [measure_round(path, storyteller, options) for _ in range(options.rounds)]
        for name in rounds[0]:
            results[name] = statistics.median(one[name] for one in rounds)
        if options.node:
            results |= measure_node(path, storyteller, options)
    for name, value in results.items():
        print(f"{name:42} {value:12,.3f}")
    print(json.dumps({"model": options.preset or str(options.model.name), "machine": platform.machine()} | results))


def read_random_model(preset: str, folder: Path) -> ModelBundle:
    """Return a model of a preset with random weights and GPT-2's tokenizer."""
    config = load_config(preset).model
    write_random_weights(folder, config)
    return ModelBundle(config=config, weights=SafetensorsFile(folder / WEIGHTS_FILE), tokenizer=load_gpt2())


def measure_size(model: ModelBundle, path: Path) -> dict[str, float]:
    """Return the sizes of the file and of its weights, in MB; fail if the file is larger than it may be."""
    weights, size = sum(array.nbytes for array in load_int8(model).values()), path.stat().st_size
    if size > 1.4 * weights + 300_000:
        raise UserError(f"the page has {size:,} bytes, more than 1.4 times the weights ({weights:,}) and 300 kB")
    return {"parameters, million": model.config.n_params / 1e6, "weights, MB": weights / 1e6, "file, MB": size / 1e6}


def measure_round(path: Path, storyteller: Storyteller, options: argparse.Namespace) -> dict[str, float]:
    """Open the page in a fresh browser and let the engine tell the same story; return the numbers of both."""
    from playwright.sync_api import sync_playwright

    result: dict[str, float] = {}
    executable = shutil.which("chromium")
    if executable is None:
        raise UserError("chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        empty = read_memory(find_renderer(browser))
        page.add_init_script(WATCH)
        page.goto(f"{path.as_uri()}#b=&len=long&s={options.seed}")
        latest: dict[str, Any] = {}
        while not latest:
            page.wait_for_timeout(20)
            latest = page.evaluate("window.latest") or {}
        renderer = find_renderer(browser)
        opening_s, n_first = read_worker_seconds(renderer), latest["n"]
        while not latest.get("reason") and latest["n"] < options.tokens:
            page.wait_for_timeout(100)
            latest = page.evaluate("window.latest")
        worker_s, memory = read_worker_seconds(renderer), read_memory(renderer)
        story = page.locator(".words").inner_text()
        result["first word, s"] = page.evaluate("window.firstWord") / 1000
        result["page, tokens/s"] = latest["n"] / latest["seconds"]
        result["page, tokens per processor second"] = (latest["n"] - n_first) / (worker_s - opening_s)
        result["page, processor seconds of opening"] = opening_s
        for name, value in memory.items():
            result[f"page, {name} MB"] = value
        result["empty page, private MB"] = empty["private"]
        browser.close()
    started_at, cpu_at = time.perf_counter(), time.process_time()
    told = storyteller.generate("", seed=options.seed, max_tokens=latest["n"])
    result["engine, tokens/s"] = told.n_generated / (time.perf_counter() - started_at)
    result["engine, tokens per processor second"] = told.n_generated / (time.process_time() - cpu_at)
    if not " ".join(told.text.split()).startswith(" ".join(story.split())[:200]):
        raise UserError("the page tells another story than the engine")
    print(" ".join(f"{name}: {value:.3f};" for name, value in result.items()), flush=True)
    return result


def find_renderer(browser: Any) -> int:
    """Return the process of the page: the renderer with a worker or, without any, the busiest one."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    renderers = [process for process in processes if process["type"] == "renderer"]
    best = max(renderers, key=lambda process: (find_worker(process["id"]) is not None, process["cpuTime"]))
    return int(best["id"])


def find_worker(pid: int) -> Path | None:
    """Return the folder of the worker's thread in /proc."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return next((one for one in threads if (one / "comm").read_text().startswith("DedicatedWorker")), None)


def read_worker_seconds(pid: int) -> float:
    """Return the processor time of the worker's thread, from its start on."""
    thread = find_worker(pid)
    assert thread is not None
    fields = (thread / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory(pid: int) -> dict[str, float]:
    """Return private, resident and peak memory of a process in MB."""
    rollup, status = (Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
    kilobytes = {name: sum(map(int, re.findall(rf"{name}:\s+(\d+) kB", rollup))) for name in ("Private_\\w+", "Rss")}
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    numbers = {"private": kilobytes["Private_\\w+"], "resident": kilobytes["Rss"], "peak resident": int(peak)}
    return {name: value * 1024 / 1e6 for name, value in numbers.items()}


def measure_node(path: Path, storyteller: Storyteller, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per processor second in Node.js, of stories after the first token, with and without WebAssembly."""
    node = shutil.which("node")
    if node is None:
        raise UserError("node is missing: apt-get install nodejs")
    result = {}
    for name, plain in (("WebAssembly", False), ("plain JavaScript", True)):
        seconds = {}
        for n_tokens in (1, options.tokens):
            request = Request(settings=storyteller.settings, seed=options.seed, max_tokens=n_tokens)
            before = os.times()
            (story,) = check.run_page(path, [request], ("node", node), plain=plain)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            seconds[len(story["ids"])] = used
        (_, first), (n, all_of_them) = sorted(seconds.items())
        result[f"Node.js, {name}, tokens per processor second"] = (n - 1) / (all_of_them - first)
    return result


if __name__ == "__main__":
    run_main(main)

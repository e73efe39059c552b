"""A process that has imported the slow packages and runs each command line in a fork of itself.

Reads one JSON request per line: {"words", "cwd", "folder", "call", "bytes", "stderr"}; answers {"code", "calls",
"bytes"}. With `full_disk.so` preloaded, writes below `folder` fail as requested.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from campaign.plants import PLANTS
from campaign.program import shell_code

SLOW_PACKAGES = ("numpy", "safetensors.torch", "tokenizers", "torch", "torch._dynamo", "matplotlib.figure", "onnx")
TIMEOUT_SECONDS = 300


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in SLOW_PACKAGES:
        importlib.import_module(name)
    if sys.argv[1:]:
        PLANTS[sys.argv[1]]()
    import tinystories.cli  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            perform(request, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            counts = pipe.read().split() or ["0", "0"]
        _, status = os.waitpid(child, 0)
        code = shell_code(os.waitstatus_to_exitcode(status))
        print(json.dumps({"code": code, "calls": int(counts[0]), "bytes": int(counts[1])}), file=answers)


def perform(request: dict[str, Any], counts: int) -> None:
    """Run the command line of a request and end the process."""
    signal.alarm(TIMEOUT_SECONDS)
    os.chdir(request["cwd"])
    error_file = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(error_file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    library = ctypes.CDLL(None)
    if request["folder"]:
        names = {
            "FULL_FOLDER": request["folder"],
            "FULL_CALL": str(request["call"]),
            "FULL_BYTES": str(request["bytes"]),
        }
        os.environ |= names
        library.full_disk_begin(
            os.fsencode(request["folder"]), ctypes.c_long(request["call"]), ctypes.c_long(request["bytes"])
        )
    code: Any = 0
    try:
        from tinystories.cli import main as run_program

        run_program(request["words"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if request["folder"]:
        os.write(counts, f"{library.full_disk_count(0)} {library.full_disk_count(1)}".encode())
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

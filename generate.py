"""Write 500 tokens with a trained model: see `python generate.py --help`."""

import sys

from tinystories.cli.common import run
from tinystories.cli.write.original import generate

if __name__ == "__main__":
    sys.exit(run(generate, name="python generate.py"))

"""Train the original model, then let it write 10,000 tokens: see `python gpt.py --help`."""

import sys

from tinystories.cli.common import run
from tinystories.cli.write.original import gpt

if __name__ == "__main__":
    sys.exit(run(gpt, name="python gpt.py"))

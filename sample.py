"""Print tokens as they are made: see `python sample.py --help`."""

import sys

from tinystories.cli.common import run
from tinystories.cli.write.original import sample

if __name__ == "__main__":
    sys.exit(run(sample, name="python sample.py"))

"""`python -m campaign PART`: see README.md."""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from campaign.plants import PLANTS
from campaign.program import ROOT
from campaign.readers import READERS
from campaign.record import Record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    parser.add_argument("part", choices=["fuzz", "kill", "enospc", "signals", "readonly", "many"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tinystories-campaign")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "campaign.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=sorted(PLANTS), help="a planted fault, which must be reported")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="fuzz: which (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="fuzz: time for each reader")
    parser.add_argument("--inputs", type=int, default=10**9, help="fuzz: inputs of each reader, if time allows")
    parser.add_argument("--replay", type=int, metavar="N", help="fuzz: input N alone")
    parser.add_argument("--kills", type=int, default=200, help="kill: number of kills")
    parser.add_argument("--points", type=int, default=0, help="enospc: points of each command (default: every one)")
    parser.add_argument("--sizes", type=int, default=50, help="enospc: sizes of a small file system")
    parser.add_argument("--moments", type=int, default=50, help="signals: moments for each command and signal")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8], help="many: how many at once")
    parser.add_argument(
        "--commands", default="", help="enospc, signals, readonly, many: comma-separated (default: all)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = {"seed": arguments.seed, "plant": arguments.plant}
    record = Record(arguments.part, settings, work / "findings")
    started_at = time.monotonic()
    names = [name for name in arguments.commands.split(",") if name]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been found is recorded
    # A shell's background job inherits SIGINT as ignored, and so would all commands that it runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if arguments.part == "fuzz":
            from campaign.fuzz import fuzz

            record.settings["readers"] = arguments.reader or sorted(READERS)
            for reader in record.settings["readers"]:
                first, count = (arguments.replay, 1) if arguments.replay is not None else (0, arguments.inputs)
                fuzz(
                    record, work, reader, seed=arguments.seed, first=first, count=count,
                    seconds=arguments.minutes * 60, plant=arguments.plant,
                )  # fmt: skip
        elif arguments.part == "kill":
            from campaign.kill import kill

            kill(record, work, kills=arguments.kills, seed=arguments.seed, plant=arguments.plant)
        elif arguments.part == "enospc":
            from campaign.full_disk import full_disk

            full_disk(record, work, names, points=arguments.points, sizes=arguments.sizes, plant=arguments.plant)
        elif arguments.part == "signals":
            from campaign.signals import signals

            signals(record, work, names, moments=arguments.moments, seed=arguments.seed, plant=arguments.plant)
        elif arguments.part == "readonly":
            from campaign.readonly import readonly

            readonly(record, work, names, plant=arguments.plant)
        else:
            from campaign.many import many

            many(record, work, names, processes=arguments.processes, plant=arguments.plant)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        if arguments.replay is None:
            record.write(arguments.results, time.monotonic() - started_at)
    if arguments.replay is not None and not record.findings:
        print("nothing found")
    return 1 if record.findings else 0


if __name__ == "__main__":
    sys.exit(main())

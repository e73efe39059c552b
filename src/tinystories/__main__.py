"""The command `tinystories`, also as `python -m tinystories`; torchrun starts its workers so."""

import os
import sys

STOPPED = 130  # exit code after Ctrl-C

try:  # these imports take some milliseconds
    import signal
    from types import FrameType
except KeyboardInterrupt:
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback at any moment, also while it is imported or ends."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as by `nohup` or `&`
    if is_default:
        signal.signal(signal.SIGINT, stop_at_once)
    from tinystories.cli import cli
    from tinystories.cli.common import run

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        exit_code = run(cli)
    except KeyboardInterrupt:  # before or after the part of `run` that handles it
        stop_at_once()
    if is_default:
        signal.signal(signal.SIGINT, stop_at_once)
    sys.exit(exit_code)


def stop_at_once(_number: int = signal.SIGINT, _frame: FrameType | None = None) -> None:
    """End the process: nothing needs to be saved, and an exception could be lost in the code it interrupts."""
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


if __name__ == "__main__":
    main()

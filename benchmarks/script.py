"""Entry point of every benchmark: user errors become one line on stderr and exit code 2, as in the commands."""

import sys
from collections.abc import Callable, Sequence

from tinystories.errors import UserError


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; exit with code 2 on a `UserError` or `OSError`, and with 130 on Ctrl-C."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept", file=sys.stderr)
        sys.exit(130)
    else:
        return
    sys.exit(2)


def parse_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Parse the arguments that argparse did not recognize, `--train.steps 40 ...`, as overrides for `load_config`."""
    names, values = arguments[::2], arguments[1::2]
    if len(names) != len(values) or not all(name.startswith("--") and "." in name for name in names):
        raise UserError(f"settings must look like --train.steps 40, not {' '.join(arguments)}")
    return {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}

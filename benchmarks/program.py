"""How every benchmark runs: what people can mend is one line on stderr and exit code 2, as in the commands."""

import sys
from collections.abc import Callable

from tinystories.errors import UserError


def as_program(main: Callable[[], None]) -> None:
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

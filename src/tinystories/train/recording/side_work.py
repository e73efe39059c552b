"""Work that a training can do without: pictures, sample stories, TensorBoard."""

import contextlib
import logging
from collections.abc import Iterator

from tinystories.data.tokenizer import sanitize
from tinystories.files import error_reason

log = logging.getLogger(__name__)


class SideWork:
    """Turns the errors of side work into a warning each, the first time; what fails is tried again the next time."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Do the work inside the block; if it fails, with whatever error, warn once that there will be no `name`."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
                reason = sanitize(f"{kind}{error_reason(error)}")
                log.warning("%s cannot be written (%s); everything else continues", name, reason)

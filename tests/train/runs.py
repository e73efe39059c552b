"""Settings and records of test runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tinystories.config import Config


def changed(config: Config, section: str, **values: Any) -> Config:
    """Return the config with some settings of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

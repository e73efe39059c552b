"""Every name inside the package that the campaign uses, as "module:attribute"; only planted faults need them.

Everything else goes through the command line, `tinystories.load` and `tinystories.cli.main`.
"""

import importlib
from typing import Any

READ_JSON_OBJECT = "tinystories.files:read_json_object"
ATOMIC_FILE = "tinystories.files:atomic_file"
STAGING_DIR = "tinystories.data.staging:StagingDir"
ATOMIC_DIRECTORY = "tinystories.files:atomic_directory"


def resolve(name: str) -> tuple[Any, str, Any]:
    """Return (module, attribute name, value) of an internal."""
    module_name, _, attribute = name.partition(":")
    module = importlib.import_module(module_name)
    return module, attribute, getattr(module, attribute)

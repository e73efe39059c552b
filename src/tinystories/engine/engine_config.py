"""`EngineConfig`: which inference engine runs a model, and how. Imports neither torch nor NumPy."""

import dataclasses
import os
from typing import TYPE_CHECKING

from tinystories.errors import UserError, check_bool, check_integer

if TYPE_CHECKING:
    import torch

ENGINES = ("auto", "cpu", "torch")
ENGINE_PRECISIONS = ("auto", "fp32", "bf16", "int8", "int8-a8", "int4")
QUANTIZED_PRECISIONS = ("int8", "int8-a8", "int4")  # int8-a8: int8 weights, and activations of 8 bits instead of 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an inference engine.

    Raises `UserError` for unknown names, numbers out of range, and a device or precision that the engine does not
    support. Whether this machine has the device is checked when the engine is loaded.
    """

    engine: str = "auto"  # cpu or torch; auto: see `select_engine`
    device: "str | torch.device" = "auto"  # of the torch engine
    precision: str = "auto"  # auto: int8 (cpu engine), or bf16 if the hardware supports it, else fp32 (torch engine)
    n_slots: int = 8  # sequences generated at once
    threads: int | None = None  # of the CPU engine; None: one per physical core, at most 16, where they help
    shortlist: bool = False  # generate only the ids of the model's shortlist (CPU engine)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine {self.engine} is unknown; use one of {', '.join(ENGINES)}")
        if self.precision not in ENGINE_PRECISIONS:
            raise UserError(f"precision {self.precision} is unknown; use one of {', '.join(ENGINE_PRECISIONS)}")
        if self.engine == "cpu" and str(self.device) not in ("auto", "cpu"):
            raise UserError(f"the CPU engine does not run on device {self.device}; use --engine torch")
        if self.engine == "cpu" and self.precision == "bf16":
            raise UserError("the CPU engine does not support bf16; use fp32, int8, int8-a8 or int4, or --engine torch")
        if self.engine == "torch" and self.precision in QUANTIZED_PRECISIONS:
            raise UserError(f"the torch engine does not support {self.precision}; use fp32 or bf16, or --engine cpu")
        if self.engine == "torch":
            self.check_torch()
        check_integer("n_slots", self.n_slots)
        check_bool("shortlist", self.shortlist)
        if self.threads is not None:
            check_integer("threads", self.threads)
        if self.n_slots < 1:
            raise UserError(f"the number of slots must be at least 1, not {self.n_slots}")
        max_threads = 4 * (os.cpu_count() or 1)
        if self.threads is not None and not 1 <= self.threads <= max_threads:
            raise UserError(f"the number of threads must be from 1 to {max_threads} (4 per core), not {self.threads}")

    def check_torch(self) -> None:
        """Raise `UserError` if a setting is given that only the CPU engine has."""
        if self.shortlist:
            raise UserError("--shortlist is for the CPU engine: add --engine cpu")
        if self.threads is not None:
            raise UserError("--threads is for the CPU engine; set OMP_NUM_THREADS for the torch engine")


DEFAULT_ENGINE_CONFIG = EngineConfig()

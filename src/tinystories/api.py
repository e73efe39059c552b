"""`load`, the entry point of the Python API."""

from pathlib import Path
from typing import TYPE_CHECKING

from tinystories.engine.engine_config import EngineConfig

if TYPE_CHECKING:
    import torch

    from tinystories.generate.storyteller import Storyteller


def load(
    model: str | Path | None = None,
    *,
    engine: str = EngineConfig.engine,
    device: "str | torch.device" = EngineConfig.device,
    precision: str = EngineConfig.precision,
    n_slots: int = EngineConfig.n_slots,
    threads: int | None = EngineConfig.threads,
    shortlist: bool = EngineConfig.shortlist,
) -> "Storyteller":
    """Load a storyteller from a model directory, as written by `tinystories train`, or from the Hub.

    Args:
        model: a model directory, or hf:OWNER/NAME[@REVISION]. None: the model bundled with the package.
        engine: auto, cpu or torch. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).
        device: device of the torch engine: auto, cpu, cuda, cuda:1 or mps.
        precision: auto or fp32; int8, int8-a8 (int8 weights and 8-bit activations: faster prompts and batches) or int4
            (cpu engine); bf16 (torch engine, if the hardware supports it).
        n_slots: stories generated at once.
        threads: threads of the CPU engine. None: one per core, but one to continue a story with a small model, which
            more would not make faster.
        shortlist: generate only token ids that `tinystories quantize --shortlist` selected; faster (cpu engine).

    Raises `UserError` if the model is missing or damaged, or if a package that it needs is not installed.
    """
    from tinystories.generate.storyteller import Storyteller
    from tinystories.hub.client import resolve_model_folder

    folder = resolve_model_folder(model)
    engine_config = EngineConfig(
        engine=engine, device=device, precision=precision, n_slots=n_slots, threads=threads, shortlist=shortlist
    )
    return Storyteller.load(folder, engine_config)

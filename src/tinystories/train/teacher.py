"""Teachers of a run (train.teacher): trained models whose predictions the run also learns from."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tinystories import checkpoint
from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.torch_engine import load_model
from tinystories.errors import UserError
from tinystories.model import GPT


def load_teachers(
    folders: Sequence[str], student: ModelConfig, tokenizer: Tokenizer, device: torch.device
) -> list[GPT]:
    """Load model directories as frozen models in eval mode.

    Their architecture and size may differ from the student's. `UserError` if one is damaged, has another tokenizer than
    the data, another vocabulary size, or a shorter context than the student.
    """
    teachers = []
    for folder in folders:
        files = checkpoint.read_model(Path(folder))
        if files.tokenizer().sha256 != tokenizer.sha256:
            raise UserError(
                f"train.teacher: {folder} has another tokenizer than the data;"
                f" prepare the data with --tokenizer {folder}, or choose a teacher that was trained on this data"
            )
        if files.config.n_ctx < student.n_ctx:
            raise UserError(
                f"train.teacher: {folder} has a context of {files.config.n_ctx} tokens, which is less than"
                f" model.n_ctx={student.n_ctx}; lower model.n_ctx, or choose a teacher with a longer context"
            )
        if files.config.vocab_size != student.vocab_size:
            raise UserError(
                f"train.teacher: {folder} has model.vocab_size={files.config.vocab_size}, this run"
                f" {student.vocab_size}; choose a teacher whose vocabulary is padded to the same size"
            )
        teachers.append(load_model(files).to(device).eval().requires_grad_(False))
    return teachers

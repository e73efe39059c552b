"""Teachers of a run (train.teacher): trained models whose predictions the run also learns from.

A run remembers each of them by its absolute path and the hash of its weights. Resumed from another folder, where a
relative path leads nowhere or to another model, it finds them again or does not start.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tinystories import checkpoint
from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.torch_engine import load_model
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.train.run_data import is_run, model_sha256

log = logging.getLogger(__name__)


class TeacherRecord(NamedTuple):
    """A teacher as a checkpoint records it."""

    name: str  # as the settings name it
    folder: str  # its absolute path
    weights_sha256: str


def find_teachers(names: Sequence[str], run_dir: Path, records: Sequence[TeacherRecord]) -> list[TeacherRecord]:
    """Return where the teachers of a run are, and the hashes of their weights.

    `records` are those of its last checkpoint, if it is resumed and recorded them. `UserError` if a recorded teacher is
    neither at the path in the settings nor at the recorded one, with the weights that it had. A teacher with a new path
    is the user's choice; if it is another model, a warning says so.
    """
    if not records:
        folders = [find_unrecorded_model(name, "train.teacher", run_dir) for name in names]
        models = [checkpoint.read_model(folder, verify_weights=False) for folder in folders]
        return [
            TeacherRecord(name, os.path.abspath(model.folder), model.weights_sha256)
            for name, model in zip(names, models, strict=True)
        ]
    return [find_recorded_teacher(name, run_dir, records) for name in names]


def find_recorded_teacher(name: str, run_dir: Path, records: Sequence[TeacherRecord]) -> TeacherRecord:
    """Return where a teacher of a run that recorded its teachers is, as `find_teachers` does."""
    folder = os.path.abspath(name)
    expected = [record for record in records if record.name == name or record.folder == folder]
    if not expected:
        teacher = TeacherRecord(name, folder, checkpoint.read_model(name, verify_weights=False).weights_sha256)
        if teacher.weights_sha256 not in [record.weights_sha256 for record in records]:
            log.warning("%s continues with another teacher than before: %s", run_dir, folder)
        return teacher
    for record in expected:
        for candidate in (folder, record.folder):
            if model_sha256(candidate) == record.weights_sha256:
                return TeacherRecord(name, candidate, record.weights_sha256)
    raise UserError(
        f"train.teacher: {run_dir} was trained with {expected[0].folder}, which is not there or has other weights now;"
        " put it back, give its new path with --train.teacher DIR, or choose another --out"
    )


def find_unrecorded_model(name: str, setting: str, run_dir: Path) -> str:
    """Return the path of a model that a run names in a setting, and whose hash it has not recorded.

    A run that exists is of an earlier version, or has no checkpoint yet: a relative path leads from the folder in which
    it was started, which is the current one or one above the run. `UserError` if different models are found there.
    """
    if os.path.isabs(name) or not is_run(run_dir):
        return name
    folders = [str(parent / name) for parent in (Path.cwd(), *Path(os.path.abspath(run_dir)).parents)]
    models = {sha256: folder for folder in folders[::-1] if (sha256 := model_sha256(folder))}
    if len(models) > 1:
        raise UserError(
            f"{setting}: {run_dir} names {name}, and there are different models of that name:"
            f" {', '.join(models.values())}; give --{setting} with an absolute path"
        )
    return next(iter(models.values()), name)


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

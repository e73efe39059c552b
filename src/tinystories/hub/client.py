"""Hugging Face Hub: download models to `huggingface_hub`'s cache, and push models as one commit.

Code in a repository is neither downloaded nor run.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.data.source.hub import CONNECT_TIMEOUT_SECONDS, parse_hub_name
from tinystories.data.source.timeout import call_with_timeout
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError, quoted
from tinystories.files import DISK_FULL_ERRNOS, describe_write_error, sha256
from tinystories.formats.split_files import is_one_model

log = logging.getLogger(__name__)

METADATA_FILES = {"config.json", "generation.json", "generation_config.json", "merges.txt", "vocab.json"}
METADATA_FILES |= {"special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
METADATA_FILES |= {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")  # in order of preference; one kind is downloaded
INSTALL_COMMAND = 'pip install "tinystories-gpt[export]"'


def download(source: str) -> Path:
    """Download the readable files of hf:OWNER/NAME[@REVISION]; return their folder in `huggingface_hub`'s cache.

    Sizes and hashes are verified against the Hub's listing. After an interruption, completed files are kept. If the Hub
    does not answer within CONNECT_TIMEOUT_SECONDS, an earlier download is used, with a warning. `UserError` if there is
    none, if the repository or revision does not exist, is private, gated or without weights, or if the disk is full.
    """
    repo, revision = parse_hub_name(source)
    hf_hub = import_huggingface_hub()
    api = hf_hub.HfApi()
    with translate_errors(source, api.endpoint):
        options = {"revision": revision or None, "files_metadata": True, "timeout": CONNECT_TIMEOUT_SECONDS / 2}
        try:
            info = call_with_timeout(CONNECT_TIMEOUT_SECONDS, lambda: api.model_info(repo, **options))
        except Exception as error:
            cached_config = hf_hub.try_to_load_from_cache(repo, "config.json", revision=revision or None)
            if is_hub_refusal(error) or not isinstance(cached_config, str):
                raise
            log.warning("%s: the Hub does not answer (%s); using an earlier download", source, type(error).__name__)
            return Path(cached_config).parent
        files = select_files(source, info.siblings)
        check_disk_space(source, hf_hub, [f for f in files if not is_cached(hf_hub, repo, f.rfilename, info.sha)])
        names = [file.rfilename for file in files]  # safe as patterns: none contains * ? [ or /
        folder = Path(hf_hub.snapshot_download(repo, revision=revision or None, allow_patterns=names))
    if folder.name != info.sha:
        raise UserError(f"{source} changed during the download; run the same command again")
    for file in files:
        verify_hash(source, folder / file.rfilename, file)
    return folder


def select_files(source: str, files: Sequence[Any]) -> list[Any]:
    """Select the files of a listing to download: metadata and one kind of weights, from the top folder only.

    `UserError` if weights are missing, or if there are several GGUF files to choose from; parts of one are one.
    """
    top_level_files = [file for file in files if re.fullmatch(r"[\w.-]+", file.rfilename)]
    for kind in WEIGHT_PATTERNS:
        if weights := [file for file in top_level_files if fnmatchcase(file.rfilename, kind)]:
            break
    else:
        listing = ", ".join(sanitize(file.rfilename) for file in files[:10]) or "nothing"
        raise UserError(f"{source} has none of {', '.join(WEIGHT_PATTERNS)} in its top folder; it has {listing}")
    if len(weights) > 1 and kind == "*.gguf" and not is_one_model([Path(file.rfilename) for file in weights]):
        raise UserError(
            f"{source} has several models; download one of these files, then run: tinystories import FILE"
            f" ({', '.join(file.rfilename for file in weights)})"
        )
    return [file for file in top_level_files if file.rfilename in METADATA_FILES] + weights


def is_cached(hf_hub: Any, repo: str, name: str, commit: str) -> bool:
    return isinstance(hf_hub.try_to_load_from_cache(repo, name, revision=commit), str)


def check_disk_space(source: str, hf_hub: Any, files: Sequence[Any]) -> None:
    """Raise `UserError` if the files do not fit on the cache's disk; otherwise log how much is downloaded."""
    if not files:
        return
    needed_bytes = sum(file.size or 0 for file in files)
    cache_dir = Path(hf_hub.constants.HF_HUB_CACHE).absolute()
    free_bytes = shutil.disk_usage(next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{source} needs {needed_bytes / 1e6:,.1f} MB, but {cache_dir} has only {free_bytes / 1e6:,.1f} MB left;"
            " free space, or set HF_HUB_CACHE to another folder"
        )
    log.info("downloading %s: %d files, %.1f MB", source, len(files), needed_bytes / 1e6)


def verify_hash(source: str, path: Path, remote_file: Any) -> None:
    """Compare a file with the hash in the Hub's listing; on a mismatch, delete it and raise `UserError`.

    Large (LFS) files are listed with their SHA-256, others with git's blob hash.
    """
    if remote_file.lfs is not None:
        matches = sha256(path) == remote_file.lfs.sha256
    else:
        data = path.read_bytes()
        matches = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote_file.blob_id
    if not matches:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(
            f"{source}: {path.name} arrived damaged (wrong hash) and was deleted; run the same command again"
        )


def resolve_model_folder(model: str | Path | None) -> Path:
    """Return the folder of a MODEL argument: a directory, or hf:OWNER/NAME[@REVISION], which is downloaded.

    None is the bundled model. `UserError` if `download` fails, or if the repository is not one of our model
    directories.
    """
    if model is None:
        return checkpoint.BUNDLED_MODEL
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"a model is a folder or hf:OWNER/NAME, not {type(model).__name__}: {quoted(model)}")
    if not str(model).startswith("hf:"):
        return Path(model)
    folder = download(str(model))
    if not checkpoint.is_native_model(folder):
        raise UserError(f"{model} is a model of another program; import it first: tinystories import {model} --out DIR")
    return folder


def check_pushable(repo: str) -> None:
    """Raise `UserError` unless `repo` is OWNER/NAME and a Hub token is set (whether it may write is not checked)."""
    name, separator, revision = repo.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(f"{repo} is not of the form OWNER/NAME, such as me/small-stories")
    if separator:
        raise UserError(f"{repo}: pushes go to the main branch; leave @{revision} out")
    if not import_huggingface_hub().get_token():
        raise UserError(
            "pushing needs a token with write access: set HF_TOKEN to one from https://huggingface.co/settings/tokens,"
            " or run: hf auth login"
        )


def collect_files(folder: Path, repo: str, license: str = "") -> dict[str, Path | bytes]:
    """Return what to push of a model directory, by name: its checksummed files, config.json and the model card."""
    from tinystories.formats.bundle import ModelBundle
    from tinystories.hub.card import build_model_card

    names = ("config.json", *checkpoint.read_model(folder).checksums)
    card_text = build_model_card(ModelBundle.read(folder), repo, license)
    return {"README.md": card_text.encode()} | {name: folder / name for name in names}


def push(files: Mapping[str, Path | bytes], repo: str, *, private: bool = True, message: str = "") -> str:
    """Upload files as one commit and return the commit's URL; create the repository if it does not exist.

    `UserError` if the token has no write access, the Hub cannot be reached, or the existing repository is public and
    `private` is set.
    """
    check_pushable(repo)
    hf_hub = import_huggingface_hub()
    api = hf_hub.HfApi()
    with translate_errors(repo, api.endpoint):
        call_with_timeout(CONNECT_TIMEOUT_SECONDS, lambda: api.create_repo(repo, private=private, exist_ok=True))
        if private and not call_with_timeout(CONNECT_TIMEOUT_SECONDS, lambda: api.model_info(repo)).private:
            raise UserError(f"{repo} already exists and is public; push with --public, or choose another repository")
        add = hf_hub.CommitOperationAdd
        operations = [add(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        commit = api.create_commit(repo, operations, commit_message=message or "A model of TinyStories GPT")
    return str(commit.commit_url)


def import_huggingface_hub() -> Any:
    """Import huggingface_hub with its log silenced, and its progress bars shown on terminals only."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"the Hugging Face Hub needs huggingface_hub: {INSTALL_COMMAND}") from None
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def is_hub_refusal(error: Exception) -> bool:
    """Return whether the Hub answered with a refusal (HTTP status below 500, or an invalid name)."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code < 500
    return isinstance(error, HFValidationError)


@contextlib.contextmanager
def translate_errors(name: str, endpoint: str) -> Iterator[None]:
    """Turn every exception of the Hub client inside the block into a `UserError` about repository `name`."""
    from huggingface_hub import errors as hub_errors

    repo = name.removeprefix("hf:").partition("@")[0]
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        status = error.response.status_code if isinstance(error, hub_errors.HfHubHTTPError) else 0
        if isinstance(error, hub_errors.GatedRepoError):
            text = f": request access at {endpoint}/{repo}, then set HF_TOKEN to your token"
        elif isinstance(error, hub_errors.RepositoryNotFoundError):
            text = f": no model {repo} at {endpoint} (a private one needs HF_TOKEN)"
        elif isinstance(error, hub_errors.RevisionNotFoundError):
            text = f": {repo} has no such revision; see {endpoint}/{repo}/commits/main"
        elif isinstance(error, hub_errors.HFValidationError):
            text = f" is not a valid repository name: {sanitize(error)}"
        elif status in (401, 403):
            advice = "set HF_TOKEN to a token that may do this (https://huggingface.co/settings/tokens)"
            text = f": the Hub denied access ({status}); {advice}"
        elif isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            text = (
                ": the disk is full; free space, or set HF_HUB_CACHE to another folder, and run the same command again"
            )
        elif isinstance(error, OSError) and error.filename:
            text = f": {describe_write_error(error, repo)}"
        else:
            reason = f"{type(error).__name__}: {sanitize(error)[:200]}"
            text = f": cannot reach {endpoint}/{repo}, or its answer is invalid ({reason}); run the same command again"
        raise UserError(name + text) from None

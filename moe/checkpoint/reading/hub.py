"""Access to models on the Hugging Face Hub by name, if huggingface_hub is installed."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from moe.checkpoint.format.auxiliary import PATTERNS
from moe.checkpoint.format.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    has_all_weights,
    has_weights,
    locate,
    neighbour,
    previous_folder,
)
from moe.checkpoint.format.header import TensorInfo, check_name, parse_entry
from moe.checkpoint.format.quantized_formats import QUANTIZATION_FILES
from moe.errors import CheckpointError, ConfigError

CONFIGS = (CONFIG, *QUANTIZATION_FILES)
FILES = (*CONFIGS, INDEX, "model*.safetensors", *PATTERNS)

_NAME = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(\S{1,255}))?")
_ANSWER = TypeVar("_ANSWER")
_INCOMPLETE = "its cache does not have all of this model"


def find(folder: str | PathLike[str], revision: str | None = None, *, files: Sequence[str] = FILES) -> Path:
    """Return the checkpoint folder, or for a name on the Hub such as "org/model" its snapshot in the local cache.

    Args:
        folder: a path, or a name that no local folder has. A name may include a revision: "org/model@revision".
        revision: branch, tag or commit on the Hub.
        files: names and patterns of files to download; default: weights, configuration and auxiliary files.

    If the Hub cannot be reached, the local cache is used. Raises `CheckpointError`, with the Hub's answer if there is
    one, if the checkpoint is not found.
    """
    if not isinstance(folder, str | PathLike):
        raise ConfigError("folder", folder, "a path, or a name on the Hub")
    if not str(folder):
        raise CheckpointError("''", "not a folder", expected="the name of a folder")
    named = _parse(folder, revision)
    if named is None:
        return locate(folder, revision)
    name, revision = named

    def download(hub: Any) -> str:
        download = partial(hub.snapshot_download, name, revision=revision, allow_patterns=list(files))
        try:
            return download()
        except _unreachable():
            with contextlib.suppress(*_unreachable()):  # huggingface_hub 1 requires the list of a commit's files
                return download(local_files_only=True)
            raise

    return locate(_ask(download, *named))


def headers_on_hub(
    path: Path, folder: str | PathLike[str], revision: str | None = None, *, optional: bool = False
) -> dict[str, TensorInfo] | None:
    """Read headers of weights on the Hub; return None if all files are in `path`, and can be read there.

    `path` is the result of `find` for `folder` and `revision`. The tensors' paths are those that the files would have.
    If the Hub does not answer, raises CheckpointError, or returns an empty dictionary if `optional`.
    """
    named = _parse(folder, revision)
    if named is None or has_all_weights(path):
        return None
    name, revision = named
    commit = path.name  # even if a newer one has been pushed
    try:
        found = _ask(lambda hub: hub.get_safetensors_metadata(name, revision=commit), name, revision)
    except CheckpointError as error:
        if optional:
            return {}
        lacking = "all of its weights" if has_weights(path) else "its weights"
        reason = error.problem.removeprefix("no such folder; ")
        problem = f"its configuration is in the cache, but not {lacking}: {reason}"
        raise CheckpointError(error.path, problem, expected=error.expected, found=error.found) from error
    tensors = {}
    for file, metadata in found.files_metadata.items():
        for tensor, info in metadata.tensors.items():
            check_name(tensor, path / file)
            entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            tensors[tensor] = parse_entry(tensor, entry, path / file, 0)
    return tensors


@contextlib.contextmanager
def explain_cache_misses(folder: str | PathLike[str], revision: str | None = None) -> Iterator[None]:
    """Explain errors in the block about files that are missing in the Hub's cache.

    If the Hub cannot be reached, `find` returns a snapshot that may be incomplete.
    """
    try:
        yield
    except CheckpointError as error:
        named = _parse(folder, revision)
        what, _, advice = error.problem.partition("; ")
        if named is None or what.lower() not in ("no such file", "no tensors"):
            raise
        name, revision = named
        path = Path(error.path)
        file, commit = (SINGLE, path.name) if what == "no tensors" else (path.name, path.parent.name)
        try:
            _ask(lambda hub: hub.hf_hub_download(name, file, revision=commit), name, revision)
        except CheckpointError as answer:
            if not isinstance(answer.__cause__, _unreachable()):
                raise error from None
            problem = answer.problem.removeprefix("no such folder; ").replace(_INCOMPLETE, f"its cache has no {file}")
            problem += f"; {advice}" if advice else ""
            raise CheckpointError(answer.path, problem, expected=answer.expected) from error
        raise


def is_hub_name(folder: str | PathLike[str]) -> bool:
    """Whether `find` looks for `folder` on the Hub."""
    return _parse(folder, None) is not None


def _parse(folder: str | PathLike[str], revision: str | None) -> tuple[str, str | None] | None:
    """Return name and revision on the Hub; None for a local folder and for anything that is not a name."""
    found = _NAME.fullmatch(str(folder))
    if found is None or _exists_locally(Path(folder)):
        return None
    name, given = found.groups()
    if given is not None and _exists_locally(Path(name)):
        expected = f"{name}, because a folder has no revisions"
        raise CheckpointError(folder, f"no such folder, but {name} exists", expected=expected)
    if None not in (given, revision) and given != revision:
        raise ConfigError("revision", revision, f"{given}, the revision in {folder}")
    return name, given or revision


def _exists_locally(path: Path) -> bool:
    """Whether the path exists, perhaps unreadable, or can be recovered by `locate`."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return previous_folder(path).exists()
    except (OSError, ValueError):
        return True
    return True


def _ask(question: Callable[[Any], _ANSWER], name: str, revision: str | None) -> _ANSWER:
    """Call `question` with huggingface_hub; convert its errors to `CheckpointError`."""
    where = name if revision is None else f"{name}@{revision}"
    hint = neighbour(Path(name))
    try:
        import huggingface_hub
        from huggingface_hub import utils
    except ImportError:
        problem = f"no such folder; huggingface_hub is not installed, so it is not looked up on the Hub{hint}"
        raise CheckpointError(where, problem, expected="pip install huggingface_hub, or a folder") from None
    try:
        return question(huggingface_hub)
    except utils.GatedRepoError as error:
        problem = "access to this model on the Hub is restricted"
        expected = f"its terms accepted at {_url(name)}, and hf auth login or HF_TOKEN"
        raise CheckpointError(where, problem, expected=expected) from error
    except utils.RepositoryNotFoundError as error:
        problem = f"no such folder, and no such model on the Hub{hint}"
        raise CheckpointError(where, problem, expected="another name; for a private model, hf auth login") from error
    except utils.RevisionNotFoundError as error:
        problem = "the model on the Hub has no such revision"
        raise CheckpointError(where, problem, expected="a branch, tag or commit of it", found=revision) from error
    except utils.NotASafetensorsRepoError as error:
        problem = "the model on the Hub has no safetensors files"
        raise CheckpointError(where, problem, expected=f"{SINGLE} or {INDEX}") from error
    except utils.HFValidationError as error:
        raise CheckpointError(where, f"no such folder, and not a valid name on the Hub{hint}", found=name) from error
    except _unreachable() as error:
        answered = isinstance(error.__cause__, utils.HfHubHTTPError)
        state = "answers with an error" if answered else "is offline"
        problem = f"no such folder; the Hub {state} ({_cause(error)}), and {_INCOMPLETE}{hint}"
        expected = "a cached model, or a connection"
        raise CheckpointError(where, problem, expected=expected) from error
    except Exception as error:  # errors of the network, the Hub and the system
        raise CheckpointError(where, f"no such folder; huggingface_hub failed: {error!r}") from error


def _unreachable() -> tuple[type[Exception], ...]:
    """Return the errors of huggingface_hub if the Hub cannot be reached and its cache is incomplete."""
    from huggingface_hub import utils

    return utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled


def _url(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _cause(error: BaseException) -> str:
    """Return why the Hub could not be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    cause = error.__cause__
    return "no connection" if cause is None else str(cause).partition("\n")[0] or type(cause).__name__

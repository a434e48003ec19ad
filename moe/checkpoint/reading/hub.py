"""Models by their name on the Hugging Face Hub, through huggingface_hub if that is installed."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from moe.checkpoint.format.carried import PATTERNS
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
    """The checkpoint folder; or, for a name like "org/model" that is no folder here, the snapshot in the Hub's cache.

    A name can have a revision (branch, tag or commit), as "org/model@revision" or in `revision`. `files` are the names
    and patterns that are downloaded, by default those that a load reads or that travel with the model. Where the Hub
    cannot be reached, the local cache is used.

    Raises `CheckpointError` if there is neither; it says whether the Hub was asked, and what it answered.
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
            with contextlib.suppress(*_unreachable()):  # huggingface_hub 1 asks for the list of a commit's files
                return download(local_files_only=True)
            raise

    return locate(_ask(download, *named))


def headers_on_hub(
    path: Path, folder: str | PathLike[str], revision: str | None = None, *, optional: bool = False
) -> dict[str, TensorInfo] | None:
    """The headers of weights that are on the Hub and not all in its cache; None if the files of `path` are to be read.

    `path` is what `find` has returned for `folder` and `revision`. The paths of the tensors are those that the files
    would have. Raises CheckpointError if the Hub does not answer, or with `optional` returns an empty dictionary.
    """
    named = _parse(folder, revision)
    if named is None or has_all_weights(path):
        return None
    name, revision = named
    commit = path.name  # of the same snapshot, whatever has been pushed since
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
def from_cache(folder: str | PathLike[str], revision: str | None = None) -> Iterator[None]:
    """Raises for a file that the block misses in the Hub's cache an error that names the model and says why.

    `find` takes what the cache has if the Hub cannot be reached, which may be a part of the files.
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


def is_name(folder: str | PathLike[str]) -> bool:
    """Whether `find` looks for it on the Hub."""
    return _parse(folder, None) is not None


def _parse(folder: str | PathLike[str], revision: str | None) -> tuple[str, str | None] | None:
    """Name and revision on the Hub; None for what is a folder here, or can only be one."""
    found = _NAME.fullmatch(str(folder))
    if found is None or _is_here(Path(folder)):
        return None
    name, given = found.groups()
    if given is not None and _is_here(Path(name)):
        expected = f"{name} for the folder, which has no revisions"
        raise CheckpointError(folder, "no such folder, but one without the revision", expected=expected)
    if None not in (given, revision) and given != revision:
        raise ConfigError("revision", revision, f"{given}, as {folder} has it")
    return name, given or revision


def _is_here(path: Path) -> bool:
    """Whether `locate` has something to say about the path, be it that it cannot be read."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return previous_folder(path).exists()
    except (OSError, ValueError):
        return True
    return True


def _ask(question: Callable[[Any], _ANSWER], name: str, revision: str | None) -> _ANSWER:
    """What huggingface_hub answers. Raises `CheckpointError` with the reason if it has no answer."""
    where = name if revision is None else f"{name}@{revision}"
    hint = neighbour(Path(name))
    try:
        import huggingface_hub
        from huggingface_hub import utils
    except ImportError:
        problem = f"no such folder; huggingface_hub, which would look it up, is not installed{hint}"
        raise CheckpointError(where, problem, expected="pip install huggingface_hub, or a folder") from None
    try:
        return question(huggingface_hub)
    except utils.GatedRepoError as error:
        problem = "access to this model on the Hub is restricted"
        expected = f"its terms accepted on its page at {_page(name)}, and hf auth login or HF_TOKEN"
        raise CheckpointError(where, problem, expected=expected) from error
    except utils.RepositoryNotFoundError as error:
        problem = f"no such folder, and no such model on the Hub{hint}"
        raise CheckpointError(where, problem, expected="another name; for a private model, hf auth login") from error
    except utils.RevisionNotFoundError as error:
        problem = "the model on the Hub has no such revision"
        raise CheckpointError(where, problem, expected="a branch, tag or commit of it", found=revision) from error
    except utils.NotASafetensorsRepoError as error:
        problem = "the model on the Hub has no safetensors"
        raise CheckpointError(where, problem, expected=f"{SINGLE} or {INDEX}") from error
    except utils.HFValidationError as error:
        raise CheckpointError(where, f"no such folder, and not a valid name on the Hub{hint}", found=name) from error
    except _unreachable() as error:
        answered = isinstance(error.__cause__, utils.HfHubHTTPError)
        state = "answers with an error" if answered else "is offline"
        problem = f"no such folder; the Hub {state} ({_cause(error)}), and {_INCOMPLETE}{hint}"
        expected = "a model that is in the cache, or a connection"
        raise CheckpointError(where, problem, expected=expected) from error
    except Exception as error:  # the network's errors, other answers of the Hub, and the system's
        raise CheckpointError(where, f"no such folder; huggingface_hub failed: {error!r}") from error


def _unreachable() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where it cannot ask the Hub, and its cache has no answer."""
    from huggingface_hub import utils

    return utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _cause(error: BaseException) -> str:
    """Why the Hub could not be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    cause = error.__cause__
    return "no connection" if cause is None else str(cause).partition("\n")[0] or type(cause).__name__

"""Models by their name on the Hugging Face Hub, through huggingface_hub if that is installed."""

import re
from os import PathLike
from pathlib import Path

from moe.checkpoint.carried import PATTERNS
from moe.checkpoint.folder import CONFIG, INDEX, locate, previous_folder
from moe.checkpoint.quantization import QUANTIZATION_FILES
from moe.errors import CheckpointError

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def find(folder: str | PathLike[str]) -> Path:
    """The checkpoint folder; or, for a name like "org/model" that is no folder here, the snapshot in the Hub's cache.

    Only the files that a load reads or that travel with the model are downloaded. Raises `CheckpointError` if there is
    neither.
    """
    path = Path(folder)
    if not _NAME.fullmatch(str(folder)) or path.exists() or previous_folder(path).exists():
        return locate(folder)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            path, "no such folder; huggingface_hub, which would look it up, is not installed"
        ) from None
    try:
        files = [CONFIG, INDEX, "model*.safetensors", *QUANTIZATION_FILES, *PATTERNS]
        return locate(snapshot_download(str(folder), allow_patterns=files))
    except CheckpointError:
        raise
    except Exception as error:  # the library's own errors, the network's and the system's
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(path, f"no such folder, and huggingface_hub has no such model: {said}") from error

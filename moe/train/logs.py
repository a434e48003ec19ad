"""Live logging of a run to TensorBoard or Weights & Biases."""

import contextlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe.errors import ConfigError, one_line
from moe.train.settings import RunSettings

Log = Callable[[dict[str, Any]], None]

_EXTRAS = {"tensorboard": "log", "wandb": "wandb"}


def check_log(name: str | None) -> None:
    """Raise ConfigError if the package that --log needs is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise ConfigError(
            "--log", name, f'the package {name}, which is not installed; pip install -e ".[{_EXTRAS[name]}]"'
        )


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Flatten a record of `Metrics` to logged scalars: "train/ce", "validation/nats_per_token", ...

    MaxVio of each layer with experts is "train/max_vio/0", "train/max_vio/1", ... Loads of single experts are omitted.
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if name == "max_vio":
            found |= {f"{record['kind']}/{name}/{layer}": each for layer, each in enumerate(value)}
        elif isinstance(value, int | float) and name != "step":
            found[f"{record['kind']}/{name}"] = float(value)
    return found


@contextlib.contextmanager
def open_log(settings: RunSettings, folder: Path, step: int) -> Iterator[Log | None]:
    """Yield a function that sends records to the --log program; None without --log. The run resumes after `step`."""
    if settings.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # Hides what a killed run logged after its last saved state.
        with SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None) as writer:

            def write(record: dict[str, Any]) -> None:
                for name, value in scalars(record).items():
                    writer.add_scalar(name, value, record["step"])

            yield write
    elif settings.log == "wandb":
        with _wandb_run(settings, folder) as run:
            yield lambda record: run.log(scalars(record), step=record["step"])
    else:
        yield None


def _wandb_run(settings: RunSettings, folder: Path) -> Any:
    """Start or continue a run of Weights & Biases; offline if WANDB_MODE=offline."""
    import wandb  # pyright: ignore[reportMissingImports]

    file = folder / "wandb_id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    try:
        return wandb.init(
            project="moesmith",
            name=folder.name,
            id=file.read_text(),
            resume="allow",
            dir=folder,
            config=settings.deciding(),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        allowed = f"an account (wandb login), or WANDB_MODE=offline; found {one_line(error)}"
        raise ConfigError("--log", "wandb", allowed) from None

"""Mixture-of-Experts transformers: build, train, load and run them.

Shapes in every docstring and comment use one legend:

    B batch          T tokens (B * S)         R routed rows (T * K)
    S sequence       E experts                H attention heads
    D model width    K experts per token      C latent rank of MLA
    F expert width   L layers                 V vocabulary

Names are resolved on first use, so that `import moe` costs nothing and needs neither Triton, nor transformers, nor a
GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "moe.errors",
    "CheckpointError": "moe.errors",
    "ParallelError": "moe.errors",
    "ModelConfig": "moe.config",
    "RopeParameters": "moe.config",
    "preset": "moe.presets",
    "presets": "moe.presets",
    "MoELayer": "moe.layer",
    "MoEStats": "moe.layer",
    "Routing": "moe.ops",
    "Transformer": "moe.model",
    "generate": "moe.generation",
    "load": "moe.checkpoint",
    "save": "moe.checkpoint",
    "family_problems": "moe.checkpoint.format.config_json",
    "balance": "moe.balance",
    "ops": "moe.ops",
}
_MODULES = {"balance", "ops", "presets"}

if TYPE_CHECKING:
    from moe import balance as balance
    from moe import ops as ops
    from moe import presets as presets
    from moe.checkpoint import load as load
    from moe.checkpoint import save as save
    from moe.checkpoint.format.config_json import family_problems as family_problems
    from moe.config import ModelConfig as ModelConfig
    from moe.config import RopeParameters as RopeParameters
    from moe.errors import CheckpointError as CheckpointError
    from moe.errors import ConfigError as ConfigError
    from moe.errors import ParallelError as ParallelError
    from moe.generation import generate as generate
    from moe.layer import MoELayer as MoELayer
    from moe.layer import MoEStats as MoEStats
    from moe.model import Transformer as Transformer
    from moe.ops import Routing as Routing
    from moe.presets import preset as preset

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""Mixture-of-Experts transformers: build, train, load and run them.

Shapes in docstrings and comments use these letters:

    B batch          T tokens (B * S)         R routed rows (T * K)
    S sequence       E experts                H attention heads
    D model width    K experts per token      C latent rank of MLA
    F expert width   L layers                 V vocabulary

Names are imported on first use, so `import moe` is fast and requires neither Triton, nor transformers, nor a GPU.
"""

from typing import TYPE_CHECKING

from moe.lazy import attributes

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "moe.errors",
    "CheckpointError": "moe.errors",
    "ParallelError": "moe.errors",
    "ModelConfig": "moe.config",
    "RopeParameters": "moe.config",
    "preset": "moe.presets",
    "MoELayer": "moe.layer",
    "MoEStats": "moe.layer",
    "Routing": "moe.ops",
    "Transformer": "moe.model",
    "generate": "moe.generation",
    "load": "moe.checkpoint",
    "quantize": "moe.int8",
    "save": "moe.checkpoint",
    "family_problems": "moe.checkpoint.format.config_json",
}
_MODULES = (
    "balance",
    "checkpoint",
    "config",
    "counts",
    "errors",
    "integrations",
    "ops",
    "parallel",
    "planning",
    "presets",
    "quantized",
    "recipes",
    "train",
)

if TYPE_CHECKING:
    from moe import balance as balance
    from moe import checkpoint as checkpoint
    from moe import config as config
    from moe import counts as counts
    from moe import errors as errors
    from moe import integrations as integrations
    from moe import ops as ops
    from moe import parallel as parallel
    from moe import planning as planning
    from moe import presets as presets
    from moe import quantized as quantized
    from moe import recipes as recipes
    from moe import train as train
    from moe.checkpoint import load as load
    from moe.checkpoint import save as save
    from moe.checkpoint.format.config_json import family_problems as family_problems
    from moe.config import ModelConfig as ModelConfig
    from moe.config import RopeParameters as RopeParameters
    from moe.errors import CheckpointError as CheckpointError
    from moe.errors import ConfigError as ConfigError
    from moe.errors import ParallelError as ParallelError
    from moe.generation import generate as generate
    from moe.int8 import quantize as quantize
    from moe.layer import MoELayer as MoELayer
    from moe.layer import MoEStats as MoEStats
    from moe.model import Transformer as Transformer
    from moe.ops import Routing as Routing
    from moe.presets import preset as preset

__all__ = sorted((*_HOME, *_MODULES))  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__ = attributes(globals(), _HOME)


def __dir__() -> list[str]:
    return __all__

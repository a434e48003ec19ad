"""Role of each parameter: its initialisation and its treatment by optimizers. This module does not import torch."""

from dataclasses import dataclass
from typing import Literal

from moe.errors import ConfigError


@dataclass(frozen=True)
class Role:
    """Common properties of one kind of parameters.

    Attributes:
        ndim: number of dimensions; None if it varies.
        initial: initial values: "normal" with the config's standard deviation, "ones" or "zeros".
        decays: whether weight decay applies.
        orthogonalised: whether Muon applies: True for linear maps and stacks of them. Embeddings, heads, routers and
            gates are excluded, because they are tables of vectors, one per token or expert.
    """

    name: str
    ndim: int | None
    initial: Literal["normal", "ones", "zeros"] = "normal"
    decays: bool = False
    orthogonalised: bool = False


# Parameters by module and name, or by name alone if it is unique.
_NAMES: dict[Role, tuple[str, ...]] = {
    Role("embedding", 2, decays=True): ("embed_tokens.weight",),
    Role("head", 2, decays=True): ("lm_head.weight",),
    Role("projection", 2, decays=True, orthogonalised=True): (
        *(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *(f"{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    ),
    Role("MTP projection", 2, decays=True, orthogonalised=True): ("eh_proj.weight",),
    Role("experts", 3, decays=True, orthogonalised=True): ("gate_up_proj", "down_proj"),
    Role("router", 2, decays=True): ("gate.weight",),
    Role("gate", 2, decays=True): ("shared_expert_gate.weight",),
    Role("adapter", 2, decays=True): (
        *("lora_A.weight", "lora_B.weight", "lora_embedding_A.default", "lora_embedding_B.default"),
    ),
    Role("norm", 1, "ones"): (
        *(f"{name}norm.weight" for name in ("", "e", "h", "q_", "k_", "input_layer", "post_attention_layer")),
        *("q_a_layernorm.weight", "kv_a_layernorm.weight"),
    ),
    Role("bias", 1, "zeros"): (
        *(f"{name}_proj.bias" for name in ("q", "k", "v", "o", "q_a")),
        "kv_a_proj_with_mqa.bias",
    ),
    Role("expert bias", 2, "zeros"): ("gate_up_proj_bias", "down_proj_bias"),
    Role("router bias", 1, "zeros"): ("gate.bias",),
    Role("correction bias", 1, "zeros"): ("e_score_correction_bias",),
    Role("sink", 1): ("sinks",),
    Role("codes", None): ("gate_up_proj_blocks", "down_proj_blocks"),
    Role("scales", None): (
        *(f"{name}_proj_{kind}" for name in ("gate_up", "down") for kind in ("scale", "scales", "scale_inv")),
        *("weight_scale", "weight_scale_inv"),
    ),
}
ROLES: dict[str, Role] = {name: role for role, names in _NAMES.items() for name in names}


def role_of(parameter: str) -> Role:
    """Return the role of a parameter or buffer, given its name in a model or in a submodule.

    Name parts added by wrappers are ignored, such as `_orig_mod`, `base_layer` and `modules_to_save.x`. Raises
    ConfigError for a name without a role.
    """
    *modules, name = parameter.replace("parametrizations.", "").removesuffix(".original").split(".")
    if name in ROLES:
        return ROLES[name]
    for module in reversed(modules):
        if (key := f"{module}.{name}") in ROLES:
            return ROLES[key]
    raise ConfigError("parameter", parameter, "a name that has a role in moe/roles.py")

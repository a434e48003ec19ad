"""Conversion of a model to int8 weights."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import nn

from moe.errors import ConfigError
from moe.layer import Experts
from moe.linear import Linear
from moe.model import Transformer
from moe.packed import Packed
from moe.quantized import Int8Experts, Int8Linear, Quantized
from moe.roles import role_of

Quantization = Literal["int8"]

_ROLES = ("experts", "projection", "MTP projection", "head")


def quantize(model: Transformer, kind: Quantization) -> Transformer:
    """Convert experts, projections and an untied head to int8 weights, in place; return the model.

    Each output row has one scale, see `moe.ops.quantize_int8`. Embeddings, routers, gates, norms, biases and the kv_b
    projection of MLA keep their dtype. Int8 weights are frozen, and a model that has them cannot be saved. Modules are
    converted one after the other, so at most one is in memory in both forms.

    Raises:
        ConfigError: another kind, or anything but a Transformer without quantised, packed and sharded weights.
        ValueError: a weight that is NaN or infinite, with its name. The modules before it are converted.
    """
    check_kind("kind", kind)
    if not isinstance(model, Transformer):
        kind_of = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ConfigError("model", kind_of, "a moe.Transformer, such as moe.load returns, which is not wrapped")
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ConfigError("model", type(model).__name__, "no packed weights; call model.unpack() first")
    targets = dict(_targets(model))
    quantised = any(isinstance(module, Quantized) for module in model.modules())
    if not targets or quantised or any(hasattr(weight, "device_mesh") for weight in model.parameters()):
        raise ConfigError("model", type(model).__name__, "a model that is neither quantised nor sharded")
    for name in list(targets):
        try:
            model.set_submodule(name, _converted(targets.pop(name)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return model


def check_kind(name: str, kind: str | None) -> None:
    """Raise ConfigError, which names the argument, if `kind` is not a quantisation."""
    if kind not in get_args(Quantization):
        raise ConfigError(name, kind, " or ".join(map(repr, get_args(Quantization))))


def is_converted(parameter: str) -> bool:
    """Whether `quantize` converts the parameter of a Transformer.

    kv_b is not: decoding reads copies of it in x's dtype, so int8 would save no time and little memory.
    """
    return role_of(parameter).name in _ROLES and "kv_b_proj" not in parameter


def _targets(model: Transformer) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if type(module) is Experts or (type(module) is Linear and is_converted(f"{name}.weight")):
            yield name, module


def _converted(module: nn.Linear | Experts) -> Int8Linear | Int8Experts:
    if isinstance(module, nn.Linear):
        return Int8Linear.from_weights(module.weight, module.bias).train(module.training)
    gate_up, down, gate_up_bias, down_bias = module.operands()
    made = Int8Experts.from_weights(
        gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, activation=module.activation
    )
    return made.train(module.training)

"""What a model returns: a frozen dataclass, a mapping for trainers and a pytree for torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

_NAMES = ("loss", "logits", "hidden", "losses", "load")


@dataclass(frozen=True, init=False, eq=False)
class Output(dict[str, Any]):
    """What `Transformer.forward` returns.

    It is also a mapping of the attributes that are not None, with the loss first if there is one, and is made of one:
    trainers read `out["loss"]` or `out[0]`, and make new outputs by `type(out)({...})` to cast or move the tensors.

    Attributes:
        logits: [B, S, V], or the last `logits_to_keep` positions.
        hidden: [B, S, D], the state after the final norm, which MTP modules and heads of other kinds read.
        loss: scalar fp32, the sum to minimise, when labels were given.
        losses: its parts, detached: "ce", and in training "mtp", "balance", "z" where the config has them. "mtp" is
            the mean over modules before its weight; the balance losses carry their coefficients. In a
            `GlobalBatch.step` they and `loss` are this micro-batch's parts of the step's means.
        load: int64 [layers with experts, E], real tokens per expert in this call, MTP modules last.
    """

    loss: Tensor | None
    logits: Tensor
    hidden: Tensor
    losses: dict[str, Tensor]
    load: Tensor | None

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any) -> None:
        given = {"loss": None, "losses": {}, "load": None, **dict(values), **more}
        if set(given) != set(_NAMES):
            raise TypeError(f"Output: expected {', '.join(_NAMES)}, found {', '.join(map(str, given))}")
        for name in _NAMES:
            object.__setattr__(self, name, given[name])
        super().__init__({name: given[name] for name in _NAMES if given[name] is not None})

    def __getitem__(self, key: Any) -> Any:
        """The value of a name, or the n-th value, or a slice of the values."""
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("an Output does not change: make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # pyright: ignore

    def __reduce__(self) -> Any:
        return Output, (dict(self),)


pytree.register_pytree_node(
    Output,
    lambda out: (list(out.values()), list(out)),
    lambda values, names: Output(zip(names, values, strict=True)),
    flatten_with_keys_fn=lambda out: ([(pytree.GetAttrKey(name), out[name]) for name in out], list(out)),  # pyright: ignore[reportArgumentType]
    serialized_type_name="moe.output.Output",
)

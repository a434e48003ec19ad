"""Model output: a frozen dataclass that is also a mapping, for trainers, and a pytree, for torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

_NAMES = ("loss", "logits", "hidden", "losses", "load")


@dataclass(frozen=True, init=False, eq=False)
class Output(dict[str, Any]):
    """Output of `Transformer.forward`.

    It is also a mapping of the attributes that are not None, loss first. Trainers read `out["loss"]` or `out[0]`, and
    create outputs with cast or moved tensors by `type(out)({...})`.

    Attributes:
        logits: [B, S, V], or the last `logits_to_keep` positions.
        hidden: [B, S, D], the state after the final norm, the input of the head and of MTP modules.
        loss: fp32 scalar to minimise, if labels were given.
        losses: detached parts of the loss: "ce" and, in training, "mtp", "balance" and "z" if the config has them.
            "mtp" is the mean over modules, without its weight; "balance" and "z" include their coefficients. Within
            `GlobalBatch.step`, they and `loss` are this micro-batch's share of the step's means.
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
            raise TypeError(f"Output: expected {', '.join(_NAMES)}; found {', '.join(map(str, given))}")
        for name in _NAMES:
            object.__setattr__(self, name, given[name])
        super().__init__({name: given[name] for name in _NAMES if given[name] is not None})

    def __getitem__(self, key: Any) -> Any:
        """Return the value of a name, the n-th value, or a slice of the values."""
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("Output: immutable; use dataclasses.replace to create another")

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

"""Linear layers and experts with bfloat16 weights in oneDNN's layout, for inference on a CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.layer import Experts
from moe.linear import Linear
from moe.ops.library import autocast
from moe.ops.mlp import Products, mlp_by_expert
from moe.ops.packed import can_pack, pack_weight, packed_linear
from moe.ops.permutation import check_ids, check_weights

_UNDO = "call model.unpack() first"


class Packed(nn.Module):
    """Base of modules whose weights are `packed`, a list of matrices in oneDNN's layout.

    The matrices are neither parameters nor buffers. `repr`, `copy.deepcopy` and pickling work; `state_dict`, casts and
    moves to other devices raise an error, because they would lose the weights.
    """

    def __init__(self, packed: list[Tensor], training: bool, requires_grad: tuple[bool, ...]) -> None:
        super().__init__()
        self.packed = packed
        self.weights_require_grad = requires_grad
        self.train(training)

    def refuse_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise TypeError if `fn`, an argument of `_apply`, would change a dtype or a device."""
        changed = fn(torch.empty(0, dtype=torch.bfloat16))
        if changed.dtype != torch.bfloat16:
            raise TypeError(f"{type(self).__name__}: packed weights cannot be cast to {changed.dtype}; {_UNDO}")
        if changed.device.type != "cpu":
            raise TypeError(f"{type(self).__name__}: packed weights cannot be moved to {changed.device}; {_UNDO}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ConfigError("model", f"{prefix}packed", f"no packed weights in a state_dict or a saved model; {_UNDO}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore
        raise ConfigError("model", f"{prefix}packed", f"no packed weights when a state_dict is loaded; {_UNDO}")

    def _checked(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """Return x in the compute dtype. Raise TypeError for a wrong dtype, RuntimeError if a gradient is needed."""
        (x,) = autocast(x)  # pyright: ignore[reportAssignmentType]
        if x.dtype != torch.bfloat16:
            raise TypeError(f"x is {x.dtype}: expected torch.bfloat16, the dtype of the packed weights")
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *others)):
            raise RuntimeError(
                "packed weights compute no gradients: run the model under torch.no_grad() or torch.inference_mode(), "
                "or call model.unpack()"
            )
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": [matrix.to_dense() for matrix in self.packed]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "packed": [pack_weight(matrix) for matrix in state["packed"]]})


class PackedLinear(Packed):
    """`moe.linear.Linear` with a packed weight: y = x @ W.T + bias. x and y are bfloat16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__([pack_weight(linear.weight)], linear.training, (linear.weight.requires_grad,))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        x, (weight,) = self._checked(x, self.bias), self.packed
        if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected [..., {weight.shape[1]}]; found {tuple(x.shape)}")
        return packed_linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def unpacked(self) -> Linear:
        """Return the layer with an ordinary weight."""
        (weight,), (requires_grad,) = self.packed, self.weights_require_grad
        with torch.device("meta"):
            made = Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.to_dense(), requires_grad=requires_grad)
        made.bias = self.bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        rows, columns = self.packed[0].shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


class PackedExperts(Packed):
    """`moe.layer.Experts` with packed weights: E matrices gate_up [2F, D], then E matrices down [D, F]."""

    def __init__(self, experts: Experts) -> None:
        stacks = experts.gate_up_proj, experts.down_proj
        matrices = [pack_weight(matrix) for stacked in stacks for matrix in stacked]
        super().__init__(matrices, experts.training, tuple(stacked.requires_grad for stacked in stacks))
        self.gate_up_proj_bias, self.down_proj_bias = experts.gate_up_proj_bias, experts.down_proj_bias
        self.activation = experts.activation

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Apply `ops.moe_mlp`: x [T, D], weights [T, K] and expert_ids [T, K] -> [T, D]. Raises the same errors."""
        x = self._checked(x, weights, self.gate_up_proj_bias, self.down_proj_bias)
        check_ids(x, expert_ids)
        check_weights(weights, expert_ids)
        count, (width, hidden) = len(self.packed) // 2, self.packed[-1].shape
        if x.shape[1] != width:
            raise ValueError(f"x: expected [T, {width}]; found {tuple(x.shape)}")
        products = Products(
            count,
            hidden,
            lambda rows, expert: packed_linear(rows, self.packed[expert]),
            lambda rows, expert: packed_linear(rows, self.packed[count + expert]),
        )
        biases = (self.gate_up_proj_bias, self.down_proj_bias)
        gate_up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in biases)
        settings = self.activation.limit, self.activation.alpha, self.activation.beta
        return mlp_by_expert(x, products, weights, expert_ids, gate_up_bias, down_bias, *settings)

    def unpacked(self) -> Experts:
        """Return the experts with ordinary, stacked weights."""
        count, (width, hidden) = len(self.packed) // 2, self.packed[-1].shape
        with torch.device("meta"):
            made = Experts(count, width, hidden, activation=self.activation)
        names, stacks = ("gate_up_proj", "down_proj"), (self.packed[:count], self.packed[count:])
        for name, matrices, requires_grad in zip(names, stacks, self.weights_require_grad, strict=True):
            stacked = torch.empty(count, *matrices[0].shape, dtype=torch.bfloat16)
            for matrix, destination in zip(matrices, stacked, strict=True):
                destination.copy_(matrix.to_dense())
            made.register_parameter(name, nn.Parameter(stacked, requires_grad=requires_grad))
        made.gate_up_proj_bias, made.down_proj_bias = self.gate_up_proj_bias, self.down_proj_bias
        return made.train(self.training)

    def extra_repr(self) -> str:
        width, hidden = self.packed[-1].shape
        return f"num_experts={len(self.packed) // 2}, width={width}, hidden={hidden}"


def pack(model: nn.Module) -> None:
    """Convert the weights of linear layers and experts inside `model` to oneDNN's layout, in place.

    Modules that have hooks, share a weight, or have another class than `Linear` and `Experts`, such as adapters, remain
    as they are. Modules are converted one after the other, so at most one is in memory in both forms.

    Raises ConfigError if oneDNN cannot pack on this processor, if a weight is not bfloat16 on a CPU, or if there is
    nothing to pack. Then nothing is converted.
    """
    if not can_pack():
        found = torch.backends.cpu.get_cpu_capability()
        raise ConfigError("CPU", found, "AVX-512 or AVX-NE-CONVERT and a torch with oneDNN, for packed weights")
    targets = dict(_targets(model))
    if not targets:
        raise ConfigError("model", type(model).__name__, "linear layers or experts to pack; is it packed or quantised?")
    for name, module in targets.items():
        for weight in module.parameters(recurse=False):
            is_plain = type(weight) is nn.Parameter  # not of a library that shards or quantises
            if not is_plain or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
                found = f"{weight.dtype} on {weight.device}" if is_plain else type(weight).__name__
                raise ConfigError(name, found, "torch.bfloat16 on a CPU, for packed weights")
    for name in list(targets):
        module: Any = targets.pop(name)
        model.set_submodule(name, PackedLinear(module) if isinstance(module, Linear) else PackedExperts(module))


def unpack(model: nn.Module) -> None:
    """Undo `pack`: the modules have ordinary weights again, with the same values, in new parameters."""
    with torch.inference_mode(False):  # otherwise these parameters could never be trained
        for name in [name for name, module in model.named_modules() if isinstance(module, Packed)]:
            module: Any = model.get_submodule(name)
            model.set_submodule(name, module.unpacked())


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules to convert, with their names."""
    modules = list(model.named_modules(remove_duplicate=False))
    uses = Counter(id(weight) for _, module in modules for weight in module.parameters(recurse=False))
    for name, module in modules:
        weights = list(module.parameters(recurse=False))
        is_hooked = "forward" in vars(module) or any(hooks for kind, hooks in vars(module).items() if "_hooks" in kind)
        is_own = all(weight.numel() and uses[id(weight)] == 1 for weight in weights)
        if name and type(module) in (Linear, Experts) and is_own and not is_hooked:
            yield name, module

"""Base classes of modules with quantised weights: refused casts, loading, and dequantisation of experts on use."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe import ops
from moe.linear import linear
from moe.ops import SwiGLU
from moe.ops.library import autocast, differentiable_once, has_values
from moe.ops.permutation import check_ids, check_weights

Decode = Callable[..., Tensor]  # (codes, scales, *, dtype, out) -> weights


class Quantized(nn.Module):
    """Base of modules with codes and scales, named in `quantized`, that must not be cast."""

    quantized: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def refuse_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise TypeError if `fn`, an argument of `_apply`, would change a dtype."""
        for name in self.quantized:
            tensor = getattr(self, name)
            dtype = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype
            if dtype != tensor.dtype:
                raise TypeError(
                    f"{type(self).__name__}.{name}: a cast from {tensor.dtype} to {dtype} would destroy the quantised "
                    "weights; pass x in the compute dtype, or load the model dequantised to that dtype"
                )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch would cast the loaded tensor to the parameter's dtype, which turns values into codes or vice versa.
        wrong = []
        for name in self.quantized:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                wrong.append(f"dtype of {prefix}{name}: expected {own.dtype}, found {given.dtype}")
        error_msgs += wrong
        if not wrong:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __getstate__(self) -> dict[str, Any]:
        # As bytes, because torch cannot unpickle FP8.
        state = {**self.__dict__, "_parameters": {**self._parameters}, "_buffers": {**self._buffers}}
        dtypes = {name: getattr(self, name).dtype for name in self.quantized}
        for name in self.quantized:
            tensors = state["_parameters" if name in self._parameters else "_buffers"]
            tensors[name] = tensors[name].detach().view(torch.uint8) if dtypes[name].itemsize == 1 else tensors[name]
        return {**state, "_dtypes": dtypes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtypes = state.pop("_dtypes")
        super().__setstate__(state)
        for name, dtype in dtypes.items():
            if name in self._parameters:
                self._parameters[name] = frozen(self._parameters[name].view(dtype))  # pyright: ignore
            else:
                self._buffers[name] = self._buffers[name].view(dtype)  # pyright: ignore


def frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.detach(), requires_grad=False)


def new_bias(shape: tuple[int, ...], bias: bool) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if bias else None


def bias_parameter(bias: Tensor | None, shape: tuple[int, ...], name: str) -> nn.Parameter | None:
    if bias is None:
        return None
    if bias.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}; found {tuple(bias.shape)}")
    return nn.Parameter(bias.detach())


class FrozenLinear(torch.autograd.Function):
    """`linear` with a weight that has no gradient and is not saved dequantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, scale: Tensor, decode: Decode) -> Any:
        ctx.save_for_backward(weight, scale)
        ctx.decode, ctx.dtype = decode, x.dtype
        return linear(x, decode(weight, scale, dtype=x.dtype), bias)

    @staticmethod
    @differentiable_once("QuantizedLinear")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> Any:
        weight, scale = saved
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, ctx.decode(weight, scale, dtype=ctx.dtype).t())
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, None, None, None


class _FrozenMLP(torch.autograd.Function):
    """`ops.moe_mlp` with expert weights that have no gradient and are not saved.

    Calls the underlying operators directly: the forward operator returns the pre-activation for the backward pass, so
    that no product is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        gate_up: Tensor,
        gate_up_scale: Tensor,
        down: Tensor,
        down_scale: Tensor,
        decode_gate_up: Decode,
        decode_down: Decode,
        chosen: list[int] | None,
        activation: SwiGLU,
    ) -> Any:
        settings = activation.limit, activation.alpha, activation.beta
        ctx.decode_gate_up, ctx.decode_down, ctx.chosen, ctx.settings = decode_gate_up, decode_down, chosen, settings
        y, pre = torch.ops.moesmith.moe_mlp_forward.default(
            x,
            _decode(decode_gate_up, gate_up, gate_up_scale, x.dtype, chosen),
            _decode(decode_down, down, down_scale, x.dtype, chosen),
            weights,
            expert_ids,
            gate_up_bias,
            down_bias,
            *settings,
            True,
            "auto",
        )
        ctx.save_for_backward(
            x, weights, expert_ids, gate_up_bias, down_bias, gate_up, gate_up_scale, down, down_scale, pre
        )
        return y

    @staticmethod
    @differentiable_once("QuantizedExperts")
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> Any:
        x, weights, expert_ids, gate_up_bias, down_bias, *stored, pre = saved
        gate_up, gate_up_scale, down, down_scale = stored
        need_x, need_weights, _, need_gate_up_bias, need_down_bias = needed = ctx.needs_input_grad[:5]
        results = torch.ops.moesmith.moe_mlp_backward.default(
            grad,
            x,
            _decode(ctx.decode_gate_up, gate_up, gate_up_scale, x.dtype, ctx.chosen),
            _decode(ctx.decode_down, down, down_scale, x.dtype, ctx.chosen),
            weights,
            expert_ids,
            gate_up_bias,
            down_bias,
            pre,
            *ctx.settings,
            [need_x, False, False, need_weights, need_gate_up_bias, need_down_bias],
            "auto",
        )
        grad_x, _, _, grad_weights, grad_gate_up_bias, grad_down_bias = results
        grads = (grad_x, grad_weights, None, grad_gate_up_bias, grad_down_bias)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 8


def _decode(decode: Decode, codes: Tensor, scale: Tensor, dtype: torch.dtype, chosen: list[int] | None) -> Tensor:
    """Dequantise and stack the matrices of the chosen experts; None for all."""
    if chosen is None:
        return decode(codes, scale, dtype=dtype)
    none = decode(codes[:0], scale[:0], dtype=dtype)
    out = none.new_empty(len(chosen), *none.shape[1:])
    for expert, matrix in zip(chosen, out, strict=True):
        decode(codes[expert], scale[expert], out=matrix)
    return out


class QuantizedExperts(Quantized):
    """Base of FP8Experts, Int8Experts and MXFP4Experts, with the interface of `moe.layer.Experts`.

    Under autocast x and the biases are cast, as in `ops.moe_mlp`, and the weights are dequantised to autocast's dtype;
    otherwise to x's.

    On CPU only the experts that a batch uses are dequantised, for one token K of them. On other devices and in compiled
    graphs all experts are, because selecting them would make the host wait for the device. Then the experts of one
    layer are in memory in x's dtype while the layer runs.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        bias: bool,
        activation: SwiGLU,
    ) -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.activation = activation
        self.gate_up_proj_bias = new_bias((num_experts, 2 * hidden), bias)
        self.down_proj_bias = new_bias((num_experts, width), bias)

    @classmethod
    def _from_tensors(
        cls,
        gate_up: tuple[int, ...],
        down: tuple[int, ...],
        parts: tuple[Tensor, ...],
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        **settings: Any,
    ) -> Self:
        """Build a module from `parts`, in the order of `quantized`; gate_up and down are the shapes of the matrices."""
        if len(gate_up) != 3 or gate_up[1] % 2:
            raise ValueError(f"gate_up: expected [E, 2F, D]; found {tuple(gate_up)}")
        num_experts, width, hidden = gate_up[0], gate_up[2], gate_up[1] // 2
        if tuple(down) != (num_experts, width, hidden):
            raise ValueError(f"down: expected {[num_experts, width, hidden]}; found {tuple(down)}")
        with torch.device("meta"):
            made = cls(num_experts, width, hidden, **settings)
        for name, part in zip(cls.quantized, parts, strict=True):
            setattr(made, name, frozen(part) if name in made._parameters else part.detach())
        made.gate_up_proj_bias = bias_parameter(gate_up_bias, (num_experts, 2 * hidden), "gate_up_bias")
        made.down_proj_bias = bias_parameter(down_bias, (num_experts, width), "down_bias")
        return made

    def _decoders(self) -> tuple[Decode, Decode]:
        """Return the functions that dequantise gate_up_proj and down_proj."""
        raise NotImplementedError

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Apply `ops.moe_mlp`: x [T, D], weights [T, K] and expert_ids [T, K] -> [T, D]. Raises the same errors."""
        x, gate_up_bias, down_bias = self._operands(x, weights, expert_ids)
        chosen: list[int] | None = None
        if x.device.type == "cpu" and has_values(x) and not torch.compiler.is_compiling():
            chosen, expert_ids = self._choose(expert_ids)
            index = torch.tensor(chosen, dtype=torch.int64, device=x.device)
            gate_up_bias, down_bias = (
                None if bias is None else bias.index_select(0, index) for bias in (gate_up_bias, down_bias)
            )
        stored, decoders = [getattr(self, name) for name in self.quantized], self._decoders()
        leaves = (x, weights, gate_up_bias, down_bias)
        if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
            return _FrozenMLP.apply(  # pyright: ignore[reportReturnType]
                x, weights, expert_ids, gate_up_bias, down_bias, *stored, *decoders, chosen, self.activation
            )
        gate_up, gate_up_scale, down, down_scale = stored
        return ops.moe_mlp(
            x,
            _decode(decoders[0], gate_up, gate_up_scale, x.dtype, chosen),
            _decode(decoders[1], down, down_scale, x.dtype, chosen),
            weights,
            expert_ids,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=self.activation,
        )

    def _operands(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Check the arguments of `forward`; return x and the biases in the compute dtype."""
        (x,) = autocast(x)  # pyright: ignore[reportAssignmentType]
        check_ids(x, expert_ids)
        check_weights(weights, expert_ids)
        if x.shape[1] != self.width:
            raise ValueError(f"x: expected [T, {self.width}]; found {tuple(x.shape)}")
        biases = (self.gate_up_proj_bias, self.down_proj_bias)
        gate_up_bias, down_bias = (None if bias is None else bias.to(x.dtype) for bias in biases)
        return x, gate_up_bias, down_bias

    def _choose(self, expert_ids: Tensor) -> tuple[list[int], Tensor]:
        """Return the used experts in order, and expert_ids as indices into them; -1 is kept."""
        used = expert_ids.unique().tolist()
        for expert in used[:1] + used[-1:]:
            if not -1 <= expert < self.num_experts:
                raise IndexError(f"expert_ids: {expert} is neither -1 nor in [0, {self.num_experts})")
        chosen = [expert for expert in used if expert != -1]
        place = expert_ids.new_full((self.num_experts + 1,), -1)  # the last entry is for id -1
        place[chosen] = torch.arange(len(chosen), device=place.device)
        return chosen, place[expert_ids]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, width={self.width}, hidden={self.hidden}"

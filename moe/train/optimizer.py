"""Optimizers: AdamW, or Muon for matrices with AdamW for all other parameters."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.roles import role_of

OptimizerName = Literal["adamw", "muon"]

ADAM_BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95
# Fraction of the learning rate for AdamW beside Muon. At the full rate, the embedding learns short texts before the
# experts specialise: for the tiny preset, random routing then costs 0.02 nats per token, and ten times that at 0.3.
ADAM_SHARE = 0.3
# Keller Jordan's quintic, the defaults of torch.optim.Muon.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_NORM_EPS = 1e-7


class BatchedMuon(torch.optim.Optimizer):
    """Muon for stacks of matrices [..., N, K], each updated separately.

    torch.optim.Muon supports only 2-D parameters. This equals it for each matrix, with
    `adjust_lr_fn="match_rms_adamw"` and Nesterov momentum, up to the order of sums in products (see `_multiply_add`).
    A rank updates the whole matrices of a DTensor that it holds. Sharded matrices are gathered, one parameter at a
    time, and every rank with a shard computes the full update.

    Source: https://kellerjordan.github.io/posts/muon/; learning-rate scale: arXiv 2502.16982.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = MUON_MOMENTUM) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"BatchedMuon: expected matrices; found {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = _orthogonalize_parts(parameter.grad.lerp(buffer, momentum))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))
        return loss


def _orthogonalize_parts(matrices: Any) -> Tensor:
    """Apply `orthogonalize`, keeping the placement of the matrices."""
    if not hasattr(matrices, "to_local"):
        return orthogonalize(matrices)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = matrices.device_mesh, matrices.placements
    # Gathers only shards of matrices, not shards of the stack.
    whole = [Replicate() if p.is_shard(matrices.ndim - 2) or p.is_shard(matrices.ndim - 1) else p for p in placements]
    gathered = matrices.redistribute(placements=whole)
    local = orthogonalize(gathered.to_local())
    made = DTensor.from_local(local, mesh, whole, run_check=False, shape=matrices.shape, stride=matrices.stride())
    return made.redistribute(placements=placements)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each matrix [..., N, K], in bf16; singular values 0.7 to 1.2.

    Five Newton-Schulz iterations X <- aX + (bA + cA^2) X with A = X X^T, on the smaller side. Zero stays zero.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.reshape(-1, *matrices.shape[-2:]).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(_NORM_EPS)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = _multiply_add(None, x, x.mT)
        x = _multiply_add(x, _multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _multiply_add(c: Tensor | None, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Compute beta c + alpha a b of bf16 stacks, accumulated in fp32 and rounded to bf16 once."""
    if a.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # Without AVX512, bf16 products are ten times slower than fp32 ones, which are exact for the same inputs.
        a, b, c = a.float(), b.float(), c if c is None else c.float()
    c = a.new_zeros(()) if c is None else c
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha).bfloat16()


def _is_parallel() -> bool:
    """Return whether parameters may be DTensors, without importing their module, which takes half a second."""
    return dist.is_available() and dist.is_initialized()


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    if not _is_parallel():
        return [parameters]
    from moe.parallel import by_mesh

    return by_mesh(parameters)


def build_optimizers(
    model: nn.Module, name: OptimizerName, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Build one optimizer ("adamw") or up to three ("muon"), to be stepped together.

    Every parameter that requires a gradient belongs to exactly one, according to its role in `moe.roles`. Norms, biases
    (those of experts included) and sinks are not decayed. Muon updates projections and stacks of them. Its updates have
    the size of AdamW updates, so both share one learning rate, of which AdamW beside Muon uses the fraction ADAM_SHARE.
    The last optimizer is AdamW. Raises ConfigError for a parameter without a role.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    stacks: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of(parameter_name)
        if role.ndim not in (None, parameter.ndim):
            found = f"parameter {parameter_name}, a {role.name}"
            raise ConfigError(found, tuple(parameter.shape), f"{role.ndim} dimensions")
        if role.orthogonalised and name == "muon":
            (matrices if parameter.ndim == 2 else stacks).append(parameter)
        else:
            (decayed if role.decays else undecayed).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if _is_parallel():
        stacks, matrices = matrices + stacks, []  # torch's Muon would sum products of shards in another order
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr, weight_decay=weight_decay, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
            )
        )
    if stacks:
        optimizers.append(BatchedMuon(stacks, lr, weight_decay))
    groups = [
        {"params": members, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (undecayed, 0.0))
        for members in _by_mesh(parameters)
    ]
    optimizers.append(torch.optim.AdamW(groups, lr if name == "adamw" else ADAM_SHARE * lr, betas=ADAM_BETAS))
    return optimizers

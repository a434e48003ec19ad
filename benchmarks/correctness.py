"""Correctness of results: near float64 on the same rounded inputs, in every row. Only correct results are timed.

A result is judged tensor by tensor, by three relative errors; the norms are of the float64 values:

    whole  ||found - exact|| / ||exact||             at most t = 4 u + a, a = 8 sqrt(inner) 2^-24
    row    the same for each row, the worst of all   at most t (1 + 5 / sqrt(L)), L independent errors in a row
    scale  |<found, exact> / <exact, exact> - 1|     at most u / 2 + a + 5 e / sqrt(N), N independent errors in all

The first two are also limited to twice those of plain eager PyTorch in the same dtype, for the row times
1 + 1 / sqrt(L), plus a; e is the first of eager.

u is the dtype's unit roundoff. A chain rounds the pre-activation, the hidden values, the rows and their sum, and
accumulates over `inner` products in float32, in an order of its own. Few errors scatter more, which the row's limit
allows for. A row of an expert's gradient is a sum over its tokens, and all its elements share their errors. A row is
measured by its own norm or the typical norm of its kind (of all tokens; of one expert), whichever is larger, because a
row that is small by cancellation has errors like those of its neighbours. Rounding errors have no direction, so the
scale shows systematic ones: u / 2 is the error of one weight in the dtype, shared by a whole row.

So these fail in every dtype: a row of zeros or of flipped signs, a token without one of its experts, a factor of 1.004;
and products in TF32 fail for float32.

If float64 for everything would take too long, a sample of tokens and of experts is compared. All other rows must be
finite and, if tokens reach them, not zero.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import GemmInputs, LayerInputs, RouteInputs

# FLOPs in float64 for one check: about a second.
BUDGET = {"cuda": 3e13, "cpu": 2e10}
# Elements of experts' gradients in float64: at most 8 GiB.
MOST_ELEMENTS = 2**30


@dataclass(frozen=True)
class Exact:
    """Expected `values`, float64, at `index` of dimension 0; `eager` is computed in the judged dtype.

    Entries with `reached` [dim 0] cannot be zero. An element is a sum of `inner` products. A row has `independent`
    errors, the whole tensor `errors`.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    eager: Tensor
    reached: Tensor
    inner: int
    independent: int
    errors: int


@dataclass(frozen=True)
class Verdict:
    """Errors of one tensor and their limits; `fault` describes a defect that has no error, such as a wrong shape."""

    error: float
    row_error: float
    limit: float
    row_limit: float
    scale_error: float = 0.0
    scale_limit: float = math.inf
    fault: str = ""

    @property
    def right(self) -> bool:
        within = self.error <= self.limit and self.row_error <= self.row_limit and self.scale_error <= self.scale_limit
        return not self.fault and within

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        whole = f"error {self.error:.1e} (at most {self.limit:.1e})"
        row = f"worst row {self.row_error:.1e} ({self.row_limit:.1e})"
        return f"{whole}, {row}, scale {self.scale_error:.1e} ({self.scale_limit:.1e})"


def accumulation(inner: int) -> float:
    return 8 * math.sqrt(inner) * 2.0**-24


def tolerance(dtype: torch.dtype, inner: int) -> float:
    return 4 * torch.finfo(dtype).eps / 2 + accumulation(inner)


def judge(found: Any, exact: Exact, dtype: torch.dtype) -> Verdict:
    limit, accumulated = tolerance(dtype, exact.inner), accumulation(exact.inner)
    row_limit = limit * (1 + 5 / math.sqrt(exact.independent))
    fault = _misfit(found, exact.shape)
    if fault:
        return Verdict(math.inf, math.inf, limit, row_limit, fault=fault)
    found = found.detach()
    eager, eager_row, _ = _errors(exact.eager, exact.values)
    eager_row *= 1 + 1 / math.sqrt(exact.independent)
    whole, row, scale = _errors(found.index_select(0, exact.index), exact.values)
    return Verdict(
        whole,
        row,
        min(limit, 2 * eager + accumulated),
        min(row_limit, 2 * eager_row + accumulated),
        scale,
        torch.finfo(dtype).eps / 4 + accumulated + 5 * eager / math.sqrt(max(exact.errors, 1)),
        _fault_elsewhere(found, exact),
    )


def _misfit(found: Any, shape: tuple[int, ...], floating: bool = True) -> str:
    """Why `found` is not a tensor of that shape with real numbers (or integers); empty if it is."""
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} instead of a tensor"
    if tuple(found.shape) != shape:
        return f"shape {tuple(found.shape)} instead of {shape}"
    if found.is_floating_point() != floating or found.is_complex() or found.dtype == torch.bool:
        return f"{found.dtype} instead of {'a floating point type' if floating else 'an integer type'}"
    return ""


def _errors(found: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Errors of the whole, of the worst row and of the scale; infinite instead of NaN."""
    difference = found.double() - exact
    norms = exact.norm(dim=-1)
    typical = norms.square().mean(dim=-1, keepdim=True).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    rows = difference.norm(dim=-1) / torch.maximum(norms, typical).clamp_min(tiny)
    whole = difference.norm() / exact.norm().clamp_min(tiny)
    worst = rows.nan_to_num(math.inf).max() if rows.numel() else rows.new_zeros(())
    scale = ((difference * exact).sum() / exact.square().sum().clamp_min(tiny)).abs()
    return float(whole.nan_to_num(math.inf)), float(worst), float(scale.nan_to_num(math.inf))


def _fault_elsewhere(found: Tensor, exact: Exact) -> str:
    if exact.index.numel() == exact.shape[0]:
        return ""
    largest = found.flatten(1).abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        return "some rows are not finite"
    zeros = int(((largest == 0) & exact.reached).sum())
    return f"{zeros} rows are zero" if zeros else ""


def layer(inputs: LayerInputs, budget: float) -> dict[str, Exact]:
    """y and, if `inputs.train`, the gradients of x, gate_up, down and weights, by autograd in float64."""
    (tokens, d), (experts, _, n) = inputs.x.shape, inputs.down.shape
    ids, top_k, device = inputs.expert_ids, inputs.expert_ids.shape[1], inputs.x.device
    counts = torch.bincount(ids.flatten(), minlength=experts)
    each = (18 if inputs.train else 6) * d * n
    sample = _sample(tokens, int(budget / (each * top_k)), device)
    chosen = _sample_experts(counts, budget / each, 3 * d * n) if inputs.train else []
    place = torch.full((tokens,), -1, device=device)
    place[sample] = torch.arange(sample.numel(), device=device)

    def zeros(dtype: torch.dtype) -> list[Tensor]:
        """y, dx, dgate_up, ddown, dweights"""
        token, own = (sample.numel(), d), len(chosen)
        shapes = (token, token, (own, 2 * n, d), (own, d, n), (sample.numel() * top_k,))
        wide = torch.promote_types(dtype, torch.float32)
        return [torch.zeros(shape, dtype=wide if len(shape) == 1 else dtype, device=device) for shape in shapes]

    results = {dtype: zeros(dtype) for dtype in (torch.float64, inputs.x.dtype)}
    chosen_slots = 0
    for expert in range(experts):
        slots = (ids.flatten() == expert).nonzero().squeeze(1)
        at = place[slots // top_k]
        if expert not in chosen:
            slots, at = slots[at >= 0], at[at >= 0]
        if slots.numel() == 0:
            continue
        token, here = slots // top_k, at >= 0
        chosen_slots += slots.numel() if expert in chosen else 0
        for dtype, (y, dx, dgate_up, ddown, dweights) in results.items():
            routing = inputs.weights.flatten()[slots].to(dweights.dtype)
            leaves = [t[i].detach().to(dtype) for t, i in ((inputs.x, token), (inputs.gate_up, expert))]
            leaves += [inputs.down[expert].detach().to(dtype), routing.detach()]
            x, gate_up, down, weights = (leaf.requires_grad_(inputs.train) for leaf in leaves)
            gate, up = (x @ gate_up.t()).chunk(2, dim=1)
            rows = ((F.silu(gate) * up @ down.t()) * weights[:, None]).to(dtype)
            y.index_add_(0, at[here], rows.detach()[here])
            if not inputs.train:
                continue
            g_x, g_gate_up, g_down, g_weights = torch.autograd.grad(rows, leaves, inputs.grad[token].to(dtype))
            dx.index_add_(0, at[here], g_x[here])
            dweights[at[here] * top_k + slots[here] % top_k] = g_weights[here]
            if expert in chosen:
                dgate_up[chosen.index(expert)], ddown[chosen.index(expert)] = g_gate_up, g_down
    (y, dx, dgate_up, ddown, dweights), eager = results[torch.float64], results[inputs.x.dtype]
    inner, every = max(d, n), torch.ones(tokens, dtype=torch.bool, device=device)
    errors = sample.numel() * min(d, n)
    exact = {"y": Exact((tokens, d), sample, y, eager[0], every, inner, d, errors)}
    if inputs.train:
        index, longest = torch.tensor(chosen, device=device), max(inner, int(counts.max()))
        exact["dx"] = Exact((tokens, d), sample, dx, eager[1], every, inner, d, errors)
        fewest, own = int(counts[counts > 0].min()), chosen_slots * min(d, n)
        exact["dgate_up"] = Exact(
            (experts, 2 * n, d), index, dgate_up, eager[2], counts > 0, longest, min(fewest, d), own
        )
        exact["ddown"] = Exact((experts, d, n), index, ddown, eager[3], counts > 0, longest, min(fewest, n), own)
        routing, eager_routing = dweights.view(-1, top_k), eager[4].view(-1, top_k)
        exact["dweights"] = Exact(
            (tokens, top_k), sample, routing, eager_routing, every, inner, top_k, dweights.numel()
        )
    return exact


def gemm(inputs: GemmInputs, budget: float) -> dict[str, Exact]:
    """Sampled rows of a [R, K] x b [E, K, N], or sampled experts of a [M, R] x b [R, N]."""
    a, b, device = inputs.a, inputs.b, inputs.a.device
    ends = inputs.offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    counts = torch.tensor([end - start for start, end in spans], device=device)
    if b.dim() == 2:
        size = a.shape[0] * b.shape[1]
        chosen = _sample_experts(counts, budget / (2 * size), size)
        operands = [(a[:, slice(*spans[e])], b[slice(*spans[e])]) for e in chosen]
        values = torch.stack([left.double() @ right.double() for left, right in operands])
        eager = torch.stack([left @ right for left, right in operands])
        index = torch.tensor(chosen, device=device)
        shape, inner = (len(spans), a.shape[0], b.shape[1]), int(counts.max())
        return {"out": Exact(shape, index, values, eager, counts > 0, inner, b.shape[1], values.numel())}
    sample = _sample(a.shape[0], int(budget / (2 * b.shape[1] * b.shape[2])), device)
    values = torch.empty(sample.numel(), b.shape[2], dtype=torch.float64, device=device)
    eager = values.to(a.dtype)
    for expert, (start, end) in enumerate(spans):
        here = ((sample >= start) & (sample < end)).nonzero().squeeze(1)
        if here.numel():
            values[here] = a[sample[here]].double() @ b[expert].double()
            eager[here] = a[sample[here]] @ b[expert]
    every = torch.ones(a.shape[0], dtype=torch.bool, device=device)
    shape = (a.shape[0], b.shape[2])
    return {"out": Exact(shape, sample, values, eager, every, b.shape[1], b.shape[2], values.numel())}


def judge_route(found: Any, inputs: RouteInputs) -> Verdict:
    """Judge (weights, ids): K distinct experts, no better one left out, and their own weights."""
    limit = tolerance(torch.float32, inputs.logits.shape[1])
    row_limit = limit * (1 + 5 / math.sqrt(inputs.top_k))
    shape = (inputs.logits.shape[0], inputs.top_k)
    weights, ids = found
    fault = _misfit(weights, shape) or _misfit(ids, shape, floating=False)
    if fault:
        return Verdict(math.inf, math.inf, limit, row_limit, fault=fault)
    scores, ids = inputs.logits.double().softmax(dim=1), ids.long()
    ordered = ids.sort(dim=1).values
    if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= scores.shape[1]:
        return Verdict(math.inf, math.inf, limit, row_limit, fault="some ids name no expert")
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return Verdict(math.inf, math.inf, limit, row_limit, fault="some tokens name an expert twice")
    selected, best = scores.gather(1, ids), scores.topk(inputs.top_k, dim=1).values.sum(dim=1)
    left_out = 1 - selected.sum(dim=1) / best
    expected = selected / selected.sum(dim=1, keepdim=True)
    rows = ((weights.double() - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(math.inf)
    worst = torch.maximum(rows, left_out)
    return Verdict(float(worst.square().mean().sqrt()), float(worst.max()), limit, row_limit)


def _sample(size: int, affordable: int, device: torch.device) -> Tensor:
    """Ascending indices below `size`: all if affordable, otherwise a sample with the first and the last."""
    if affordable >= size:
        return torch.arange(size, device=device)
    index = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(affordable, 16)]
    return torch.cat([index, torch.tensor([0, size - 1])]).unique().to(device)


def _sample_experts(counts: Tensor, affordable_rows: float, elements: int) -> list[int]:
    """The most and the least loaded expert, and others while their rows and elements are affordable."""
    order = counts.cpu().argsort(descending=True, stable=True).tolist()
    others = torch.randperm(len(order), generator=torch.Generator().manual_seed(0)).tolist()
    chosen, rows = list(dict.fromkeys((order[0], order[-1]))), 0
    for expert in others:
        rows += int(counts[expert])
        if rows > affordable_rows or (len(chosen) + 1) * elements > MOST_ELEMENTS:
            break
        if expert not in chosen:
            chosen.append(expert)
    return sorted(chosen)

"""What a result must be before it gets a number: near float64 on the same rounded inputs, in every row.

A result is judged tensor by tensor. Two relative errors, with the norms of float64's values below:

    whole  ||found - exact|| / ||exact||             at most t = 4 u + 8 sqrt(inner) 2^-24
    row    the same of each row, its worst           at most t (1 + 5 / sqrt(L)), L independent errors in a row

u is the dtype's unit roundoff: a chain rounds the pre-activation, the hidden values, the rows and their sum, and
accumulates over `inner` products in float32. Few errors scatter more, which the row's limit allows for; a row of an
expert's gradient is a sum over its tokens, and all its elements share theirs. A row is
measured by its own norm or the typical one of its kind (of all tokens; of one expert), whichever is larger: what is
small because it cancels has an error like its neighbours'. So a row of zeros or of flipped signs fails in every dtype,
a factor of 1.02 in float32 and bfloat16, and products in TF32 are wrong for float32.

Where float64 over everything would take too long, a sample of tokens and of experts is compared; every other row must
be finite and, where tokens reach it, not zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import GemmInputs, LayerInputs, RouteInputs

# Operations in float64 for one check: about a second.
BUDGET = {"cuda": 3e13, "cpu": 2e10}
# Elements of experts' gradients in float64: 8 GiB.
MOST_ELEMENTS = 2**30


@dataclass(frozen=True)
class Exact:
    """`values` float64 at `index` of dimension 0; `reached` [dim 0] tells which entries cannot be zero.

    `inner` products are summed for an element, and a row has `independent` errors.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    reached: Tensor
    inner: int
    independent: int


@dataclass(frozen=True)
class Verdict:
    """The errors of one tensor and their limits; `fault` says what no error expresses."""

    error: float
    row_error: float
    limit: float
    row_limit: float
    fault: str = ""

    @property
    def right(self) -> bool:
        return not self.fault and self.error <= self.limit and self.row_error <= self.row_limit

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        whole, row = (
            f"error {self.error:.1e} (at most {self.limit:.1e})",
            f"{self.row_error:.1e} ({self.row_limit:.1e})",
        )
        return f"{whole}, in the worst row {row}"


def tolerance(dtype: torch.dtype, inner: int) -> float:
    return 4 * torch.finfo(dtype).eps / 2 + 8 * math.sqrt(inner) * 2.0**-24


def judge(found: Tensor, exact: Exact, dtype: torch.dtype) -> Verdict:
    limit = tolerance(dtype, exact.inner)
    row_limit = limit * (1 + 5 / math.sqrt(exact.independent))
    if tuple(found.shape) != exact.shape:
        fault = f"shape {tuple(found.shape)} instead of {exact.shape}"
        return Verdict(math.inf, math.inf, limit, row_limit, fault)
    found = found.detach()
    difference = found.index_select(0, exact.index).double() - exact.values
    norms = exact.values.norm(dim=-1)
    typical = norms.square().mean(dim=-1, keepdim=True).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    rows = difference.norm(dim=-1) / torch.maximum(norms, typical).clamp_min(tiny)
    whole = difference.norm() / exact.values.norm().clamp_min(tiny)
    worst = rows.nan_to_num(math.inf).max() if rows.numel() else rows.new_zeros(())
    return Verdict(float(whole.nan_to_num(math.inf)), float(worst), limit, row_limit, _fault_elsewhere(found, exact))


def _fault_elsewhere(found: Tensor, exact: Exact) -> str:
    if exact.index.numel() == exact.shape[0]:
        return ""
    largest = found.flatten(1).abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        return "some rows are not finite"
    zeros = int(((largest == 0) & exact.reached).sum())
    return f"{zeros} rows are zero" if zeros else ""


def layer(inputs: LayerInputs, budget: float) -> dict[str, Exact]:
    """y and, to train, the gradients of x, gate_up, down and weights; for each expert by autograd in float64."""
    (tokens, d), (experts, _, n) = inputs.x.shape, inputs.down.shape
    ids, top_k, device = inputs.expert_ids, inputs.expert_ids.shape[1], inputs.x.device
    counts = torch.bincount(ids.flatten(), minlength=experts)
    each = (18 if inputs.train else 6) * d * n
    sample = _sample(tokens, int(budget / (each * top_k)), device)
    chosen = _sample_experts(counts, budget / each, 3 * d * n) if inputs.train else []
    place = torch.full((tokens,), -1, device=device)
    place[sample] = torch.arange(sample.numel(), device=device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    y, dx, dweights = zeros(sample.numel(), d), zeros(sample.numel(), d), zeros(sample.numel() * top_k)
    dgate_up, ddown = zeros(len(chosen), 2 * n, d), zeros(len(chosen), d, n)
    for expert in range(experts):
        slots = (ids.flatten() == expert).nonzero().squeeze(1)
        at = place[slots // top_k]
        if expert not in chosen:
            slots, at = slots[at >= 0], at[at >= 0]
        if slots.numel() == 0:
            continue
        token, here = slots // top_k, at >= 0
        leaves = [
            t.detach().double().requires_grad_(inputs.train)
            for t in (inputs.x[token], inputs.gate_up[expert], inputs.down[expert], inputs.weights.flatten()[slots])
        ]
        x, gate_up, down, weights = leaves
        gate, up = (x @ gate_up.t()).chunk(2, dim=1)
        rows = (F.silu(gate) * up @ down.t()) * weights[:, None]
        y.index_add_(0, at[here], rows.detach()[here])
        if not inputs.train:
            continue
        g_x, g_gate_up, g_down, g_weights = torch.autograd.grad(rows, leaves, inputs.grad[token].double())
        dx.index_add_(0, at[here], g_x[here])
        dweights[at[here] * top_k + slots[here] % top_k] = g_weights[here]
        if expert in chosen:
            dgate_up[chosen.index(expert)], ddown[chosen.index(expert)] = g_gate_up, g_down
    inner, every = max(d, n), torch.ones(tokens, dtype=torch.bool, device=device)
    exact = {"y": Exact((tokens, d), sample, y, every, inner, d)}
    if inputs.train:
        index, longest = torch.tensor(chosen, device=device), max(inner, int(counts.max()))
        exact["dx"] = Exact((tokens, d), sample, dx, every, inner, d)
        fewest = int(counts[counts > 0].min())
        exact["dgate_up"] = Exact((experts, 2 * n, d), index, dgate_up, counts > 0, longest, min(fewest, d))
        exact["ddown"] = Exact((experts, d, n), index, ddown, counts > 0, longest, min(fewest, n))
        exact["dweights"] = Exact((tokens, top_k), sample, dweights.view(-1, top_k), every, inner, top_k)
    return exact


def gemm(inputs: GemmInputs, budget: float) -> dict[str, Exact]:
    """Rows of the form a [R, K] x b [E, K, N], or whole experts of the form a [M, R] x b [R, N]."""
    a, b, device = inputs.a, inputs.b, inputs.a.device
    ends = inputs.offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    counts = torch.tensor([end - start for start, end in spans], device=device)
    if b.dim() == 2:
        size = a.shape[0] * b.shape[1]
        chosen = _sample_experts(counts, budget / (2 * size), size)
        values = torch.stack([a[:, slice(*spans[e])].double() @ b[slice(*spans[e])].double() for e in chosen])
        index = torch.tensor(chosen, device=device)
        shape = (len(spans), a.shape[0], b.shape[1])
        return {"out": Exact(shape, index, values, counts > 0, int(counts.max()), b.shape[1])}
    sample = _sample(a.shape[0], int(budget / (2 * b.shape[1] * b.shape[2])), device)
    values = torch.empty(sample.numel(), b.shape[2], dtype=torch.float64, device=device)
    for expert, (start, end) in enumerate(spans):
        here = ((sample >= start) & (sample < end)).nonzero().squeeze(1)
        if here.numel():
            values[here] = a[sample[here]].double() @ b[expert].double()
    every = torch.ones(a.shape[0], dtype=torch.bool, device=device)
    return {"out": Exact((a.shape[0], b.shape[2]), sample, values, every, b.shape[1], b.shape[2])}


def judge_route(found: tuple[Tensor, Tensor], inputs: RouteInputs) -> Verdict:
    """weights and ids: K distinct experts, none with a better one left out, and the weights that belong to them."""
    weights, ids = found
    limit = tolerance(torch.float32, inputs.logits.shape[1])
    row_limit = limit * (1 + 5 / math.sqrt(inputs.top_k))
    shape = (inputs.logits.shape[0], inputs.top_k)
    if tuple(weights.shape) != shape or tuple(ids.shape) != shape:
        fault = f"shapes {tuple(weights.shape)} and {tuple(ids.shape)} instead of {shape}"
        return Verdict(math.inf, math.inf, limit, row_limit, fault)
    scores, ids = inputs.logits.double().softmax(dim=1), ids.long()
    ordered = ids.sort(dim=1).values
    if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= scores.shape[1]:
        return Verdict(math.inf, math.inf, limit, row_limit, "some ids name no expert")
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return Verdict(math.inf, math.inf, limit, row_limit, "some tokens name an expert twice")
    selected, best = scores.gather(1, ids), scores.topk(inputs.top_k, dim=1).values.sum(dim=1)
    left_out = 1 - selected.sum(dim=1) / best
    expected = selected / selected.sum(dim=1, keepdim=True)
    rows = ((weights.double() - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(math.inf)
    worst = torch.maximum(rows, left_out)
    return Verdict(float(worst.square().mean().sqrt()), float(worst.max()), limit, row_limit)


def reason(verdicts: Mapping[str, Verdict]) -> str:
    """Why a result is wrong; empty if it is right."""
    return "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.right)


def _sample(size: int, affordable: int, device: torch.device) -> Tensor:
    """Indices below `size`, ascending: all if that is affordable, else as many as are, the first and the last."""
    if affordable >= size:
        return torch.arange(size, device=device)
    index = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(affordable, 16)]
    return torch.cat([index, torch.tensor([0, size - 1])]).unique().to(device)


def _sample_experts(counts: Tensor, affordable_rows: float, elements: int) -> list[int]:
    """The most loaded expert, the least loaded, and others while their rows and elements are affordable."""
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

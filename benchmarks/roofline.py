"""The least cost of an operation: FLOPs, bytes, and seconds at measured ceilings.

With S = T K routed rows, b bytes per element and A activated experts, W = A 3 d n b:

    forward   6 S d n FLOPs; bytes W + 2 T d b + 2 S n b + 2 S d b, for train 2 S n b more
    backward  12 S d n FLOPs; bytes W + E 3 d n b + 4 T d b + 2 S d b + 10 S n b
    gemm      the up-projection alone, [S, d] x [d, 2n] for each expert: 4 S d n FLOPs, operands and result once;
              gemm_dx the product for the rows' gradient, gemm_dw for the weights', which writes all E experts
    route     logits once, ids (8 bytes) and weights (4) once

Uniform routing activates E (1 - (1 - K/E)^T) experts on average; for other routings they are counted. Seconds are
max(FLOPs / matmul rate, bytes / copy rate), for forward and backward separately.
"""

from dataclasses import dataclass

from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large matrix product, and bytes/s of a large copy, read plus written."""

    matmul: float
    copy: float


@dataclass(frozen=True)
class Phase:
    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """Phases, one after the other."""

    phases: tuple[Phase, ...]

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes for phase in self.phases)

    def seconds(self, ceilings: Ceilings) -> float:
        return sum(max(phase.flops / ceilings.matmul, phase.bytes / ceilings.copy) for phase in self.phases)


def activated(shape: Shape, tokens: int) -> float:
    """Average number of experts that uniform routing activates."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def work(op: str, shape: Shape, tokens: int, active: float, itemsize: int) -> Work:
    """Cost of one operation with `active` activated experts."""
    d, n, experts, top_k = shape.sizes
    rows, b = tokens * top_k, itemsize
    weights, flops = active * 3 * d * n * b, rows * d * n
    moved = 2 * tokens * d * b + 2 * rows * n * b + 2 * rows * d * b
    if op in ("forward", "decode"):
        return Work((Phase(6 * flops, weights + moved),))
    if op == "train":
        back = weights + experts * 3 * d * n * b + 4 * tokens * d * b + 2 * rows * d * b + 10 * rows * n * b
        return Work((Phase(6 * flops, weights + moved + 2 * rows * n * b), Phase(12 * flops, back)))
    if op in ("gemm", "gemm_dx", "gemm_dw"):
        touched = experts if op == "gemm_dw" else active
        return Work((Phase(4 * flops, touched * 2 * d * n * b + rows * (d + 2 * n) * b),))
    if op == "route":
        return Work((Phase(0.0, tokens * shape.experts * 4 + rows * 12),))
    raise ValueError(f"op = {op!r}")

"""What `tests.mutants` puts into the code by name, and the random mutants that change nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """`old` stands exactly once in the file."""

    name: str
    file: str
    old: str
    new: str


def ops(page: str, name: str, old: str, new: str) -> Defect:
    return Defect(name, f"moe/ops/{page}.py", old, new)


def router(name: str, old: str, new: str) -> Defect:
    return Defect(name, "moe/router.py", old, new)


def kernel(page: str, name: str, old: str, new: str) -> Defect:
    return Defect(name, f"kernels/moe_triton/{page}.py", old, new)


NAMED = (
    ops(
        "activation",
        "gate and up swapped",
        "silu.out(gate.to(out.dtype), out=out).mul_(up.to(out.dtype))",
        "silu.out(up.to(out.dtype), out=out).mul_(gate.to(out.dtype))",
    ),
    ops(
        "activation",
        "up clamped on one side",
        """    gate, up = gate.to(wide), up.to(wide)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)""",
        """    gate, up = gate.to(wide), up.to(wide)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(max=limit)""",
    ),
    ops(
        "activation",
        "alpha ignored",
        "out.copy_(torch.sigmoid(gate if alpha == 1.0 else alpha * gate)",
        "out.copy_(torch.sigmoid(gate)",
    ),
    ops("activation", "gradient not stopped at the limit", "slope.masked_fill_(~inside[0], 0)", "pass"),
    ops(
        "mlp",
        "last expert skipped",
        "for batch in batches:",
        "for batch in batches[:-1]:",
    ),
    ops(
        "mlp", "zeros returned", "return combine(rows, order.position, weights), pre", "return torch.zeros_like(x), pre"
    ),
    ops("mlp", "gradient of an expert without tokens not written", "per_expert.index_fill_(0, unused, 0)", "pass"),
    ops("mlp", "bias of the wrong expert", "return bias[batch.first]", "return bias[batch.first - 1]"),
    ops("mlp", "down bias forgotten", "rows[here].add_(_rows_of(down_bias, batch))", "pass"),
    ops(
        "mlp",
        "routing weight's gradient without the down bias",
        "dots += (grad_y.to(wide) * _rows_of(down_bias, batch)).sum(dim=1, dtype=weights.dtype)",
        "pass",
    ),
    ops(
        "mlp",
        "one token: weights of the first slots instead of those here",
        "else weights[0, here]",
        "else weights[0, : len(here)]",
    ),
    ops(
        "permutation",
        "order not stable",
        'kind="stable")',
        'kind="stable")[::-1][np.argsort(keys[::-1][np.argsort(keys[::-1], kind="stable")], kind="stable")]',
    ),
    ops(
        "permutation",
        "weight of another token used",
        "else weights[here].to(wide)",
        "else weights.roll(1, 0)[here].to(wide)",
    ),
    ops(
        "permutation",
        "combined in the rows' dtype",
        "    wide = accumulation_dtype(rows, weights)\n    here = position >= 0\n    count",
        "    wide = rows.dtype\n    here = position >= 0\n    count",
    ),
    ops("permutation", "every part of a sum reads the first one's rows", "place[first:last]", "place[: last - first]"),
    ops("grouped_gemm", "rows past the last offset not written", "out[end:].zero_()", "pass"),
    ops(
        "grouped_gemm",
        "matrix of the wrong group",
        "product_into(out[start:stop], a[start:stop], b[g])",
        "product_into(out[start:stop], a[start:stop], b[g - 1])",
    ),
    ops(
        "routing",
        "weights from biased scores",
        "    weights = scores.gather(1, expert_ids)\n    if norm_topk_prob:\n        weights /=",
        "    weights = choice.gather(1, expert_ids)\n    if norm_topk_prob:\n        weights /=",
    ),
    ops("routing", "masked groups with 0", "keys.masked_fill_(excluded, -(2**63))", "keys.masked_fill_(excluded, 0)"),
    ops(
        "routing",
        "ties to the higher index",
        "torch.arange(values.shape[1], 0, -1, device=values.device)",
        "torch.arange(1, values.shape[1] + 1, device=values.device)",
    ),
    ops(
        "routing",
        "NaN first",
        "bits.masked_fill_(values.isnan(), -(2**31))",
        "bits.masked_fill_(values.isnan(), 2**31 - 1)",
    ),
    ops(
        "routing",
        "normalised after scaling",
        """        weights /= weights.sum(dim=-1, keepdim=True).clamp_min_(norm_min) + 1e-20
    if routed_scaling_factor != 1.0:
        weights *= routed_scaling_factor
    return weights, expert_ids, scores""",
        """        weights *= routed_scaling_factor
        weights /= weights.sum(dim=-1, keepdim=True).clamp_min_(norm_min) + 1e-20
    return weights, expert_ids, scores""",
    ),
    ops(
        "routing",
        "normalised without epsilon",
        "weights /= weights.sum(dim=-1, keepdim=True).clamp_min_(norm_min) + 1e-20",
        "weights /= weights.sum(dim=-1, keepdim=True).clamp_min_(norm_min)",
    ),
    ops(
        "routing",
        "a gradient through a sum that was raised",
        "through_total.masked_fill(raised, 0)",
        "through_total",
    ),
    ops(
        "quantization", "scale of a block of zeros is zero", "torch.where(amax == 0, 127,", "torch.where(amax < 0, 127,"
    ),
    ops(
        "quantization",
        "nibbles in the other order",
        "block[rows] = code[..., 0::2] | (code[..., 1::2] << 4)",
        "block[rows] = code[..., 1::2] | (code[..., 0::2] << 4)",
    ),
    ops(
        "quantization",
        "scale of the row's last block used for its short one",
        "divisor = scale[blocks].repeat_interleave(block_size[1], dim=1)[:, : part.shape[1]]",
        "divisor = scale[blocks].roll(1, 1).repeat_interleave(block_size[1], dim=1)[:, : part.shape[1]]",
    ),
    router(
        "logits in the dtype of x",
        "return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))",
        "return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)).to(dtype)",
    ),
    router(
        "correction bias rounded by a cast",
        "self.e_score_correction_bias = bias.to(moved.device)",
        "self.e_score_correction_bias = moved.to(bias.dtype)",
    ),
    router("bias of the router forgotten", ", None if self.bias is None else self.bias.to(dtype))", ")"),
    router(
        "an absent expert takes a share",
        "expert_ids.masked_fill(absent, 0)).masked_fill(absent, 0)",
        "expert_ids.masked_fill(absent, 0))",
    ),
    kernel(
        "grouped_gemm",
        "K mask dropped",
        "a = tl.load(a_at) if EVEN_K else tl.load(a_at, mask=(first + k)[None, :] < inner, other=0)",
        "a = tl.load(a_at)",
    ),
    kernel(
        "grouped_gemm",
        "columns past the last read, and no use made of them",
        "mask=((first + k)[:, None] < inner) & (column[None, :] < width), other=0)",
        "mask=((first + k)[:, None] < inner), other=0)",
    ),
    kernel(
        "grouped_gemm",
        "row mask off by one",
        "tl.store(at, total, mask=(row < end)[:, None] & (column < width)[None, :])",
        "tl.store(at, total, mask=(row <= end)[:, None] & (column < width)[None, :])",
    ),
    kernel(
        "grouped_gemm",
        "group's stride missing",
        "b_at = b + group.to(tl.int64) * stride_bg + column[None, :]",
        "b_at = b + column[None, :]",
    ),
    kernel(
        "grouped_gemm",
        "last pass over the tiles as high as the others",
        "height = tl.minimum(tiles - pass_m, GROUP_M)",
        "height = GROUP_M",
    ),
    kernel(
        "grouped_gemm",
        "offset of a row in 32 bits",
        "at = out + row[:, None].to(tl.int64) * stride_om",
        "at = out + row[:, None] * stride_om",
    ),
    kernel(
        "grouped_gemm",
        "a row of the next group in a weight's gradient",
        "a_at, b_at, tokens_at, k < size - full, in_m",
        "a_at, b_at, tokens_at, k <= size - full, in_m",
    ),
    kernel(
        "grouped_gemm",
        "gradient of an expert without tokens not written",
        "    size = end - start\n",
        "    size = end - start\n    if size == 0:\n        return\n",
    ),
    kernel("grouped_gemm", "rows after a group's full blocks left out", "    if full < size:", "    if full > size:"),
    kernel(
        "grouped_gemm",
        "a group's last full block left out",
        "full = size // BLOCK_K * BLOCK_K",
        "full = tl.maximum(size // BLOCK_K - 1, 0) * BLOCK_K",
    ),
    kernel(
        "grouped_gemm",
        "columns past the last of a full block",
        "mask=inside if FULL else here if EVEN else here & inside",
        "mask=here if FULL else here if EVEN else here & inside",
    ),
    kernel(
        "grouped_gemm",
        "step of an operand that is not gathered in 32 bits",
        "a_at += tl.full((), BLOCK_K, tl.int64) * stride_ar",
        "a_at += BLOCK_K * stride_ar",
    ),
    kernel(
        "mlp",
        "gate and up swapped",
        "tl.store(at, swiglu_tile(gate, up, ACTIVATION,",
        "tl.store(at, swiglu_tile(up, gate, ACTIVATION,",
    ),
    kernel(
        "mlp",
        "few tokens: down bias of the first expert",
        "at = bias + expert.to(tl.int64) * width + column",
        "at = bias + column",
    ),
    kernel(
        "mlp",
        "few tokens: the wrong rank",
        "before + tl.cumsum(match, 0) - 1, -1)",
        "before + tl.cumsum(match, 0), -1)",
    ),
    kernel(
        "mlp",
        "fewer slots than experts: a group for an expert's number",
        "expert = tl.where(by_slot, tl.load(expert_ids + group, mask=by_slot, other=0), group)",
        "expert = tl.cast(group, tl.int64)",
    ),
    kernel(
        "mlp",
        "routing weight's gradient without the last block",
        "for n in range(blocks_n):",
        "for n in range(blocks_n - 1):",
    ),
    kernel(
        "mlp",
        "routing weight's gradient without the down bias",
        "HAS_BIAS=down_bias is not None,\n            BLOCK=block,",
        "HAS_BIAS=False,\n            BLOCK=block,",
    ),
    kernel(
        "mlp",
        "routing weight of the row instead of the slot",
        "weight = tl.load(weights + tl.load(slots + last))",
        "weight = tl.load(weights + last)",
    ),
    kernel(
        "mlp",
        "a part of the backward epilogue in the place of the one before",
        "right, pre, grad_pre, scaled, weight, row, end, start_n + half, width",
        "right, pre, grad_pre, scaled, weight, row, end, start_n, width",
    ),
    kernel(
        "mlp",
        "a part of the routing weight's gradient lost",
        "dot += backward_epilogue(",
        "dot = backward_epilogue(",
    ),
    kernel(
        "mlp",
        "columns past the last in the backward epilogue",
        "mask = (row < end)[:, None] if EVEN_N else (row < end)[:, None] & (column < width)[None, :]",
        "mask = (row < end)[:, None]",
    ),
    kernel(
        "mlp",
        "few tokens: a list that is too short",
        "for length in (16, 128, longest) if num_slots <= length)",
        "for length in (16, 128, longest) if num_slots <= 2 * length)",
    ),
    kernel(
        "activation",
        "up clamped on one side",
        "up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))",
        "up = tl.where(up > limit, limit, up)",
    ),
    kernel(
        "activation",
        "alpha ignored",
        "z = ACTIVATION.alpha * gate\n",
        "z = gate\n",
    ),
    kernel(
        "activation",
        "half precision: the sigmoid of |x|",
        "return tl.where(x < 0, below, above), tl.where(x < 0, above, below)",
        "return above, below",
    ),
    kernel(
        "activation",
        "gradient not stopped at the limit",
        "grad_up = tl.where(tl.abs(up) <= ACTIVATION.limit, grad_up, 0.0)",
        "pass",
    ),
    kernel("routing", "softmax without its maximum", "e = exp(value - top)", "e = exp(value)"),
    kernel(
        "routing",
        "weights from biased scores",
        "s = tl.sum(tl.sum(tl.where(taken, score, 0.0), 1), 0)",
        "s = tl.sum(tl.sum(tl.where(taken, choice, 0.0), 1), 0)",
    ),
    kernel("routing", "ties to the higher index", "(last - index + 1)", "(index + 1)"),
    kernel(
        "routing",
        "masked groups with 0",
        "keys = tl.where(chosen[:, None], keys, never)",
        "keys = tl.where(chosen[:, None], keys, 0)",
    ),
    kernel("permutation", "order not stable", "(i[None, :] < i[:, None])", "(i[None, :] > i[:, None])"),
    kernel(
        "permutation",
        "slots for their tokens",
        "tl.store(tokens + row, slot // top_k, mask=real)",
        "tl.store(tokens + row, slot, mask=real)",
    ),
    kernel("permutation", "one tile too few", "tiles = (size + block_m - 1) // block_m", "tiles = size // block_m"),
    kernel(
        "permutation",
        "weight of an absent slot used",
        "value *= tl.load(weights + slot, mask=here, other=0)",
        "value *= tl.load(weights + slot)",
    ),
    kernel(
        "permutation",
        "last slot of a token not summed",
        "    total = tl.zeros((BLOCK,), dtype=tl.float32)\n    for k in tl.static_range(TOP_K):",
        "    total = tl.zeros((BLOCK,), dtype=tl.float32)\n    for k in tl.static_range(TOP_K - 1):",
    ),
    kernel(
        "permutation",
        "column mask off by one",
        "tl.store(rows + row.to(tl.int64) * width + column, value, mask=column < width)",
        "tl.store(rows + row.to(tl.int64) * width + column, value, mask=column <= width)",
    ),
)

# (file, line, line of the mutant) -> why no test can tell them apart
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "kernels/moe_triton/permutation.py",
        "ids = tl.load(position + token * TOP_K + k, mask=k < TOP_K, other=-1)",
        "ids = tl.load(position + token * TOP_K + k, mask=k < TOP_K, other=-0)",
    ): "only asserted to be allowed, as both are",
    (
        "moe/router.py",
        'scores = logits.sigmoid() if self.selection["scoring_func"] == "sigmoid" else logits.softmax(-1)',
        'scores = logits.sigmoid() if self.selection["scoring_func"] == "sigmoid" else logits.softmax(1)',
    ): "logits have two dimensions",
    (
        "moe/ops/routing.py",
        "return grad, *(None,) * 10",
        "return grad, *(None,) * 11",
    ): "autograd drops a None past the last argument",
    (
        "kernels/moe_triton/mlp.py",
        "block_n = tile.block_n // 2",
        "block_n = tile.block_n * 2",
    ): "a wider tile computes the same, slower",
    (
        "kernels/moe_triton/permutation.py",
        "rows: Tensor, position: Tensor, weights: Tensor | None, *, num_experts: int = 0, by_slot: bool = False",
        "rows: Tensor, position: Tensor, weights: Tensor | None, *, num_experts: int = 1, by_slot: bool = False",
    ): "read by slot only, where it is always given",
    (
        "moe/ops/grouped_gemm.py",
        "if start < stop:",
        "if start <= stop:",
    ): "a product of no rows or columns writes nothing",
    (
        "kernels/moe_triton/routing.py",
        "order = tl.where(real, key(number, expert, num_experts - 1), never)",
        "order = tl.where(real, key(number, expert, num_experts + 1), never)",
    ): "a constant added to every key leaves their order",
    (
        "kernels/moe_triton/routing.py",
        "group_keys = tl.where(group < N_GROUP, key(best, group, N_GROUP - 1), never)",
        "group_keys = tl.where(group < N_GROUP, key(best, group, N_GROUP + 1), never)",
    ): "a constant added to every key leaves their order",
    (
        "kernels/moe_triton/routing.py",
        "part = tl.load(grad_weights + slot, mask=k < TOP_K, other=0.0) * scale",
        "part = tl.load(grad_weights + slot, mask=k < TOP_K, other=1.0) * scale",
    ): "what stands beside the slots is multiplied with a score of 0, and hits no expert",
    (
        "kernels/moe_triton/routing.py",
        "ids = tl.load(expert_ids + slot, mask=k < TOP_K, other=0)",
        "ids = tl.load(expert_ids + slot, mask=k <= TOP_K, other=0)",
    ): "the id of another slot hits nothing: k < TOP_K is asked again",
    (
        "kernels/moe_triton/mlp.py",
        "block_m = 32 if inner % 16 or width % 16 else 16 if num_slots <= 8 * experts else 64",
        "block_m = 32 if inner % 16 or width % 16 else 16 if num_slots <= 9 * experts else 64",
    ): "a matter of speed",
    (
        "kernels/moe_triton/activation.py",
        "up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))",
        "up = tl.where(up > limit, limit, tl.where(up <= -limit, -limit, up))",
    ): "the limit is what it is clamped to",
    (
        "kernels/moe_triton/permutation.py",
        "x = x if x.stride(-1) == 1 else x.contiguous()",
        "x = x if x.stride(-1) == 0 else x.contiguous()",
    ): "a copy too many",
    (
        "kernels/moe_triton/activation.py",
        "x = tl.where(x < -104.0, -104.0, tl.where(x > 104.0, 104.0, x))",
        "x = tl.where(x <= -104.0, -104.0, tl.where(x > 104.0, 104.0, x))",
    ): "the bound is what it is clamped to",
    (
        "kernels/moe_triton/mlp.py",
        "grads = [torch.empty(0, dtype=x.dtype, device=x.device) for _ in arguments]",
        "grads = [torch.empty(1, dtype=x.dtype, device=x.device) for _ in arguments]",
    ): "a gradient that nobody asked for is looked at by nobody",
    (
        "kernels/moe_triton/tiling.py",
        "return size > 0 and size % block == 0",
        "return size >= 0 and size % block == 0",
    ): "a size of 0 has no blocks, with a mask or without",
    (
        "kernels/moe_triton/routing.py",
        "grad = tl.load(grad_scores + token * num_experts + expert, mask=real, other=0.0)",
        "grad = tl.load(grad_scores + token * num_experts + expert, mask=real, other=1.0)",
    ): "what stands beside the experts is multiplied with a score of 0, and not stored",
    (
        "moe/ops/mlp.py",
        "most = _SMALL_PRODUCT // max(gate_up[0].numel(), 1) if len(gate_up) and can_group(gate_up, down) else 0",
        "most = _SMALL_PRODUCT * max(gate_up[0].numel(), 1) if len(gate_up) and can_group(gate_up, down) else 0",
    ): "a matter of speed: which experts share a batch changes no result",
    (
        "moe/ops/matmul.py",
        'if _by_onednn(a, b) or (a.dtype == torch.float16 and a.device.type == "cpu"):',
        'if _by_onednn(a, b) or (a.dtype != torch.float16 and a.device.type == "cpu"):',
    ): "a matter of speed: torch's own half-precision product accumulates in float32, too",
    (
        "kernels/moe_triton/permutation.py",
        "group = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)",
        "group = tl.where((ids >= 0) & (ids <= num_experts), ids, num_experts).to(tl.int32)",
    ): "an id of E is made E",
    (
        "kernels/moe_triton/grouped_gemm.py",
        "if out.stride(1) != 1:",
        "if out.stride(0) != 1:",
    ): "a matter of speed: which tile is used",
    (
        "moe/ops/mlp.py",
        "if batch.last - batch.first == 1:",
        "if batch.last + batch.first == 1:",
    ): "a matter of speed: one expert's bias, repeated, adds up to the same",
    (
        "moe/ops/permutation.py",
        "tokens = max(1, 2**20 // max(position.shape[1] * rows.shape[1], 1))",
        "tokens = max(1, 2**20 // max(position.shape[0] * rows.shape[1], 1))",
    ): "a matter of speed: how many rows are widened at once",
    (
        "kernels/moe_triton/activation.py",
        "x = tl.where(x < -104.0, -104.0, tl.where(x > 104.0, 104.0, x))",
        "x = tl.where(x < -104.0, -104.0, tl.where(x > 105.0, 104.0, x))",
    ): "e^104 and e^105 are both infinite",
    (
        "kernels/moe_triton/permutation.py",
        "grad_weights = torch.empty(position.shape if need_weights else 0, dtype=torch.float32, device=rows.device)",
        "grad_weights = torch.empty(position.shape if need_weights else 1, dtype=torch.float32, device=rows.device)",
    ): "a gradient that nobody asked for is looked at by nobody",
}

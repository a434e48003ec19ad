"""Defects that `tests.mutants` puts into the code, and random mutants that change no result."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """A replacement of `old`, which occurs exactly once in `function`, by `new`."""

    name: str
    file: str
    function: str
    old: str
    new: str


def _in_file(file: str, *defects: tuple[str, str, str, str]) -> Iterator[Defect]:
    return (Defect(name, file, function, old, new) for name, function, old, new in defects)


NAMED = (
    *_in_file(
        "moe/ops/activation.py",
        (
            "gate and up swapped",
            "swiglu_into",
            "gate.to(out.dtype), out=out).mul_(up",
            "up.to(out.dtype), out=out).mul_(gate",
        ),
        ("up clamped on one side only", "swiglu_into", "up.clamp(-limit, limit)", "up.clamp(max=limit)"),
        ("alpha ignored", "swiglu_into", "gate if alpha == 1.0 else alpha * gate", "gate"),
        ("gradient passes the limit", "swiglu_backward_into", "slope.masked_fill_(~inside[0], 0)", "pass"),
    ),
    *_in_file(
        "moe/ops/int8.py",
        ("int8 scale of a row of zeros is zero", "quantize_int8", "amax == 0, 1.0", "amax == 0, 0.0"),
        (
            "int8 truncated instead of rounded",
            "quantize_int8",
            "factor[:, None]).round_()",
            "factor[:, None]).trunc_()",
        ),
        ("int8 scales of another expert", "_mlp", "down_scale[expert]", "down_scale[expert - 1]"),
        ("int8 offsets beyond 32 bits", "_can_pack", "codes.numel() < 2**31", "codes.numel() < 2**32"),
        ("int8 sums scaled twice", "_product", "y.mul_(scale)", "y.mul_(scale).mul_(scale)"),
    ),
    *_in_file(
        "moe/ops/mlp.py",
        ("last expert skipped", "_forward", "in batches:", "in batches[:-1]:"),
        ("zeros returned", "_forward", "combine(rows, order.position, weights)", "torch.zeros_like(x)"),
        ("unused expert's gradient not written", "_backward", "per_expert[run].zero_()", "pass"),
        ("bias of the wrong expert", "_rows_of", "bias[batch.first]", "bias[batch.first - 1]"),
        ("down bias omitted", "_forward", "rows[here].add_(_rows_of(down_bias, batch))", "pass"),
        (
            "routing weight's gradient omits the down bias",
            "_backward",
            "dots += (grad_y.to(wide) * _rows_of(down_bias, batch)).sum(dim=1, dtype=weights.dtype)",
            "pass",
        ),
        (
            "one token: weights of the first slots instead of the local ones",
            "_one_token",
            "weights[0, here]",
            "weights[0, : len(here)]",
        ),
    ),
    *_in_file(
        "moe/ops/matmul.py",
        ("the first columns in every part", "widened_parts", "b[:, columns]", "b[:, : columns.stop - columns.start]"),
    ),
    *_in_file(
        "moe/ops/packed.py",
        ("packed: bias omitted in float32", "packed_linear", "y.add_(bias)", "y"),
    ),
    *_in_file(
        "moe/packed.py",
        ("packed: down of another expert", "forward", "self.packed[count + expert]", "self.packed[count + expert - 1]"),
        (
            "packed: weights train after unpacking",
            "unpacked",
            "=requires_grad)\n        made.bias",
            "=True)\n        made.bias",
        ),
        ("packed: a shared weight is copied", "_targets", "uses[id(weight)] == 1", "True"),
    ),
    *_in_file(
        "moe/linear.py",
        ("bias omitted in float32", "forward", "part.add_(bias[columns])", "part"),
        ("gradient of the weight in other rows", "backward", "linear(rows.t()", "linear(rows.t().roll(1, 0)"),
        ("frozen layers keep their inputs", "forward", "x if needs_weight else None", "x"),
        ("a bias of any size", "_is_plain", "bias.shape == weight.shape[:1]", "True"),
    ),
    *_in_file(
        "moe/attention.py",
        ("a block sees its later keys", "_attend_in_blocks", ".triu(1)", ".triu(2)"),
        ("decoding scores without the mask", "_attend_absorbed", "if mask is not None", "if mask is None"),
    ),
    *_in_file("moe/rope.py", ("rotated backwards", "rotation", "torch.complex(cos, sin)", "torch.complex(cos, -sin)")),
    *_in_file(
        "moe/ops/permutation.py",
        (
            "unstable order",
            "sort_slots",
            '"stable")',
            '"stable")[::-1][np.argsort(keys[::-1][np.argsort(keys[::-1], kind="stable")], kind="stable")]',
        ),
        ("weight of another token", "combine", "weights[here]", "weights.roll(1, 0)[here]"),
        ("combined in the rows' dtype", "combine", "accumulation_dtype(rows, weights)", "rows.dtype"),
        ("every chunk of a sum reads the rows of the first", "combine", "place[first:last]", "place[: last - first]"),
    ),
    *_in_file(
        "moe/ops/grouped_gemm.py",
        ("rows past the last offset not written", "_forward", "out[end:].zero_()", "pass"),
        ("matrix of the wrong group", "_forward", "b[g])\n        out", "b[g - 1])\n        out"),
    ),
    *_in_file(
        "moe/ops/routing.py",
        ("weights from biased scores", "_forward", "scores.gather", "choice.gather"),
        ("masked groups are 0", "_first_by_key", "-(2**63)", "0"),
        ("ties go to the higher index", "_first_by_key", "values.shape[1], 0, -", "1, values.shape[1] + "),
        ("NaN first", "_first_by_key", "-(2**31)", "2**31 - 1"),
        (
            "normalised after scaling",
            "_forward",
            "weights *= routed_scaling_factor",
            "weights *= 1 if norm_topk_prob else routed_scaling_factor",
        ),
        ("normalised without epsilon", "_forward", ".add_(1e-20)", ""),
        ("one token: NaN in the score of a group", "_select_for_one", "np.fmin(members, np.inf)", "members.copy()"),
        ("one token: groups in order of score", "_select_for_one", "groups.sort()", "pass"),
        (
            "one token: experts in an unstable order",
            "_select_for_one",
            'reshape(-1).argsort(kind="stable")',
            "reshape(-1)[::-1].argsort()",
        ),
        ("gradient passes a clamped sum", "_backward", "through_total.masked_fill(raised, 0)", "through_total"),
    ),
    *_in_file(
        "moe/ops/quantization.py",
        ("scale of a block of zeros is zero", "quantize_mxfp4", "amax == 0", "amax < 0"),
        (
            "nibbles in the other order",
            "quantize_mxfp4",
            "code[..., 0::2] | (code[..., 1::2] << 4)",
            "code[..., 1::2] | (code[..., 0::2] << 4)",
        ),
        (
            "scales of a row's blocks rotated",
            "quantize_blocks",
            "scale[blocks].repeat_interleave",
            "scale[blocks].roll(1, 1).repeat_interleave",
        ),
    ),
    *_in_file(
        "moe/speculative.py",
        ("drafts always accepted", "verify", "u * q.gather(1, drafted) < p.gather(1, drafted)", "drafted >= 0"),
        ("rejected drafts replaced by tokens from p", "verify", "(p - q).clamp_min(0)", "p"),
        ("positions that depend on drafts kept", "draft", "max(n - 1 - k, 0)", "n - 1"),
        ("positions begin at 0 in each round", "draft", "arange(start, n - 1,", "arange(0, n - 1 - start,"),
    ),
    *_in_file(
        "moe/router.py",
        (
            "logits in the dtype of x",
            "logits",
            "cast(x, dtype), cast(self.weight, dtype), bias if bias is None else cast(bias, dtype))",
            "x, self.weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)).to(dtype)",
        ),
        ("correction bias rounded by a cast", "_apply", "bias.to(moved.device)", "moved.to(bias.dtype)"),
        ("router bias omitted", "logits", ", bias if bias is None else cast(bias, dtype)", ""),
        ("absent experts have weights", "replay", "0)).masked_fill(absent, 0)", "0))"),
    ),
    *_in_file(
        "moe/planning/placement.py",
        ("packs that hold the item are not avoided", "_pack", "filled if avoided else room", "room"),
        ("only the lightest packs swap", "_best_swap", "/ 2 > best[0]", "/ 2 > 0"),
    ),
    *_in_file(
        "moe/planning/expert_cache.py",
        ("LRU keeps the last expert of a token longest", "_lru_places", "(t + 1) * k - np", "t * k + 1 + np"),
        ("the oracle keeps only what it holds", "_oracle_hits", "np.put_along_axis(cached, now, True, axis=1)", "pass"),
        (
            "the oracle forgets later uses",
            "_oracle_hits",
            "np.put_along_axis(uses, now, following[:, t], axis=1)",
            "pass",
        ),
    ),
    *_in_file(
        "moe/trace.py",
        (
            "correction bias ignored",
            "margins",
            "routing.scores if bias is None else routing.scores + bias",
            "routing.scores",
        ),
        ("noise of one bit less", "_in_noise", "- 1 - BF16_FRACTION_BITS", "- BF16_FRACTION_BITS"),
        ("padding recorded", "record", "else mask.bool()", "else torch.ones_like(ids, dtype=torch.bool)"),
        ("MTP modules do not run", "record", "model.run_mtp(out.hidden, ids, **shared)", "pass"),
        ("MTP modules see all documents", "record", '"position_ids", "document_ids")', '"position_ids")'),
        ("exchange of groups ignored", "margins", "kept < groups", "False"),
        ("any exchange of groups counts", "margins", ".masked_fill(same, torch.inf)", ""),
        ("independent choices", "predicted_pairs", "(k - 1) * experts", "k * (experts - 1)"),
        ("placed and judged on the same tokens", "placed", "report(after.load", "report(before.load"),
    ),
    *_in_file(
        "moe/integrations/trl.py",
        ("routing recorded, not replayed", "_routed", "output = replayed if self._replay else output", "pass"),
        (
            "router without gradient",
            "__torch_function__",
            "(scores.gather(1, self.ids)",
            "(scores.detach().gather(1, self.ids)",
        ),
        ("groups not chosen with their experts", "__torch_function__", "call == self._over_groups", "False"),
        ("places without padding", "add", "first + rows + columns", "first + rows + columns.sort(1).values"),
        ("records never removed", "_record_tokens", "if self._used:", "if False:"),
        ("evaluation replayed", "_before", "not backbone.training or ", ""),
        ("padding counted", "_routed", "real.flatten().long())", "torch.ones_like(ids).flatten())"),
    ),
    *_in_file(
        "kernels/moe_triton/grouped_gemm.py",
        (
            "mask of K omitted",
            "multiply",
            " if EVEN_K else tl.load(a_at, mask=(first + k)[None, :] < inner, other=0)",
            "",
        ),
        ("columns past the last are read, but not used", "multiply", " & (column[None, :] < width)", ""),
        ("row mask off by one", "rows_kernel", "row < end", "row <= end"),
        ("stride of the group omitted", "rows_kernel", "group.to(tl.int64) * stride_bg + ", ""),
        ("last pass over tiles is as high as the others", "locate", "tl.minimum(tiles - pass_m, GROUP_M)", "GROUP_M"),
        ("offset of a row in 32 bits", "rows_kernel", "row[:, None].to(tl.int64)", "row[:, None]"),
        (
            "weight's gradient includes a row of the next group",
            "products_kernel",
            "k < size - full",
            "k <= size - full",
        ),
        (
            "unused expert's gradient not written",
            "products_kernel",
            "- start\n",
            "- start\n    if size == 0:\n        return\n",
        ),
        ("rows after a group's full blocks skipped", "products_kernel", "full < size", "full > size"),
        (
            "a group's last full block skipped",
            "products_kernel",
            "size // BLOCK_K",
            "tl.maximum(size // BLOCK_K - 1, 0)",
        ),
        ("columns past the last in a full block", "operand", "inside if", "here if"),
        (
            "step of a contiguous operand in 32 bits",
            "products_kernel",
            "tl.full((), BLOCK_K, tl.int64) * stride_ar",
            "BLOCK_K * stride_ar",
        ),
    ),
    *_in_file(
        "kernels/moe_triton/mlp.py",
        ("gate and up swapped", "up_epilogue", "swiglu_tile(gate, up", "swiglu_tile(up, gate"),
        (
            "few tokens: down bias of the first expert",
            "small_down_kernel",
            "bias + expert.to(tl.int64) * width + column",
            "bias + column",
        ),
        (
            "few tokens: rank off by one",
            "pick_slots",
            "before + tl.cumsum(match, 0) - 1",
            "before + tl.cumsum(match, 0)",
        ),
        (
            "fewer slots than experts: group used as expert",
            "group_of_slots",
            "tl.where(by_slot, tl.load(expert_ids + group, mask=by_slot, other=0), group)",
            "tl.cast(group, tl.int64)",
        ),
        ("routing weight's gradient omits the last block", "sum_dots_kernel", "range(blocks_n)", "range(blocks_n - 1)"),
        ("routing weight's gradient omits the down bias", "_sum_dots", "down_bias is not None", "False"),
        ("routing weight of the row instead of the slot", "hidden_backward_kernel", "tl.load(slots + last)", "last"),
        ("half of the backward epilogue stored in the wrong place", "backward_epilogue", "start_n + half", "start_n"),
        (
            "half of the routing weight's gradient lost",
            "backward_epilogue",
            "+= backward_epilogue",
            "= backward_epilogue",
        ),
        (
            "columns past the last in the backward epilogue",
            "backward_epilogue",
            " if EVEN_N else (row < end)[:, None] & (column < width)[None, :]",
            "",
        ),
        ("few tokens: list too short", "_small", "num_slots <= length", "num_slots <= 2 * length"),
    ),
    *_in_file(
        "kernels/moe_triton/activation.py",
        ("up clamped on one side only", "clamp", "tl.where(up < -limit, -limit, up)", "up"),
        ("alpha ignored", "swiglu_tile", "ACTIVATION.alpha * gate", "gate"),
        (
            "half precision: the sigmoid of |x|",
            "quick_sigmoid",
            "tl.where(x < 0, below, above), tl.where(x < 0, above, below)",
            "above, below",
        ),
        (
            "gradient passes the limit",
            "swiglu_backward_tile",
            "grad_up = tl.where(tl.abs(up) <= ACTIVATION.limit, grad_up, 0.0)",
            "pass",
        ),
    ),
    *_in_file(
        "kernels/moe_triton/routing.py",
        ("softmax without subtracting the maximum", "route_kernel", "value - top", "value"),
        ("weights from biased scores", "route_kernel", "tl.where(taken, score, 0.0)", "tl.where(taken, choice, 0.0)"),
        ("ties go to the higher index", "key", "last - index", "index"),
        (
            "masked groups are 0",
            "route_kernel",
            "tl.where(chosen[:, None], keys, never)",
            "tl.where(chosen[:, None], keys, 0)",
        ),
    ),
    *_in_file(
        "kernels/moe_triton/permutation.py",
        ("unstable order", "place_kernel", "i[None, :] < i[:, None]", "i[None, :] > i[:, None]"),
        ("slots instead of tokens", "place_kernel", "slot // top_k", "slot"),
        ("one tile too few", "layout_kernel", "(size + block_m - 1) // block_m", "size // block_m"),
        (
            "weight of an absent slot",
            "combine_kernel",
            "tl.load(weights + slot, mask=here, other=0)",
            "tl.load(weights + slot)",
        ),
        ("last slot of a token omitted", "combine_kernel", "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)"),
        ("column mask off by one", "permute_kernel", "column < width", "column <= width"),
    ),
    *_in_file(
        "moe/checkpoint/format/families.py",
        ("windows begin a layer later", "_late_windows_read", "i >= first", "i > first"),
    ),
    *_in_file(
        "moe/config.py",
        ("a dense model has experts", "has_experts", "> 0", ">= 0"),
    ),
    *_in_file(
        "moe/counts.py",
        ("a token uses all experts", "activated", "config.num_experts_per_tok", "config.n_routed_experts"),
    ),
    *_in_file(
        "moe/recipes/grpo.py",
        (
            "equal rewards have an advantage",
            "advantages",
            ".masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0)",
            "",
        ),
        (
            "the deviation divides by G",
            "advantages",
            "rewards.std(1, keepdim=True)",
            "rewards.std(1, False, keepdim=True)",
        ),
        ("only positive advantages are clipped", "clipped_loss", "w.clamp(1 - low, 1 + high)", "w.clamp(max=1 + high)"),
        (
            "padding is in the mean of a sequence",
            "clipped_loss",
            "mask.sum(1, keepdim=True).clamp_min(1)",
            "mask.shape[1]",
        ),
        ("k3 without the ratio", "weighted_k3", "(logprobs - old).exp() * ", ""),
        ("a micro-batch's mean is not weighted", "_count", "part.mask.sum()", "part.mask.sum().clamp(1, 1)"),
    ),
    *_in_file(
        "moe/recipes/rollout.py",
        ("the end-of-text token is read", "rollout", "(completion & ~over)[:, :-1]", "completion[:, :-1]"),
        ("sequences take the cache of others", "rollout", "cache.select(kept)", "cache.select(kept.flip(0))"),
        ("the temperature is left out", "log_probabilities", "wide / temperature", "wide"),
        (
            "a completion is cut at the prompt's end",
            "select",
            "end = self.prompt_length + longest",
            "end = start + longest",
        ),
    ),
    *_in_file(
        "moe/replay.py",
        ("the router chooses again", "_replace", "if replays else None", "if not replays else None"),
        ("padding is compared", "_measure", "real = ids >= 0", "real = ids >= -1"),
    ),
    *_in_file(
        "moe/recipes/task.py",
        ("weights of the reward are ignored", "score", "self.weights[name] * value", "value"),
    ),
    *_in_file(
        "moe/recipes/distill.py",
        (
            "the divergence of the teacher from the student",
            "kl_divergence",
            "log_probabilities(teacher), log_probabilities(student)",
            "log_probabilities(student), log_probabilities(teacher)",
        ),
        ("the gradient shrinks with the temperature", "kl_divergence", " * temperature**2", ""),
        ("the cross entropy keeps its whole weight", "_loss", "(kl - ce)", "kl"),
    ),
    *_in_file(
        "moe/recipes/examples.py",
        (
            "the end of a completion is not trained on",
            "encode_completion",
            "* len(after))",
            "* (len(after) - 1) + [False])",
        ),
        ("a token spans prompt and completion", "_encode_parts", "whole[: len(ids)] != ids", "False"),
        ("messages of the prompt are trained on", "encode_messages", " or number < first", ""),
    ),
    *_in_file(
        "moe/recipes/packing.py",
        ("a row is overfull", "pack", "room - lengths[example]", "room - 1"),
    ),
    *_in_file(
        "moe/recipes/sft.py",
        ("packed examples see each other", "batch_of", "= document, torch", "= 0, torch"),
        ("positions continue in the next example", "batch_of", "torch.arange(b - a)", "torch.arange(at - (b - a), at)"),
        ("padding reaches experts", "batch_of", "documents != PADDING", "documents == documents"),
    ),
    *_in_file(
        "moe/recipes/countdown.py",
        ("a number may be used any number of times", "_value", "unused.remove(number)", "pass"),
        ("a repeated number may be used once", "_value", "for number in numbers]", "for number in {*numbers}]"),
        ("operators apply from the right", "apply_from", ">= precedence", "> precedence"),
        ("an unclosed parenthesis is accepted", "_value", "None if waiting else", "None if not values else"),
        ("operands of an operator are swapped", "apply_from", "right, left =", "left, right ="),
        (
            "results are rounded to integers",
            "score",
            "_value(parts[2], problem.numbers) ==",
            "int(_value(parts[2], problem.numbers) or 0) ==",
        ),
        ("the length of an answer is not limited", "_value", "> MAX_ANSWER", "> MAX_ANSWER + 1"),
        ("text between the elements is well-formed", "score", "outside[::4]", "outside[::8]"),
        ("the first of two answers is scored", "score", "parts[1::2] ==", "parts[-4::2] =="),
        ("numbers in another order are another problem", "generate", "tuple(sorted(drawn))", "drawn"),
    ),
)

# Random mutants that no test can kill, named by the reason. Every occurrence of `old` in the function counts.
EQUIVALENT = (
    *_in_file(
        "kernels/moe_triton/permutation.py",
        ("the value is only asserted to be valid, and both are", "combine_kernel", "other=-1", "other=-0"),
        ("used only with by_slot, for which it is given", "combine", "0, by_slot", "1, by_slot"),
        ("an unnecessary copy", "permute", "x.stride(-1) == 1", "x.stride(-1) == 0"),
        ("an id of E maps to E", "group_of", "(ids >= 0) & (ids < num_experts)", "(ids >= 0) & (ids <= num_experts)"),
        (
            "a gradient that is not requested is not used",
            "unpermute_backward",
            "position.shape if need_weights else 0",
            "position.shape if need_weights else 1",
        ),
    ),
    *_in_file(
        "moe/router.py",
        ("logits have two dimensions", "replay", "logits.softmax(-1)", "logits.softmax(1)"),
    ),
    *_in_file(
        "moe/ops/routing.py",
        ("autograd ignores None past the last argument", "_gradient", "(None,) * 10", "(None,) * 11"),
    ),
    *_in_file(
        "kernels/moe_triton/mlp.py",
        ("a wider tile computes the same, slower", "_up", "tile.block_n // 2", "tile.block_n * 2"),
        ("a wider tile computes the same, slower", "_small", "tile.block_n // 2", "tile.block_n * 2"),
        ("affects speed only", "_small", "8 * experts", "9 * experts"),
        ("a gradient that is not requested is not used", "moe_mlp_backward", "0, dtype", "1, dtype"),
    ),
    *_in_file(
        "moe/ops/grouped_gemm.py",
        ("a product without rows writes nothing", "_forward", "< stop:", "<= stop:"),
    ),
    *_in_file(
        "kernels/moe_triton/routing.py",
        (
            "a constant added to every key preserves their order",
            "route_kernel",
            "key(number, expert, num_experts - 1)",
            "key(number, expert, num_experts + 1)",
        ),
        ("a constant added to every key preserves their order", "route_kernel", "N_GROUP - 1", "N_GROUP + 1"),
        (
            "values past the slots are multiplied by a score of 0 and match no expert",
            "route_backward_kernel",
            "0.0) * scale",
            "1.0) * scale",
        ),
        ("k < TOP_K is checked again", "route_backward_kernel", "< TOP_K, other=0)", "<= TOP_K, other=0)"),
        (
            "values past the experts are multiplied by a score of 0 and not stored",
            "route_backward_kernel",
            "0.0)\n    if",
            "1.0)\n    if",
        ),
    ),
    *_in_file(
        "kernels/moe_triton/activation.py",
        ("the limit is clamped to itself", "clamp", "up < -limit", "up <= -limit"),
        ("the bound is clamped to itself", "exp", "x < -104.0", "x <= -104.0"),
        ("e^104 and e^105 are both infinite", "exp", "x > 104.0", "x > 105.0"),
    ),
    *_in_file(
        "kernels/moe_triton/tiling.py",
        ("a size of 0 has no blocks", "even", "size > 0", "size >= 0"),
    ),
    *_in_file(
        "moe/ops/mlp.py",
        (
            "affects speed only: which experts share a batch",
            "_batches",
            "_SMALL_PRODUCT // max(gate_up[0].numel(), 1)",
            "_SMALL_PRODUCT * max(gate_up[0].numel(), 1)",
        ),
        (
            "affects speed only: a repeated bias adds up to the same",
            "_rows_of",
            "batch.last - batch.first",
            "batch.last + batch.first",
        ),
    ),
    *_in_file(
        "moe/ops/matmul.py",
        (
            "affects speed only: torch's half-precision product accumulates in float32, too",
            "_mm_into",
            "a.dtype == torch.float16",
            "a.dtype != torch.float16",
        ),
    ),
    *_in_file(
        "kernels/moe_triton/grouped_gemm.py",
        ("affects speed only: the choice of tile", "rows", "out.stride(1)", "out.stride(0)"),
    ),
    *_in_file(
        "moe/ops/permutation.py",
        (
            "affects speed only: how many rows are widened at once",
            "combine",
            "position.shape[1] * rows.shape[1]",
            "position.shape[0] * rows.shape[1]",
        ),
    ),
)

"""Multi-head latent attention (MLA) and grouped-query attention.

A mask is boolean [B or 1, 1, S, S_total], True where a query may attend. None means causal attention if S = S_total,
and unmasked attention for a single query.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe.cache import LayerCache
from moe.config import ModelConfig
from moe.linear import Linear
from moe.norm import RMSNorm
from moe.ops.library import cast, has_values
from moe.ops.matmul import prefers_float32
from moe.rope import apply_rope, mscale
from moe.uncast import Uncast

# DeepSeek's and Hugging Face's code both use this constant for the norms of latents, independent of rms_norm_eps.
LATENT_NORM_EPS = 1e-6

# Queries per block of attention on the CPU, in float32 or wider and in half precision.
WIDE_BLOCK, HALF_BLOCK = 64, 128


def softmax_scale(config: ModelConfig) -> float:
    """Return qk_head_dim^-0.5; for MLA with YaRN and mscale_all_dim, times (0.1 mscale_all_dim ln(factor) + 1)^2."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_parameters
    if config.is_mla and rope.rope_type == "yarn" and rope.mscale_all_dim and rope.factor:
        scale *= mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T scale + mask) v.

    q [B, S, H, d], k [B, S_total, H, d] and v [B, S_total, H, dv] give [B, S, H dv]. sinks [H] add one logit per head
    to each query's softmax, without a value.
    """
    width = v.shape[-1]
    on_cpu = q.device.type == "cpu"
    if sinks is not None:
        return _attend_in_blocks(q, k, v, mask, scale, sinks)
    # A compiled graph serves all lengths, and training on long sequences must not keep S^2 probabilities.
    in_blocks = on_cpu and mask is None and not torch.compiler.is_compiling()
    if in_blocks and q.shape[1] > 1 and (q.shape[1] <= 1024 or not torch.is_grad_enabled()):
        return _attend_in_blocks(q, k, v, None, scale, None)
    if on_cpu and width < q.shape[-1]:
        # The CPU's flash kernel refuses unequal head sizes; the unfused fallback is an order of magnitude slower.
        v = F.pad(v, (0, q.shape[-1] - width))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    causal = mask is None
    if q.shape[2] == 1:  # not `and`: with symbolic shapes is_causal would be a SymBool, which SDPA rejects
        causal = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out[..., :width].transpose(1, 2).flatten(2)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """Compute `attend` one block of queries at a time; without a mask, each block reads only the keys it may attend to.

    On CPU this takes 0.5 (bf16) to 0.9 (fp32) of the flash kernel's time, forward and backward, at 512 to 1,024 tokens.
    A compiled graph serves all lengths, so it has one block.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if prefers_float32(q):
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if q.dtype == wide:
        q, scale = q * scale, 1.0
    queries, past = q.shape[1], k.shape[1] - q.shape[1]
    one_block = torch.compiler.is_compiling()
    block = queries if one_block else WIDE_BLOCK if q.dtype == wide else HALF_BLOCK
    later = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1) if mask is None else None
    q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
    out = []
    for start in (0,) if one_block else range(0, queries, block):
        end = queries if one_block else min(start + block, queries)
        keys = past + end if mask is None else k.shape[-1]
        scores = torch.matmul(q[:, :, start:end], k[..., :keys])
        if scores.dtype != wide:
            scores = scores.to(wide) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start:end], float("-inf"))
        elif later is not None:  # keys from before the block are visible to all of its queries
            scores[..., past + start :].masked_fill_(later[: end - start, : end - start], float("-inf"))
        if sinks is not None:
            sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), dim=-1)
        attn = scores.softmax(dim=-1)[..., :keys].to(v.dtype)
        out.append(torch.matmul(attn, v[:, :, :keys]).transpose(1, 2))
    return (torch.cat(out, dim=1) if out else v[:, :, :0].transpose(1, 2)).flatten(2).to(dtype)


class MLA(nn.Module):
    """Multi-head latent attention. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

    q = q_b(RMS(q_a x)) or q_proj x, per head [nope | rope]. kv_a x = [latent C | k_pe]: the latent is normalised, k_pe
    is not, and all heads share one k_pe. kv_b expands the latent per head to [K nope | V].

    Prefill and training expand the latent. Decode absorbs kv_b into the query and the output instead, and reads
    C + rope values per token from the cache.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None and config.qk_nope_head_dim is not None  # validated
        assert config.qk_rope_head_dim is not None and config.v_head_dim is not None
        self.heads = config.num_attention_heads
        self.latent, self.nope, self.rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value = config.v_head_dim
        self.interleave = bool(config.rope_interleave)
        self.scale = softmax_scale(config)

        width, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, self.heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        self.compresses_q = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, width, bias=config.output_bias)

    def forward(self, x: Tensor, rope: Uncast, mask: Tensor | None, cache: LayerCache | None, past: int) -> Tensor:
        """Attend: x [B, S, D] -> [B, S, D]. `rope` holds the `rope_tables`; `cache` already holds `past` tokens."""
        # Small operators take half the time of a decoded token: `reshape` and `split_with_sizes` are the cheapest.
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_q else self.q_proj(x)
        q = q.reshape(*x.shape[:2], self.heads, self.nope + self.rope)
        q_nope, q_pe = q.split_with_sizes((self.nope, self.rope), dim=-1)
        c, k_pe = self.kv_a_proj_with_mqa(x).split_with_sizes((self.latent, self.rope), dim=-1)
        c = self.kv_a_layernorm(c)
        pe = torch.cat((q_pe, k_pe.unsqueeze(2)), dim=2)
        pe = apply_rope(pe, *rope.tensors, interleave=self.interleave)
        q_pe, k_pe = pe.split_with_sizes((self.heads, 1), dim=2)

        if cache is not None:
            (entry,) = cache.append(past, torch.cat((c, k_pe.squeeze(2)), dim=-1))
            if past > 0 and self._absorbing_is_cheaper(x.shape[1]):
                # Backward frees the graph, and an adapter's dropout differs between calls: recompute in either case.
                recompute = self.training or torch.is_grad_enabled()
                w = self._absorbed(c) if recompute else cache.memoize(q_pe.dtype, lambda: self._absorbed(c))
                if w is not None:
                    return self.o_proj(self._attend_absorbed(q_nope, q_pe, entry, mask, *w))
            c, k_pe = entry.unsqueeze(2).split((self.latent, self.rope), dim=-1)
            c = c.squeeze(2)

        kv = rearrange(self.kv_b_proj(c), "b s (h d) -> b s h d", h=self.heads)
        k_nope, v = kv.split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe.expand(-1, -1, self.heads, -1)), dim=-1)
        return self.o_proj(attend(q, k, v, mask, self.scale))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, latent={self.latent}, nope={self.nope}, rope={self.rope}, value={self.value}"

    def interleave_rope(self) -> None:
        """Set `rope_interleave`; see `Transformer.interleave_rope`."""
        self.interleave = True

    def _absorbing_is_cheaper(self, queries: int) -> bool:
        # Per cached token and head: expanding costs C (nope + value) once and nope + rope + value per query;
        # absorbed attention costs 2 C + rope per query.
        expanded = self.latent * (self.nope + self.value)
        return queries * (2 * self.latent - self.nope - self.value) < expanded

    def _absorbed(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return kv_b's W_UK [H, nope, C], W_UV [H, C, value] and constant [H, value] in c's dtype; None if nonlinear.

        Calls kv_b with the identity and with zero, which is exact for a linear module and includes its wrappers:
        adapters, offloading, quantisation. The constant of the keys shifts all logits of a query equally, so it is
        dropped. c [B, S, C] serves to check that kv_b is linear.
        """
        w = self.kv_b_proj(torch.eye(self.latent + 1, self.latent, dtype=c.dtype, device=c.device))
        w, constant = w[:-1] - w[-1], w[-1]
        if has_values(c) and not torch.compiler.is_compiling():
            c, exact = c.to(w.dtype), self.kv_b_proj(c)
            exact_products = w.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
            eps = torch.finfo(w.dtype if exact_products else torch.bfloat16).eps
            bound = 16 * eps * (c.abs() @ w.abs() + constant.abs())
            if ((c @ w + constant - exact).abs() > bound).any():
                return None
        w_uk, w_uv = rearrange(w, "c (h d) -> h c d", h=self.heads).split((self.nope, self.value), dim=2)
        constant = rearrange(constant, "(h d) -> h d", h=self.heads)[:, self.nope :]
        return w_uk.mT.contiguous(), w_uv.contiguous(), constant.contiguous()

    def _attend_absorbed(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        entry: Tensor,
        mask: Tensor | None,
        w_uk: Tensor,
        w_uv: Tensor,
        constant: Tensor,
    ) -> Tensor:
        """Compute `attend` from cache entries [B, S_total, C + rope]: score = (q_nope W_UK) c + q_pe k_pe."""
        batch, queries = q_nope.shape[:2]
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1)
        q = torch.cat((q_latent, q_pe.flatten(0, 1)), dim=-1).view(batch, queries * self.heads, entry.shape[-1])
        # The entries come first, because CPUs multiply many rows by few columns faster than the reverse.
        scores = torch.bmm(entry, q.mT).mT
        scores = cast(scores, torch.promote_types(scores.dtype, torch.float32)) * self.scale
        if mask is not None:
            scores = scores.reshape(batch, queries, self.heads, -1).masked_fill(~mask.transpose(1, 2), float("-inf"))
            scores = scores.flatten(1, 2)
        attn = cast(scores.softmax(dim=-1), q.dtype)
        o = torch.bmm(attn, entry.narrow(-1, 0, self.latent)).view(batch * queries, self.heads, self.latent)
        o = torch.bmm(o.transpose(0, 1), w_uv).transpose(0, 1)
        return (o + constant).reshape(batch, queries, -1)


class GQA(nn.Module):
    """Grouped-query attention.

    `qk_norm` adds RMS norms on each query and key head (Qwen3) or across all heads of a token (OLMoE).
    `attention_sinks` adds a learned logit per head to the softmax, without a value (gpt-oss). The first `rope_dim`
    dimensions of a head rotate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads or self.heads
        self.head_dim = config.qk_head_dim
        self.interleave = bool(config.rope_interleave)
        self.scale = softmax_scale(config)
        self.qk_norm = config.qk_norm
        self.rope_dim = config.rope_dim

        width, dim, bias = config.hidden_size, self.head_dim, config.attention_bias
        self.q_proj = Linear(width, self.heads * dim, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * dim, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * dim, bias=bias)
        self.o_proj = Linear(self.heads * dim, width, bias=config.output_bias)
        if self.qk_norm != "none":
            whole = self.qk_norm == "whole"
            self.q_norm = RMSNorm(dim * (self.heads if whole else 1), eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(dim * (self.kv_heads if whole else 1), eps=config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.empty(self.heads)) if config.attention_sinks else None

    def forward(self, x: Tensor, rope: Uncast, mask: Tensor | None, cache: LayerCache | None, past: int) -> Tensor:
        """Attend: x [B, S, D] -> [B, S, D]. `rope` holds the `rope_tables`; `cache` already holds `past` tokens."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*x.shape[:2], self.heads, self.head_dim)
        k = k.reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        v = v.reshape(*x.shape[:2], self.kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._rotate(q, rope), self._rotate(k, rope)
        if cache is not None:
            k, v = cache.append(past, k, v)
        group = self.heads // self.kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        return self.o_proj(attend(q, k, v, mask, self.scale, self.sinks))

    def extra_repr(self) -> str:
        text = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, rope_dim={self.rope_dim}"
        return f"{text}, qk_norm={self.qk_norm}, sinks={self.sinks is not None}"

    def _rotate(self, x: Tensor, rope: Uncast) -> Tensor:
        rotated = apply_rope(x[..., : self.rope_dim], *rope.tensors, interleave=self.interleave)
        if self.rope_dim == x.shape[-1]:
            return rotated
        return torch.cat((rotated, x[..., self.rope_dim :]), dim=-1)

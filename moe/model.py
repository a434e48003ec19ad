"""The transformer. Read this file first: it contains the whole architecture.

    h = embed(ids);  for each block: h += attention(norm(h)); h += mlp(norm(h));  logits = head(norm(h))

The config decides whether `mlp` is a dense MLP or a `MoELayer`. Multi-token prediction modules (DeepSeek-V3,
arXiv 2412.19437, section 2.2) follow the last block. They run in training, and draft tokens for `moe.generate`.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.attention import GQA, MLA
from moe.balance import LoadReport, inject_gradients, loss_counts, routers
from moe.cache import Cache, LayerCache
from moe.config import ModelConfig, OpenConfig
from moe.errors import ConfigError
from moe.global_batch import GlobalBatch
from moe.init import materialize, skip_init
from moe.layer import MLP, MoELayer, MoEStats
from moe.linear import Linear, linear
from moe.loss import IGNORED, Term, count_key, next_token_loss, targets, valid_positions
from moe.norm import RMSNorm
from moe.ops.library import check_device, index_error
from moe.output import Output
from moe.packed import Packed, pack, unpack
from moe.quantized import Quantized
from moe.rope import rope_tables, rotation
from moe.uncast import Uncast

ID_DTYPES = (torch.int64, torch.int32)


class Embedding(nn.Embedding):
    """Token embedding, ids [...] -> [..., D], and tied head, vectors [..., D] -> logits [..., V].

    One module serves both, because offloading, sharding and hooks handle parameters when their module is called. A
    hook on its output sees both.
    """

    def forward(self, input: Tensor) -> Tensor:
        check_device("Embedding", self.weight, input)
        return linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, has_experts: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = MLA(config) if config.is_mla else GQA(config)
        self.post_attention_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.has_experts = has_experts  # not isinstance(mlp, ...), because other libraries wrap modules
        self.mlp: MLP | MoELayer
        if has_experts:
            self.mlp = MoELayer.from_config(config)
        else:
            self.mlp = MLP(width, config.intermediate_size)

    def forward(
        self,
        h: Tensor,
        rope: Uncast,
        mask: Tensor | None,
        token_mask: Tensor | None,
        cache: LayerCache | None,
        past: int,
    ) -> tuple[Tensor, MoEStats | None]:
        h = h + self.self_attn(self.input_layernorm(h), rope, mask, cache, past)
        x = self.post_attention_layernorm(h)
        if self.has_experts:
            y, stats = self.mlp(x, token_mask, return_stats=True)
            return h + y, stats
        return h + self.mlp(x), None


class MTP(nn.Module):
    """Multi-token prediction module: h' = norm(block(eh_proj(cat[enorm(emb), hnorm(h)]))).

    Module k (from 0) takes the output h_i of the previous module (for k = 0, of the model's final norm) and the
    embedding of token i + k + 1. It predicts token i + k + 2 through the model's head. The concatenation has the order
    of the released checkpoint, embedding first; the paper prints the reverse.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.enorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * width, width, bias=False)
        self.block = Block(config, has_experts=True)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        rope: Uncast,
        mask: Tensor | None,
        token_mask: Tensor | None,
        cache: LayerCache | None = None,
        past: int = 0,
    ) -> tuple[Tensor, MoEStats | None]:
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), dim=-1))
        x, stats = self.block(x, rope, mask, token_mask, cache, past)
        return self.norm(x), stats


class Transformer(nn.Module):
    """Mixture-of-Experts language model. Can be built on the meta device, under `with torch.device("meta")`.

    Args:
        config: the configuration; see `ModelConfig`.
        seed: random seed of the initialisation; the global generator is not used.

    Attributes:
        config: an `OpenConfig` equal to the given config.
        carried_files: file name -> content of other files of a loaded checkpoint, such as the tokenizer; `save` writes
            them beside the weights.
        origin: layout of the loaded checkpoint, so that `save` writes the same tensors; None for a new model.
    """

    # For transformers' Trainer: the loss takes num_items_in_batch, and labels are shifted by the model.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            preset = repr(config) if isinstance(config, str) else "'tiny'"
            raise ConfigError("config", config, f"a ModelConfig, such as moe.preset({preset}); moe.load reads a folder")
        self.config: ModelConfig = OpenConfig.of(config)
        self.carried_files: dict[str, bytes] = {}
        self.origin: Any = None
        self.activation_checkpointing = False
        self._load: Tensor | None = None
        self._idle = config.idle_parameters()
        with skip_init():
            # Not nn.Embedding(V, D), whose normal_ on the meta device imports torch's compiler, which takes seconds.
            embedding = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = Embedding.from_pretrained(embedding, freeze=False)
            self.layers = nn.ModuleList(
                Block(config, has_experts=config.is_moe_layer(i)) for i in range(config.num_hidden_layers)
            )
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        materialize(self, std=config.initializer_range, seed=seed)
        self.join(GlobalBatch())

    def join(self, batch: GlobalBatch) -> None:
        """Set the global batch of the model and its routers."""
        self.global_batch = batch
        for _, router in routers(self):
            router.join(batch)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Output:
        """Compute logits and, if labels are given, the loss.

        Args:
            input_ids: int64 or int32 [B, S], in [0, V).
            labels: int64 or int32 [B, S], unshifted (usually input_ids), in [0, V); -100 is ignored.
            attention_mask: [B, S_total], non-zero for real tokens, with padding on either side; S_total includes the
                tokens in `cache`.
            position_ids: integers [B, S], possibly negative; the default continues from the length of the cache.
            document_ids: integers [B, S]. Tokens attend to, and are predicted from, their own document only. MTP
                modules skip positions whose following tokens are in another document or are padding.
            cache: earlier tokens; it is filled and advanced.
            logits_to_keep: compute logits only for this many last positions; 0 for all.
            num_items_in_batch: number of predicted tokens in the optimizer step, of which this call is a micro-batch.
                The loss and its parts are multiplied by this call's fraction of these tokens, so that their sums over
                micro-batches are means over tokens ("mtp", "balance", "z": token-weighted means of their means).

        Raises:
            TypeError: ids or labels that are not integers.
            ValueError: invalid or incompatible shapes, dtypes or arguments.
            IndexError: an id or a predicted label out of range (on CPU; a device assertion on CUDA).
        """
        self._check(input_ids, labels, attention_mask, position_ids, document_ids, cache, logits_to_keep)
        length = input_ids.shape[1]
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = _positions(input_ids, past)
        real = attention_mask.bool() if attention_mask is not None else None
        masks = self._masks(length, past, real, document_ids, input_ids.device)
        token_mask = real[:, past:] if real is not None else None

        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for reason in self._idle:
                warnings.warn(f"parameters that do not learn: {reason}", stacklevel=2)
        h = self._embed(input_ids)
        rope = self._rope(position_ids, h.dtype)
        stats: list[MoEStats] = []
        for i, block in enumerate(self.layers):
            layer_cache = cache.layers[i] if cache is not None else None
            mask = masks[self.config.is_sliding_layer(i)]
            h, block_stats = self._run(block, h, rope, mask, token_mask, layer_cache, past)
            if block_stats is not None:
                stats.append(block_stats)
        h = self.norm(h)
        terms = [term for s in stats for term in s.terms]
        if labels is None and terms:
            # Without labels there is no `out.loss`, so the auxiliary losses are injected through h.
            aux = torch.stack(self._weigh(terms)).sum()
            h = inject_gradients(h, loss=aux, scale=self.global_batch.scale, counter=None, load=None)
        if cache is not None:
            cache.advance(length)
        logits = self.head(h[:, -logits_to_keep:] if logits_to_keep else h)

        if labels is not None and token_mask is not None:
            labels = labels.masked_fill(~token_mask, IGNORED)
        ahead: list[Term] = []
        if self.training and labels is not None:
            ahead, mtp_stats = self._predict_ahead(h, input_ids, labels, rope, real, document_ids)
            stats += mtp_stats
            terms += [term for s in mtp_stats for term in s.terms]

        load = torch.stack([s.load.to(h.device) for s in stats]) if stats else None
        if load is not None and not torch.compiler.is_exporting():  # an exported graph cannot keep the sum
            self._count(load)
        if labels is None:
            return Output(logits=logits, hidden=h, load=load)
        next_token = Term("ce", next_token_loss(logits, labels, 1, document_ids, token_mask))
        loss, losses = self._total([next_token, *ahead, *terms])
        if num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)
            share = (next_token.mean.count.double() / items).to(loss.dtype)
            loss, losses = loss * share, {name: part * share for name, part in losses.items()}
        return Output(logits=logits, hidden=h, loss=loss, losses=losses, load=load)

    def run_mtp(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Run the MTP modules with the inputs that they have in training, in any mode and without losses.

        Args:
            hidden: [B, S, D], the `hidden` of the output of `forward` for the other arguments, without a cache.

        Returns:
            Outputs [B, S - k - 1, D] of each module k, normalised for `head`; only of those with S - k - 1 > 0.
            Position i is meaningful if tokens i to i + k + 1 are real and of one document.

        Raises TypeError and ValueError as `forward` does.
        """
        self._check(input_ids, None, attention_mask, position_ids, document_ids, None, 0)
        rope = self._rope(_positions(input_ids) if position_ids is None else position_ids, hidden.dtype)
        real = attention_mask.bool() if attention_mask is not None else None
        return [h for h, *_ in self._run_mtp(hidden, input_ids, rope, real, document_ids)]

    def _rope(self, position_ids: Tensor, dtype: torch.dtype) -> Uncast:
        tables = rope_tables(self.config.rope_parameters, self.config.rope_dim, position_ids, dtype)
        return Uncast(*tables, *(rotation(*tables) if self.config.rope_interleave else ()))

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise index_error("input_ids", input_ids, self.config.vocab_size, None, error) from None

    def _total(self, terms: list[Term]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts for `Output.losses`."""
        by_name: dict[str, list[Tensor]] = {}
        for term, mean in zip(terms, self._weigh(terms), strict=True):
            by_name.setdefault(term.name, []).append(mean)
        losses = {name: torch.stack(means).sum() if len(means) > 1 else means[0] for name, means in by_name.items()}
        weights = {term.name: term.weight for term in terms}
        parts = [mean if weights[name] == 1 else weights[name] * mean for name, mean in losses.items()]
        return functools.reduce(torch.add, parts), {name: mean.detach() for name, mean in losses.items()}

    def _weigh(self, terms: list[Term]) -> list[Tensor]:
        if not terms:
            return []
        device = terms[0].mean.value.device  # layers may be on several devices
        values = [term.mean.value.to(device) for term in terms]
        counts = [term.mean.count.to(device) for term in terms]
        return self.global_batch.weigh(values, counts, [term.key for term in terms])

    def loss_counts(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Count the tokens or sequences that each term of the loss of `forward` averages over, for the same arguments.

        Returns:
            int64 scalars for `GlobalBatch.step`. "ce.0": tokens predicted by the model; "mtp.1", "mtp.2", ...: tokens
            predicted by mtp.0, mtp.1, ...; "balance.0", "balance.1", ...: sequences with a real token (without
            `seq_aux`, real tokens) in the model, in mtp.0, ...; "z.0", "z.1", ...: real tokens.

        Raises TypeError and ValueError as `forward` does.
        """
        self._check(input_ids, labels, attention_mask, None, document_ids, None, 0)
        batch, length = input_ids.shape
        real = attention_mask.bool() if attention_mask is not None else None
        if labels is not None and real is not None:
            labels = labels.masked_fill(~real, IGNORED)
        counts: dict[str, Tensor] = {}
        for depth in range(1 + len(self.mtp)):
            keep = max(length - depth, 0)
            part = valid_positions(depth, real, document_ids) if keep else None
            tokens = input_ids.new_full((batch,), keep, dtype=torch.int64) if part is None else part.sum(-1)
            for name, count in loss_counts(self.config, tokens).items():
                counts[count_key(name, depth)] = count
            if labels is not None:
                predicted = targets(labels, depth + 1, keep, document_ids, part)
                counts[count_key("mtp" if depth else "ce", depth)] = predicted[1]
        return counts

    def interleave_rope(self) -> None:
        """Set `rope_interleave` in the config and all attention layers, without changing weights."""
        self.config = replace(self.config, rope_interleave=True)
        for module in self.modules():
            if isinstance(module, MLA):
                module.interleave_rope()

    def head(self, h: Tensor) -> Tensor:
        """Compute logits [..., V] of normalised h [..., D]."""
        return self.embed_tokens(h) if self.lm_head is None else self.lm_head(h)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a Hugging Face checkpoint folder, atomically; see `moe.save`."""
        import moe  # the lazy package, because saving depends on this module

        moe.save(self, folder)

    def pack(self) -> Self:
        """Convert bfloat16 weights to oneDNN's layout, for inference on a CPU, in place; return the model.

        Decoding then reads weights faster. Experts, projections and an untied head are packed. Results are rounded once
        from float32 sums, as before. A packed model computes no gradients and cannot be saved, cast or moved; `unpack`
        restores the same weights. Needs no more memory, except for one layer's experts while they are converted.
        Modules that have hooks, share a weight, or have been replaced, for example by adapters, remain as they are.

        Raises:
            ConfigError: weights that are not bfloat16 on a CPU, no weights to pack, or a processor without AVX-512 or
                AVX-NE-CONVERT.
        """
        pack(self)
        return self

    def unpack(self) -> Self:
        """Undo `pack`, in place; return the model. Without packed weights, nothing changes.

        The weights are new parameters, so optimizers must be built afterwards.
        """
        unpack(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        for module in self.modules():  # all before the first cast, so that a refused cast changes nothing
            if isinstance(module, Quantized | Packed):
                module.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        packed = [matrix for module in self.modules() if isinstance(module, Packed) for matrix in module.packed]
        count = sum(weight.numel() for weight in (*self.parameters(), *packed))
        return f"{self.config.model_type}, {count:,} parameters"

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (training only)."""
        self.activation_checkpointing = on

    def gradient_checkpointing_enable(self, *_: Any, every_n_layers: int = 1, offload: bool = False, **__: Any) -> None:
        """Call `set_activation_checkpointing(True)`, under the name that trainers use. It is never reentrant."""
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers = {every_n_layers}, offload = {offload}: expected 1 and False")
        self.set_activation_checkpointing(True)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        """Call `set_activation_checkpointing(False)`, under the name that trainers use."""
        self.set_activation_checkpointing(False)

    def load_report(self, *, reset: bool = False) -> LoadReport:
        """Return the expert load summed over all forward passes since the last reset, eval mode included."""
        names = [f"layers.{i}.mlp.gate" for i in range(len(self.layers)) if self.config.is_moe_layer(i)]
        names += [f"mtp.{k}.block.mlp.gate" for k in range(len(self.mtp))]
        load = torch.zeros(len(names), self.config.n_routed_experts, dtype=torch.int64)
        if self._load is not None:
            load[: len(self._load)] = self._load.cpu()
        if reset:
            self._load = None
        return LoadReport(names, load)

    def _masks(
        self, length: int, past: int, real: Tensor | None, document_ids: Tensor | None, device: torch.device
    ) -> dict[bool, Tensor | None]:
        """Return the attention masks of full (False) and sliding (True) layers, if the model has such layers."""
        config, masks = self.config, {}
        for slides in {config.is_sliding_layer(i) for i in range(config.num_hidden_layers)}:
            window = config.sliding_window if slides else None
            masks[slides] = make_attention_mask(length, past, real, document_ids, device, window)
        return masks

    def _run(self, block: nn.Module, h: Tensor, *args: object) -> tuple[Tensor, MoEStats | None]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            y, stats = checkpoint(block, h, *args, use_reentrant=False)
        else:
            y, stats = block(h, *args)
        # A reentrant checkpoint around a layer, block or MTP module detaches the losses.
        terms = stats.terms if stats is not None and torch.is_grad_enabled() and h.requires_grad else ()
        if not all(term.mean.value.requires_grad for term in terms):
            raise ValueError("balance losses: a reentrant checkpoint detached them; expected use_reentrant=False")
        return y, stats

    def _predict_ahead(
        self,
        h: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        rope: Uncast,
        real: Tensor | None,
        document_ids: Tensor | None,
    ) -> tuple[list[Term], list[MoEStats]]:
        """Return the losses and statistics of the MTP modules."""
        terms: list[Term] = []
        stats: list[MoEStats] = []
        modules = min(len(self.mtp), input_ids.shape[1] - 1)
        ran = self._run_mtp(h, input_ids, rope, real, document_ids)
        for k, (y, token_mask, block_stats) in enumerate(ran):
            mean = next_token_loss(self.head(y), labels, k + 2, document_ids, token_mask)
            mean = replace(mean, value=mean.value / modules)
            terms.append(Term("mtp", mean, self.config.mtp_loss_weight, depth=k + 1))
            if block_stats is not None:
                own = tuple(replace(term, depth=k + 1) for term in block_stats.terms)
                stats.append(replace(block_stats, terms=own))
        return terms, stats

    def _run_mtp(
        self, h: Tensor, input_ids: Tensor, rope: Uncast, real: Tensor | None, document_ids: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None, MoEStats | None]]:
        """Return output, token mask and statistics of each MTP module. Module k drops the last k + 1 positions."""
        found: list[tuple[Tensor, Tensor | None, MoEStats | None]] = []
        for k, module in enumerate(self.mtp):
            keep = input_ids.shape[1] - (k + 1)
            if keep < 1:
                if self.global_batch.lockstep:  # other ranks may run the module and would wait for this one
                    raise ValueError(f"sequences of {keep + k + 1} tokens: on a mesh {k + 2} or more, for mtp.{k}")
                break
            embedding = self.embed_tokens(input_ids[:, k + 1 :])
            documents = document_ids[:, :keep] if document_ids is not None else None
            token_mask = valid_positions(k + 1, real, document_ids)
            mask = make_attention_mask(keep, 0, token_mask, documents, input_ids.device)
            args = (embedding, Uncast(*(table[:, :keep] for table in rope.tensors)), mask, token_mask)
            h, stats = self._run(module, h[:, :keep], *args)
            found.append((h, token_mask, stats))
        return found

    def _count(self, load: Tensor) -> None:
        load = load.detach()
        if self._load is None or self._load.device != load.device:
            self._load = load.new_zeros(self.config.num_moe_layers + len(self.mtp), load.shape[1])
        missing = len(self._load) - len(load)
        self._load = self._load + (F.pad(load, (0, 0, 0, missing)) if missing else load)

    def _check(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int,
    ) -> None:
        check_input_ids(input_ids)
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"cache is a {type(cache).__name__}: expected a moe.cache.Cache")
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        for name, tensor, shape in (
            ("labels", labels, (batch, length)),
            ("attention_mask", attention_mask, (batch, past + length)),
            ("position_ids", position_ids, (batch, length)),
            ("document_ids", document_ids, (batch, length)),
        ):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor {shape}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
            if name == "labels" and tensor.dtype not in ID_DTYPES:
                raise TypeError(f"labels is {tensor.dtype}: expected int64 or int32")
            if tensor.is_floating_point() or tensor.is_complex():
                wanted = "booleans or integers, non-zero for real tokens" if name == "attention_mask" else "integers"
                raise ValueError(f"{name} is floating point: expected {wanted}")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep = {logits_to_keep}: expected 0 (all) or more")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids: not supported with a cache")
        if labels is not None and (logits_to_keep or cache is not None):
            raise ValueError("labels need the logits of all positions; expected no cache and logits_to_keep = 0")


def _positions(input_ids: Tensor, past: int = 0) -> Tensor:
    """Return the positions [B, S] of tokens that follow `past` others."""
    batch, length = input_ids.shape
    return torch.arange(past, past + length, device=input_ids.device).expand(batch, length)


def check_input_ids(input_ids: Any) -> None:
    """Raise TypeError or ValueError if `input_ids` is not a tensor of token ids [B, S]."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}: expected a tensor, int64 [B, S]")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, S]")
    if input_ids.dtype not in ID_DTYPES:
        raise TypeError(f"input_ids is {input_ids.dtype}: expected int64 or int32")


def make_attention_mask(
    length: int,
    past: int,
    real: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """Return the attention mask, bool [B or 1, 1, S, S_total], or None if attention without a mask is equivalent.

    With a window, a query attends to that many tokens, itself included. A query always attends to itself, because a
    softmax over nothing is 0/0.
    """
    if window is None and real is None and document_ids is None and (past == 0 or length == 1):
        return None
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(past + length, device=device)[None, :]
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (key > query - window)
    if real is not None:
        mask = mask & real[:, None, None, :]
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask | (key == query)

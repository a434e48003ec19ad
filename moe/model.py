"""The transformer. Read this file first: it is the whole architecture, top to bottom.

    h = embed(ids);  for each block: h += attention(norm(h)); h += mlp(norm(h));  logits = head(norm(h))

where `mlp` is a dense MLP in some blocks, as the config says, and a `MoELayer` in the others. Multi-token
prediction modules (DeepSeek-V3, arXiv 2412.19437, section 2.2) stand behind the last block and are used in training.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

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
from moe.init import materialize, unfilled
from moe.layer import MLP, MoELayer, MoEStats
from moe.loss import IGNORED, Term, count_key, next_token_loss, taking_part, targets
from moe.norm import RMSNorm
from moe.ops.library import check_device, index_error
from moe.output import Output
from moe.quantized import Quantized
from moe.rope import rope_tables
from moe.uncast import Uncast

ID_DTYPES = (torch.int64, torch.int32)


class Embedding(nn.Embedding):
    """Token ids [...] -> vectors [..., D]; and as the tied head, vectors [..., D] -> logits [..., V].

    One module for both, since offloading, sharding and hooks see parameters where their module is called. A hook on
    its output sees both.
    """

    def forward(self, input: Tensor) -> Tensor:
        check_device("Embedding", self.weight, input)
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, has_experts: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = MLA(config) if config.is_mla else GQA(config)
        self.post_attention_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.has_experts = has_experts  # and not the class of mlp, which others wrap
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
    """One multi-token prediction module: h' = norm(block(eh_proj(cat[enorm(emb), hnorm(h)]))).

    Module k (from 0) sees the state h_i of the module before it (of the model's final norm for k = 0) and the embedding
    of token i + k + 1, and predicts token i + k + 2 through the model's own head. The concatenation is in the released
    checkpoint's order, embedding first; the paper prints the reverse.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.enorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = Block(config, has_experts=True)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)

    def forward(
        self, h: Tensor, embedding: Tensor, rope: Uncast, mask: Tensor | None, token_mask: Tensor | None
    ) -> tuple[Tensor, MoEStats | None]:
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), dim=-1))
        x, stats = self.block(x, rope, mask, token_mask, None, 0)
        return self.norm(x), stats


class Transformer(nn.Module):
    """A Mixture-of-Experts language model. Builds on the meta device under `with torch.device("meta")`.

    Args:
        config: what to build; see `ModelConfig`.
        seed: of the initialisation; the global generator is not touched.

    Attributes:
        config: equal to the given one; see `OpenConfig`.
        carried_files: file name -> content of tokenizer files and the like that came with a loaded checkpoint; `save`
            writes them beside the weights.
        origin: what `moe.load` remembers of the files, so that a save writes the same tensors; None for a new model.
    """

    # What transformers' Trainer asks of a model: that its loss is a sum over num_items_in_batch, with shifted labels.
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
        with unfilled():
            # Not nn.Embedding(V, D): its normal_ on the meta device imports torch's compiler, which takes seconds.
            embedding = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = Embedding.from_pretrained(embedding, freeze=False)
            self.layers = nn.ModuleList(
                Block(config, has_experts=config.is_moe_layer(i)) for i in range(config.num_hidden_layers)
            )
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        materialize(self, std=config.initializer_range, seed=seed)
        self.join(GlobalBatch())

    def join(self, batch: GlobalBatch) -> None:
        """Take part in `batch`, with all routers."""
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
        """Logits, and with labels the loss.

        Args:
            input_ids: int64 or int32 [B, S], in [0, V).
            labels: int64 or int32 [B, S], unshifted (usually input_ids), in [0, V); -100 is ignored.
            attention_mask: [B, S_total], non-zero for real tokens, padding on either side; S_total includes the
                tokens in `cache`.
            position_ids: integers [B, S], also negative; by default they count on from the cache's length.
            document_ids: integers [B, S]; a token sees only its own document, and no token is predicted from another
                one. MTP modules leave out positions whose tokens ahead are in another one, as they do with padding.
            cache: earlier tokens; it is filled and advanced.
            logits_to_keep: compute logits for this many last positions only; 0 for all.
            num_items_in_batch: predicted tokens of the whole optimizer step, of which this is a micro-batch. The loss
                and its parts are multiplied by this call's share of them, so that their sum over the micro-batches is
                the mean over tokens ("mtp", "balance", "z": the mean of their means, weighted by predicted tokens).

        Raises:
            TypeError: ids or labels that are no integers.
            ValueError: shapes, dtypes or arguments that do not fit each other.
            IndexError: an id or a label that is predicted out of range (on CPU; a device assertion on CUDA).
        """
        self._check(input_ids, labels, attention_mask, position_ids, document_ids, cache, logits_to_keep)
        batch, length = input_ids.shape
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device).expand(batch, length)
        real = attention_mask.bool() if attention_mask is not None else None
        masks = self._masks(length, past, real, document_ids, input_ids.device)
        token_mask = real[:, past:] if real is not None else None

        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for reason in self._idle:
                warnings.warn(f"parameters that do not learn: {reason}", stacklevel=2)
        h = self._embed(input_ids)
        rope = Uncast(*rope_tables(self.config.rope_parameters, self.config.rope_dim, position_ids, h.dtype))
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
        if load is not None and not torch.compiler.is_exporting():  # a graph has nowhere to keep the sum
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

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise index_error("input_ids", input_ids, self.config.vocab_size, None, error) from None

    def _total(self, terms: list[Term]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what `Output.losses` reports of it."""
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
        device = terms[0].mean.value.device  # layers may be on several
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
        """Number of tokens or sequences that each term of the loss of `forward` is a mean over, for the same arguments.

        Returns:
            int64 scalars. "ce.0": tokens that are predicted; "mtp.1": by the module mtp.0, and so on; "balance.0",
            "balance.1", ...: sequences with a real token (without `seq_aux`, real tokens) in the layers, in mtp.0, and
            so on; "z.0", ...: real tokens. For `GlobalBatch.step`.

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
            part = taking_part(depth, real, document_ids) if keep else None
            tokens = input_ids.new_full((batch,), keep, dtype=torch.int64) if part is None else part.sum(-1)
            for name, count in loss_counts(self.config, tokens).items():
                counts[count_key(name, depth)] = count
            if labels is not None:
                predicted = targets(labels, depth + 1, keep, document_ids, part)
                counts[count_key("mtp" if depth else "ce", depth)] = predicted[1]
        return counts

    def interleave_rope(self) -> None:
        """Rotate pairs of neighbouring rows from now on: `rope_interleave` of the config. The weights stay."""
        self.config = replace(self.config, rope_interleave=True)
        for module in self.modules():
            if isinstance(module, MLA):
                module.interleave_rope()

    def head(self, h: Tensor) -> Tensor:
        """h [..., D], normalised -> logits [..., V]."""
        return self.embed_tokens(h) if self.lm_head is None else self.lm_head(h)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a Hugging Face checkpoint folder, atomically; see `moe.save`."""
        import moe  # the lazy package: saving is built on models, and not the reverse

        moe.save(self, folder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        for module in self.modules():  # all of them first: a refused cast leaves nothing half cast
            if isinstance(module, Quantized):
                module.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{self.config.model_type}, {count:,} parameters"

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (training only)."""
        self.activation_checkpointing = on

    def gradient_checkpointing_enable(self, *_: Any, every_n_layers: int = 1, offload: bool = False, **__: Any) -> None:
        """`set_activation_checkpointing(True)`, by the name that trainers call. It is never reentrant."""
        if every_n_layers != 1 or offload:
            raise ValueError(f"every_n_layers = {every_n_layers}, offload = {offload}: expected 1 and False")
        self.set_activation_checkpointing(True)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        """`set_activation_checkpointing(False)`, by the name that trainers call."""
        self.set_activation_checkpointing(False)

    def load_report(self, *, reset: bool = False) -> LoadReport:
        """Expert load summed over the forward passes, of training and eval, since the last reset."""
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
        """The attention masks of full and (True) of sliding layers, each made only if some layer needs it."""
        config, masks = self.config, {}
        for slides in {config.is_sliding_layer(i) for i in range(config.num_hidden_layers)}:
            window = config.sliding_window if slides else None
            masks[slides] = attention_scope(length, past, real, document_ids, device, window)
        return masks

    def _run(self, block: nn.Module, h: Tensor, *args: object) -> tuple[Tensor, MoEStats | None]:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            y, stats = checkpoint(block, h, *args, use_reentrant=False)
        else:
            y, stats = block(h, *args)
        # A reentrant checkpoint around a layer, a block or an MTP module gives the losses back without their graph.
        terms = stats.terms if stats is not None and torch.is_grad_enabled() and h.requires_grad else ()
        if not all(term.mean.value.requires_grad for term in terms):
            raise ValueError("the balance losses of a layer have no gradient: checkpoint it with use_reentrant=False")
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
        """The MTP modules' losses and statistics. Module k drops the last k + 1 positions: they have no token ahead."""
        terms: list[Term] = []
        stats: list[MoEStats] = []
        modules = min(len(self.mtp), input_ids.shape[1] - 1)
        for k, module in enumerate(self.mtp):
            keep = input_ids.shape[1] - (k + 1)
            if keep < 1:
                if self.global_batch.lockstep:  # other ranks may run the module, and would wait for this one
                    raise ValueError(f"sequences of {keep + k + 1} tokens: on a mesh {k + 2} or more, for mtp.{k}")
                break
            embedding = self.embed_tokens(input_ids[:, k + 1 :])
            documents = document_ids[:, :keep] if document_ids is not None else None
            token_mask = taking_part(k + 1, real, document_ids)
            mask = attention_scope(keep, 0, token_mask, documents, input_ids.device)
            args = (embedding, Uncast(*(table[:, :keep] for table in rope.tensors)), mask, token_mask)
            h, block_stats = self._run(module, h[:, :keep], *args)
            mean = next_token_loss(self.head(h), labels, k + 2, document_ids, token_mask)
            mean = replace(mean, value=mean.value / modules)
            terms.append(Term("mtp", mean, self.config.mtp_loss_weight, depth=k + 1))
            if block_stats is not None:
                own = tuple(replace(term, depth=k + 1) for term in block_stats.terms)
                stats.append(replace(block_stats, terms=own))
        return terms, stats

    def _count(self, load: Tensor) -> None:
        load = load.detach()
        if self._load is None or self._load.device != load.device:
            self._load = load.new_zeros(self.config.num_moe_layers + len(self.mtp), load.shape[1])
        self._load = self._load + F.pad(load, (0, 0, 0, len(self._load) - len(load)))

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
            raise ValueError("document_ids and cache together: packed documents are for training")
        if labels is not None and (logits_to_keep or cache is not None):
            raise ValueError("labels need the logits of all positions: no cache and no logits_to_keep")


def check_input_ids(input_ids: Any) -> None:
    """Raise TypeError or ValueError for what is no tensor of token ids [B, S]."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids is a {type(input_ids).__name__}: expected a tensor, int64 [B, S]")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, S]")
    if input_ids.dtype not in ID_DTYPES:
        raise TypeError(f"input_ids is {input_ids.dtype}: expected int64 or int32")


def attention_scope(
    length: int,
    past: int,
    real: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """The attention mask, bool [B or 1, 1, S, S_total], or None where the attention's own causal rule says it all.

    With a window, a query sees that many tokens, itself included.
    A query always sees itself: a padded query that saw nothing would be 0/0.
    """
    if window is None and real is None and document_ids is None and (past == 0 or length == 1):
        return None
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(past + length, device=device)[None, :]
    scope = (key <= query)[None, None]
    if window is not None:
        scope = scope & (key > query - window)
    if real is not None:
        scope = scope & real[:, None, None, :]
    if document_ids is not None:
        scope = scope & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return scope | (key == query)

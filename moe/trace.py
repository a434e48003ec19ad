"""Trace of a model's routing: which experts each token chose in each layer, with statistics.

L layers, T tokens, E experts, K experts per token.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.balance import LoadReport, expert_load, routers
from moe.errors import ConfigError, one_line
from moe.layer import MoELayer
from moe.loss import valid_positions
from moe.model import Transformer
from moe.ops import Routing
from moe.ops.routing import first_by_sorting, group_scores, members_of
from moe.planning.placement import PlacementReport, place
from moe.replay import observing
from moe.router import Router

BF16_FRACTION_BITS = 7
ROWS = 1024  # tokens whose margins are computed at once
MAX_EXPERTS = 2**16  # of the ids of a file


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of T tokens in L layers, in the order of the text.

    MTP module k routes a token only if it has k + 1 following tokens (in its window, real and of its document), as in
    training. The layers of the model route every token.

    Attributes:
        layers: names of the layers, str [L]: those of `Transformer.load_report` without ".gate".
        experts: E.
        expert_bytes: bytes of one expert's parameters in memory.
        expert_ids: experts of each token, best first, uint8 or uint16 [L, T, K].
        weights: routing weights, float16 [L, T, K].
        margins: distance from a tie, see `margins`, float16 [L, T].
        starts: index of the first token of each window of text, int64.
        routed: whether the layer routed the token, bool [L, T]. Otherwise ids and weights are 0, and the margin is
            infinite.
    """

    layers: np.ndarray
    experts: int
    expert_bytes: int
    expert_ids: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    starts: np.ndarray
    routed: np.ndarray

    @property
    def tokens(self) -> int:
        return self.expert_ids.shape[1]

    @property
    def load(self) -> LoadReport:
        """Tokens that chose each expert."""
        return self._load(slice(None))

    @property
    def near_ties(self) -> list[float]:
        """Share of the routed tokens per layer with a margin below 1."""
        near = zip(self.margins < 1, self.routed, strict=True)
        return [float(ties[routed].mean()) for ties, routed in near]

    @property
    def co_activation(self) -> np.ndarray:
        """Tokens that chose both experts of each pair, int64 [L, E, E]; see `co_activation`."""
        return np.stack([co_activation(self.chosen(layer), self.experts) for layer in range(len(self.layers))])

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts of the first half of the tokens, and of the rest, [layers, T / 2, K], without MTP modules."""
        ids, middle = self.expert_ids[self.routed.all(axis=1)], self.tokens // 2
        return ids[:, :middle], ids[:, middle:]

    def chosen(self, layer: int, tokens: slice = slice(None)) -> np.ndarray:
        """Experts of the tokens that the layer with this index routed, of all tokens or of those given, [tokens, K]."""
        return self.expert_ids[layer, tokens][self.routed[layer, tokens]]

    def placed(self, gpus: int, replicas: int) -> PlacementReport:
        """Balance of the second half on GPUs whose experts were placed for the first half.

        Each GPU holds E / G experts, rounded up, and `replicas` more. Raises ConfigError as `place`.
        """
        middle = self.tokens // 2
        before, after = self._load(slice(middle)), self._load(slice(middle, None))
        physical = gpus * (-(-self.experts // gpus) + replicas)
        return place(before.load, gpus=gpus, physical_experts=physical).report(after.load, after.layers)

    def save(self, file: Path) -> None:
        """Write a compressed .npz file with the attributes, and with `load` and `co_activation`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez_compressed(
            file, **parts, load=self.load.load.numpy(), co_activation=self.co_activation.astype(np.int32)
        )

    @staticmethod
    def read(file: Path) -> "Trace":
        """Read a file that `save` wrote. Raises ConfigError for any other file."""
        try:
            # numpy leaves a file that it opened itself, and could not read, open.
            with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                parts: dict[str, Any] = {field.name: arrays[field.name] for field in fields(Trace)}
            for name in ("experts", "expert_bytes"):
                parts[name] = int(parts[name])
            trace = Trace(**parts)
            trace._check()
        except Exception as error:  # zipfile, its decompressors and numpy fail in many ways
            raise ConfigError(str(file), one_line(error), "a file that moesmith trace wrote") from None
        return trace

    def _check(self) -> None:
        """Raise ValueError if the arrays do not fit together."""
        ids = self.expert_ids
        others = (self.layers, self.weights, self.margins, self.routed, self.starts)
        shapes, kinds = [each.shape for each in others[:-1]], "".join(each.dtype.kind for each in others)
        fits = ids.ndim == 3 and shapes == [ids.shape[:1], ids.shape, ids.shape[:2], ids.shape[:2]]
        fits = fits and self.starts.ndim == 1 and ids.dtype.kind == "u" and kinds == "Uffbi" and ids.size > 0
        fits = fits and self.routed.any(axis=1).all()
        if not fits or self.experts > MAX_EXPERTS or ids.max() >= self.experts or self.expert_bytes < 0:
            raise ValueError("the arrays do not fit together")
        if (np.diff(np.sort(ids[self.routed], axis=1), axis=1) == 0).any():
            raise ValueError("a token chose an expert twice")

    def _load(self, tokens: slice) -> LoadReport:
        chosen = [self.chosen(layer, tokens).astype(np.int64) for layer in range(len(self.layers))]
        counts = [expert_load(torch.from_numpy(ids), self.experts) for ids in chosen]
        return LoadReport(self.layers.tolist(), torch.stack(counts))


def record(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Trace:
    """Record the routing of each real token, in eval mode.

    Args:
        model: any model with MoE layers of one size. Layers that do not run are left out. The MTP modules of a
            `Transformer` run with the inputs that they have in training, see `Transformer.run_mtp`.
        batches: arguments of the model: input_ids [B, S] in the order of the text, and optionally attention_mask
            [B, S], 0 for padding, and what else the model takes.

    Raises:
        ConfigError: no layer ran, the layers have different numbers of experts or of experts per token, or a layer does
            not route each token of input_ids once.
        FloatingPointError: the scores or the correction bias of a router are not finite.
    """
    found = dict(routers(model))
    modules = len(model.mtp) if isinstance(model, Transformer) else 0
    depths = {f"mtp.{k}.block.mlp.gate": k + 1 for k in range(modules)}
    parts: dict[str, list[_Part]] = {name: [] for name in found}
    lengths: list[int] = []
    real, documents = torch.empty(0), None
    part: dict[str, _Part] = {}  # of the current batch

    def keep(name: str, router: Router, x: Tensor, routing: Routing) -> None:
        bias = router.e_score_correction_bias
        for values, what in ((routing.scores, "scores"), (bias, "correction bias")):
            if values is not None and not torch.isfinite(values).all():
                raise FloatingPointError(f"the {what} of {name} {'are' if what == 'scores' else 'is'} not finite")
        depth = depths.get(name, 0)
        valid = valid_positions(depth, real, documents)
        assert valid is not None
        if name in part or len(x) != valid.numel():
            allowed = f"a model whose layers route each of the {valid.numel()} tokens once"
            raise ConfigError("model", f"{name}: {len(x)} rows{', again' if name in part else ''}", allowed)
        rows = valid.flatten().to(x.device)
        new = _Part.empty(router, int(real.sum()))
        new.routed[:] = F.pad(valid, (0, depth))[real].cpu().numpy()
        new.expert_ids[new.routed] = routing.expert_ids[rows].cpu().numpy()
        new.weights[new.routed] = routing.weights[rows].half().cpu().numpy()
        ratio = torch.cat([margins(router, some) for some in x[rows].split(ROWS)])
        new.margins[new.routed] = ratio.half().cpu().numpy()
        part[name] = new

    was_training = model.training
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(observing(model, keep))
        stack.callback(model.train, was_training)
        model.eval()
        for batch in batches:
            ids, mask, documents = batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids")
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            lengths += real.sum(1).tolist()
            part.clear()
            out = model(**batch)
            if isinstance(model, Transformer):
                shared = {name: batch.get(name) for name in ("attention_mask", "position_ids", "document_ids")}
                model.run_mtp(out.hidden, ids, **shared)
            for name, router in found.items():
                parts[name].append(part.get(name) or _Part.empty(router, int(real.sum())))
    ran = {name: layer for name, layer in parts.items() if any(each.routed.any() for each in layer)}
    sizes = {(found[name].num_experts, found[name].selection["top_k"]) for name in ran}
    if len(sizes) != 1:
        allowed = "layers with experts, all with the same number of them, and of experts per token"
        raise ConfigError("model", sorted(sizes), allowed)
    joined = {
        each.name: np.stack([np.concatenate([getattr(some, each.name) for some in layer]) for layer in ran.values()])
        for each in fields(_Part)
    }
    layers = np.array([name.removesuffix(".gate") for name in ran])
    starts = np.cumsum([0, *lengths[:-1]])
    return Trace(layers=layers, experts=sizes.pop()[0], expert_bytes=_expert_bytes(model), starts=starts, **joined)


@dataclass(frozen=True, eq=False)
class _Part:
    """Routing of T tokens in one layer, as in `Trace` without its first dimension."""

    expert_ids: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    routed: np.ndarray

    @staticmethod
    def empty(router: Router, tokens: int) -> "_Part":
        """No token is routed yet."""
        shape = tokens, router.selection["top_k"]
        ids = np.zeros(shape, np.min_scalar_type(router.num_experts - 1))
        return _Part(ids, np.zeros(shape, np.float16), np.full(tokens, np.inf, np.float16), np.zeros(tokens, bool))


def margins(router: Router, x: Tensor) -> Tensor:
    """Divide the gap to another selection of experts by the noise of bf16, for x [T, D].

        choice = scores + correction_bias               # by which the router selects, with x in float32
        gap    = choice of the K-th expert - choice of the (K + 1)-th, in the order of `moe.ops.route`
        ulp    = 2^(floor(log2 |x|) - 7)                # spacing of bf16 numbers at x; 0 for x = 0
        noise  = sqrt(sum over D of (d gap / d x)^2 ulp^2 / 12)
        margin = gap / noise                            # 0 if the gap is 0

    The noise is the standard deviation of the gap, to first order, if each component of x is rounded to bf16 once: its
    error is uniform within ulp / 2, whose variance is ulp^2 / 12. So one rounding exchanges the two experts with
    probability Phi(-margin), where Phi is the distribution function of the normal distribution.

    With groups, the (K + 1)-th expert is the best other one of the selected groups. If topk_group < n_group, the groups
    can be exchanged, too:

        group gap    = score of the topk_group-th group - score of the next one, in the order of `moe.ops.route`
        group noise  = as above, for the group gap
        group margin = group gap / group noise          # infinity if the exchange of the two groups selects the same
                                                        # K experts; 0 if the group gap is 0 otherwise
        margin       = min(gap / noise, group margin)

    Returns:
        float32 or float64 [T], at least 0; infinity if no other selection is possible.
    """
    k, groups, kept = (router.selection[name] for name in ("top_k", "n_group", "topk_group"))
    candidates = router.num_experts // groups * kept
    router.keep_bias_float32()
    bias = router.e_score_correction_bias
    with torch.enable_grad():
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        routing = ops.route(router.logits(x), bias, **{**router.selection, "top_k": min(k + 1, candidates)})
        choice = routing.scores if bias is None else routing.scores + bias
        margin = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)
        if k < candidates:
            last, following = choice.gather(1, routing.expert_ids[:, k - 1 :]).unbind(1)
            margin = _in_noise(last - following, x)
        if kept < groups:
            scores = group_scores(choice, groups, router.selection["group_score"])
            order = first_by_sorting(scores.detach(), None, kept + 1)
            last, following = scores.gather(1, order[:, kept - 1 :]).unbind(1)
            exchanged = members_of(torch.cat((order[:, : kept - 1], order[:, kept:]), 1), groups, router.num_experts)
            others = first_by_sorting(choice.detach(), ~exchanged, k)
            same = (others.sort(1).values == routing.expert_ids[:, :k].sort(1).values).all(1)
            margin = margin.minimum(_in_noise(last - following, x).masked_fill(same, torch.inf))
    return margin


def _in_noise(gap: Tensor, x: Tensor) -> Tensor:
    """Divide gap [T], a function of x [T, D] row by row, by its noise; see `margins`."""
    (slope,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
    gap, x = gap.detach(), x.detach()
    exponent = torch.frexp(x).exponent - 1 - BF16_FRACTION_BITS
    ulp = torch.ldexp(torch.ones_like(x), exponent).masked_fill(x == 0, 0)
    noise = (slope * ulp).square().sum(1).div(12).sqrt()
    return torch.where(gap == 0, 0, gap / noise)


def co_activation(expert_ids: np.ndarray, experts: int) -> np.ndarray:
    """Count the tokens that chose both experts of each pair: ids [T, K] -> int64 [E, E], with the load as diagonal."""
    chosen = np.zeros((len(expert_ids), experts), np.float32)  # sums are exact up to 2^24 tokens
    np.put_along_axis(chosen, expert_ids.astype(np.int64), 1, axis=1)
    return (chosen.T @ chosen).astype(np.int64)


def predicted_pairs(load: np.ndarray, k: int) -> np.ndarray:
    """Predict how many tokens choose both experts of each pair from the loads alone.

        predicted(a, b) = load(a) load(b) / T * (K - 1) E / (K (E - 1))        # T = sum(load) / K

    The last factor makes the prediction exact if each token chooses K of the E experts at random. It is below 1,
    because the K experts of a token are distinct. The lift of a pair is its co-activation divided by this.

    Args:
        load: tokens that chose each expert, integers [E].
        k: K.

    Returns:
        float64 [E, E], 0 on the diagonal.
    """
    experts = len(load)
    pairs = np.outer(load, load.astype(np.float64)) * (k - 1) * experts / max(load.sum() * (experts - 1), 1)
    return np.where(np.eye(experts, dtype=bool), 0, pairs)


def _expert_bytes(model: nn.Module) -> int:
    """Bytes of one routed expert of the first MoE layer, with the scales of quantised parameters."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            tensors = (*module.experts.parameters(), *module.experts.buffers())
            return sum(tensor.nbytes for tensor in tensors) // module.config.n_routed_experts
    return 0

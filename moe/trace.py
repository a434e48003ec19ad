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
from torch import Tensor, nn

from moe import ops
from moe.balance import LoadReport, expert_load, routers
from moe.errors import ConfigError, one_line
from moe.layer import MoELayer
from moe.ops import Routing
from moe.planning.placement import PlacementReport, place
from moe.router import Router

BF16_FRACTION_BITS = 7
ROWS = 1024  # tokens whose margins are computed at once
MAX_EXPERTS = 2**16  # of the ids of a file


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of T tokens in L layers, in the order of the text.

    Attributes:
        layers: names of the layers, str [L].
        experts: E.
        expert_bytes: bytes of one expert's parameters in memory.
        expert_ids: experts of each token, best first, uint8 or uint16 [L, T, K].
        weights: routing weights, float16 [L, T, K].
        margins: distance from a tie, see `margins`, float16 [L, T].
        starts: index of the first token of each window of text, int64.
    """

    layers: np.ndarray
    experts: int
    expert_bytes: int
    expert_ids: np.ndarray
    weights: np.ndarray
    margins: np.ndarray
    starts: np.ndarray

    @property
    def tokens(self) -> int:
        return self.expert_ids.shape[1]

    @property
    def load(self) -> LoadReport:
        """Tokens that chose each expert."""
        return self._load(self.expert_ids)

    @property
    def near_ties(self) -> list[float]:
        """Share of tokens per layer with a margin below 1."""
        return (self.margins < 1).mean(axis=1).tolist()

    @property
    def co_activation(self) -> np.ndarray:
        """Tokens that chose both experts of each pair, int64 [L, E, E]; see `co_activation`."""
        return np.stack([co_activation(ids, self.experts) for ids in self.expert_ids])

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Experts of the tokens of the first half, and of the rest, [L, T / 2, K]."""
        middle = self.tokens // 2
        return self.expert_ids[:, :middle], self.expert_ids[:, middle:]

    def placed(self, gpus: int, replicas: int) -> PlacementReport:
        """Balance of the second half on GPUs whose experts were placed for the first half.

        Each GPU holds E / G experts, rounded up, and `replicas` more. Raises ConfigError as `place`.
        """
        before, after = (self._load(half) for half in self.halves)
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
        shapes = (self.layers.shape, self.weights.shape, self.margins.shape)
        kinds = (self.layers.dtype.kind, self.weights.dtype.kind, self.margins.dtype.kind, self.starts.dtype.kind)
        fits = ids.ndim == 3 and shapes == (ids.shape[:1], ids.shape, ids.shape[:2]) and self.starts.ndim == 1
        fits = fits and ids.dtype.kind == "u" and kinds == ("U", "f", "f", "i") and ids.size > 0
        if not fits or self.experts > MAX_EXPERTS or ids.max() >= self.experts or self.expert_bytes < 0:
            raise ValueError("the arrays do not fit together")
        if (np.diff(np.sort(ids, axis=2), axis=2) == 0).any():
            raise ValueError("a token chose an expert twice")

    def _load(self, expert_ids: np.ndarray) -> LoadReport:
        counts = [expert_load(torch.from_numpy(ids.astype(np.int64)), self.experts) for ids in expert_ids]
        return LoadReport(self.layers.tolist(), torch.stack(counts))


def record(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Trace:
    """Record the routing of each real token, in eval mode.

    Args:
        model: any model with MoE layers of one size. Layers that do not run, such as MTP modules, are left out.
        batches: arguments of the model: input_ids [B, S] in the order of the text, and optionally attention_mask
            [B, S], 0 for padding.

    Raises:
        ConfigError: no layer ran, or the layers have different numbers of experts.
        FloatingPointError: the scores of a router are not finite.
    """
    found = dict(routers(model))
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in found}
    real: Tensor | None = None
    lengths: list[int] = []

    def keep(name: str, router: Router, x: Tensor, routing: Routing) -> None:
        if not torch.isfinite(routing.scores).all():
            raise FloatingPointError(f"the scores of {name} are not finite")
        rows = slice(None) if real is None else real.flatten().to(x.device)
        ids = routing.expert_ids[rows].cpu().numpy().astype(np.min_scalar_type(router.num_experts - 1))
        ratio = torch.cat([margins(router, part) for part in x[rows].split(ROWS)])
        parts[name].append((ids, routing.weights[rows].half().cpu().numpy(), ratio.half().cpu().numpy()))

    was_training = model.training
    with ExitStack() as stack, torch.no_grad():
        for name, router in found.items():
            hook = lambda module, args, routing, name=name: keep(name, module, args[0], routing)  # noqa: E731
            stack.callback(router.register_forward_hook(hook).remove)
        stack.callback(model.train, was_training)
        model.eval()
        for batch in batches:
            mask = batch.get("attention_mask")
            real = None if mask is None else mask.bool()
            rows, width = batch["input_ids"].shape
            lengths += [width] * rows if real is None else real.sum(1).tolist()
            model(**batch)
    ran = {name: layer for name, layer in parts.items() if layer}
    sizes = {found[name].num_experts for name in ran}
    if len(sizes) != 1:
        raise ConfigError("model", sorted(sizes), "layers with experts, all with the same number of them")
    ids, weights, ratios = (
        np.stack([np.concatenate(pieces) for pieces in each])
        for each in zip(*(zip(*layer, strict=True) for layer in ran.values()), strict=True)
    )
    layers = np.array([name.removesuffix(".gate") for name in ran])
    return Trace(layers, sizes.pop(), _expert_bytes(model), ids, weights, ratios, np.cumsum([0, *lengths[:-1]]))


def margins(router: Router, x: Tensor) -> Tensor:
    """Divide the gap between the last selected expert and the next one by the noise of bf16, for x [T, D].

        choice = scores + correction_bias               # by which the router selects, with x in float32
        gap    = choice of the K-th expert - choice of the (K + 1)-th, in the order of `moe.ops.route`
        ulp    = 2^(floor(log2 |x|) - 7)                # spacing of bf16 numbers at x; 0 for x = 0
        noise  = sqrt(sum over D of (d gap / d x)^2 ulp^2 / 12)
        margin = gap / noise                            # 0 if the gap is 0

    The noise is the standard deviation of the gap, to first order, if each component of x is rounded to bf16 once: its
    error is uniform within ulp / 2, whose variance is ulp^2 / 12. So one rounding exchanges the two experts with
    probability Phi(-margin), where Phi is the distribution function of the normal distribution. With groups, the next
    expert is the best other one of the selected groups; an exchange of groups is not considered.

    Returns:
        float32 or float64 [T], at least 0; infinity if there is no next expert.
    """
    k, experts = router.selection["top_k"], router.num_experts
    if k == experts // router.selection["n_group"] * router.selection["topk_group"]:
        return torch.full(x.shape[:1], torch.inf, device=x.device)
    router.keep_bias_float32()
    bias = router.e_score_correction_bias
    with torch.enable_grad():
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        routing = ops.route(router.logits(x), bias, **{**router.selection, "top_k": k + 1})
        choice = routing.scores if bias is None else routing.scores + bias
        last, following = choice.gather(1, routing.expert_ids[:, k - 1 :]).unbind(1)
        gap = last - following
        (slope,) = torch.autograd.grad(gap.sum(), x)
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

"""The table of shapes and routings that every operator is tested on."""

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["random", "gaps", "one", "skew", "absent", "no_first", "nobody", "repeated"]


@dataclass(frozen=True)
class Inputs:
    """The arguments of `moe_mlp`, values such that gate, up and down have a spread of about one."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    expert_ids: Tensor
    gate_up_bias: Tensor
    down_bias: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in another dtype; the routing weights in float32 or wider."""
        fields = {name: t if name == "expert_ids" else t.to(dtype) for name, t in vars(self).items()}
        return replace(self, **fields | {"weights": self.weights.to(torch.promote_types(dtype, torch.float32))})

    def leaves(self) -> "Inputs":
        """The same tensors, strides and all, as leaves that require gradients."""
        return Inputs(**{n: t.detach().requires_grad_(t.is_floating_point()) for n, t in vars(self).items()})

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self.x, self.gate_up, self.down, self.weights, self.gate_up_bias, self.down_bias


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    spread: Spread = "random"
    counts: tuple[int, ...] = ()  # tokens of each expert, instead of a spread; top_k is then 1

    def __str__(self) -> str:
        return self.name

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def expert_ids(self) -> Tensor:
        if self.counts:
            ids = torch.arange(self.experts).repeat_interleave(torch.tensor(self.counts))
            return ids[torch.randperm(self.tokens, generator=self.generator())][:, None]
        scores = torch.rand(self.tokens, self.experts, generator=self.generator())
        if self.spread == "gaps":  # nobody goes to the first, a middle and the last expert
            scores[:, [0, self.experts // 2, -1]] = -1
        if self.spread == "skew":  # nearly everybody goes to one expert, and the last takes a single token
            scores[:, self.experts // 3] = 2
            scores[:, -1] = -1
            scores[self.tokens // 2, -1] = 3
        ids = scores.topk(self.top_k, dim=1).indices
        if self.spread == "one":
            ids = torch.full_like(ids, self.experts // 2)
        if self.spread == "repeated":  # a token may name one expert twice
            ids[::2, 1] = ids[::2, 0]
        if self.spread == "absent":  # a third of the slots, and every slot of some tokens
            ids[torch.rand(ids.shape, generator=self.generator()) < 0.33] = -1
            ids[[0, self.tokens // 2, -1]] = -1
        if self.spread == "no_first":  # no token's first slot is here
            ids[:, 0] = -1
        if self.spread == "nobody":
            ids.fill_(-1)
        return ids

    def inputs(self, dtype: torch.dtype) -> Inputs:
        g = self.generator()

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        return Inputs(
            x=normal(self.tokens, self.width),
            gate_up=normal(self.experts, 2 * self.hidden, self.width, scale=self.width**-0.5),
            down=normal(self.experts, self.width, self.hidden, scale=self.hidden**-0.5),
            weights=torch.rand(self.tokens, self.top_k, generator=g, dtype=torch.float64) + 0.05,
            expert_ids=self.expert_ids(),
            gate_up_bias=normal(self.experts, 2 * self.hidden, scale=0.1),
            down_bias=normal(self.experts, self.width, scale=0.1),
        ).to(dtype)


def tile_case(width: int, hidden: int, *counts: int) -> Case:
    """Groups of given sizes, for what stands at the edges of a kernel's tiles."""
    name = "x".join(map(str, (width, hidden))) + "_rows_" + "_".join(map(str, counts))
    return Case(name, sum(counts), width, hidden, len(counts), 1, counts=counts)


CASES = (
    Case("ragged", 61, 24, 40, 8, 3),
    Case("empty_experts", 37, 24, 40, 7, 2, "gaps"),
    Case("no_tokens", 0, 24, 40, 4, 2),
    Case("one_token", 1, 24, 40, 8, 3),
    Case("one_slot", 1, 24, 40, 4, 1),
    Case("one_token_absent", 1, 24, 40, 8, 1, "nobody"),
    Case("one_token_partly_absent", 1, 24, 40, 8, 3, "no_first"),
    Case("two_tokens", 2, 48, 20, 8, 2),
    Case("all_to_one", 33, 16, 24, 5, 1, "one"),
    Case("skew", 130, 40, 24, 16, 2, "skew"),
    Case("every_expert", 19, 24, 12, 4, 4),
    Case("one_expert", 9, 20, 36, 1, 1),
    Case("absent", 45, 28, 20, 8, 3, "absent"),
    Case("nobody", 6, 24, 16, 4, 2, "nobody"),
    Case("repeated", 21, 16, 24, 6, 2, "repeated"),
    Case("narrow", 40, 2, 1, 3, 2),
    Case("many_experts", 60, 40, 24, 48, 5),
    Case("few_slots_absent", 5, 24, 40, 12, 2, "absent"),
    Case("few_slots_one", 17, 24, 16, 18, 1, "one"),
    # Kernels take 16, 64 or 128 rows, 32 to 256 columns and 32 to 128 of the inner dimension at a time.
    tile_case(127, 33, 15, 0, 16, 17, 1),
    tile_case(129, 31, 17, 31, 0, 15),
    tile_case(128, 32, 16, 15, 17),
    tile_case(65, 63, 63, 65, 0, 64),
    tile_case(128, 64, 64, 63, 65),
    tile_case(127, 129, 127, 0, 129, 128),
    tile_case(257, 65, 129, 127),
    tile_case(256, 128, 128, 129),
    tile_case(48, 144, 128, 97),
)
BY_NAME = {case.name: case for case in CASES}

Logits = Literal["normal", "tied", "coarse", "nan_row", "nan_some", "nan_last", "minus_inf", "huge", "low", "vanishing"]
Bias = Literal["none", "negative", "huge", "tied", "mixed", "minus_inf"]


@dataclass(frozen=True)
class RoutingCase:
    name: str
    experts: int = 16
    top_k: int = 4
    logits: Logits = "normal"
    bias: Bias = "none"
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2", "max"] = "top2"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    norm_min: float = 0.0
    tokens: int = 40

    def __str__(self) -> str:
        return self.name

    @property
    def settings(self) -> dict:
        names = ("top_k", "scoring_func", "n_group", "topk_group", "group_score", "norm_topk_prob")
        return {name: getattr(self, name) for name in (*names, "routed_scaling_factor", "norm_min")}

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(logits [T, E], correction bias [E] or None)"""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        logits = torch.randn(self.tokens, self.experts, generator=g)
        if self.logits == "tied":
            logits = torch.zeros_like(logits)
        if self.logits == "coarse":
            logits = logits.round()
        if self.logits == "nan_row":
            logits[::3] = torch.nan
        if self.logits == "nan_some":
            logits[torch.rand(logits.shape, generator=g) < 0.7] = torch.nan
            logits[:, ::2].neg_()  # NaNs of both signs
        if self.logits == "nan_last":
            logits[:, -1] = torch.nan
        if self.logits == "minus_inf":
            logits[torch.rand(logits.shape, generator=g) < 0.8] = -torch.inf
        if self.logits == "huge":
            logits *= 1e4
        if self.logits == "low":  # their exponentials are subnormal
            logits -= 95
        if self.logits == "vanishing":  # their sigmoids are about what is added to their sum
            logits -= 46
        bias = {
            "none": None,
            "negative": -1 - torch.rand(self.experts, generator=g),
            "huge": 5 * torch.randn(self.experts, generator=g),
            "tied": torch.full((self.experts,), 0.25),
            "mixed": 0.3 * torch.randn(self.experts, generator=g),
            "minus_inf": torch.where(torch.arange(self.experts) % 3 == 0, 0.0, -torch.inf),
        }[self.bias]
        return logits.to(dtype), bias


ROUTING_CASES = (
    RoutingCase("plain"),
    RoutingCase("no_tokens", tokens=0, n_group=4, topk_group=2),
    RoutingCase("one_token", tokens=1, experts=256, top_k=8, bias="mixed", n_group=8, topk_group=4),
    RoutingCase("deepseek_v3", experts=256, top_k=8, bias="mixed", n_group=8, topk_group=4, routed_scaling_factor=2.5),
    RoutingCase(
        "deepseek_v2",
        experts=160,
        top_k=6,
        scoring_func="softmax",
        n_group=8,
        topk_group=3,
        group_score="max",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    ),
    RoutingCase("softmax_normalised", scoring_func="softmax"),
    RoutingCase("ernie4_5", experts=64, top_k=6, scoring_func="softmax", bias="mixed", norm_min=1e-12),
    # The bias chooses experts of little score, so that some sums are below the least one.
    RoutingCase("least_sum", scoring_func="softmax", bias="huge", norm_min=0.2, routed_scaling_factor=2.5),
    RoutingCase("least_sum_nan", logits="nan_row", bias="mixed", norm_min=2.0, n_group=4, topk_group=2),
    RoutingCase("negative_bias", bias="negative", n_group=4, topk_group=2),
    RoutingCase("huge_bias", bias="huge", n_group=4, topk_group=2),
    RoutingCase("tied_bias", logits="coarse", bias="tied", n_group=4, topk_group=2),
    RoutingCase("all_tied", logits="tied", n_group=4, topk_group=2),
    RoutingCase("coarse", logits="coarse"),
    RoutingCase("coarse_mixed", logits="coarse", bias="mixed", n_group=8, topk_group=3),
    RoutingCase("nan_rows", logits="nan_row", bias="mixed", n_group=4, topk_group=2),
    RoutingCase("nan_rows_softmax", logits="nan_row", scoring_func="softmax"),
    RoutingCase("few_numbers", logits="nan_some", bias="negative", n_group=4, topk_group=2),
    RoutingCase("minus_inf", logits="minus_inf", n_group=4, topk_group=1),
    RoutingCase("minus_inf_bias", logits="nan_some", bias="minus_inf", n_group=4, topk_group=2),
    RoutingCase("saturated", logits="huge", bias="mixed"),
    RoutingCase("saturated_softmax", logits="huge", scoring_func="softmax"),
    RoutingCase("low_softmax", logits="low", scoring_func="softmax"),
    RoutingCase("vanishing", logits="vanishing", routed_scaling_factor=2.5),
    RoutingCase("every_expert", experts=6, top_k=6, bias="mixed"),
    RoutingCase("one_expert", experts=1, top_k=1),
    RoutingCase("groups_of_one", experts=8, top_k=3, n_group=8, topk_group=5, bias="mixed"),
    RoutingCase("whole_groups", experts=12, top_k=6, n_group=4, topk_group=2, bias="negative"),
    # The last candidate is a NaN with the last index: it still comes before the experts of other groups.
    RoutingCase("whole_groups_nan", experts=12, top_k=6, n_group=4, topk_group=2, logits="nan_last"),
)

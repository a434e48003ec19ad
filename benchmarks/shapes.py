"""Layer shapes to benchmark, the sizes of real models. d is the model's width, n an expert's.

The small cases on which the operators are tested are in tests/support/cases.py.
"""

from dataclasses import dataclass, replace

from benchmarks.harness import BadInput
from moe.presets import preset

LARGEST = 2**31 - 1  # value of any size


@dataclass(frozen=True)
class Shape:
    """An MoE layer: widths d and n, E experts, K experts per token, and the token counts to benchmark.

    `shrunk` marks a registry shape whose widths and token counts were reduced by `shrink`.
    """

    name: str
    d: int
    n: int
    experts: int
    top_k: int
    tokens: tuple[int, ...] = (256, 4096, 32768)
    decode_tokens: tuple[int, ...] = (1, 4, 16, 64)
    shrunk: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """d, n, E, K"""
        return self.d, self.n, self.experts, self.top_k


SONIC = tuple(
    Shape(f"sonic_{d}_{n}_{experts}", d, n, experts, top_k, (tokens,))
    for tokens, d, sizes in (
        (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
        (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    )
    for n, experts, top_k in sizes
)
"""Figure 14 of SonicMoE (arXiv 2512.14080), named by d, n and E."""

MODELS = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_v2_lite": "deepseek_v2_lite",
    "qwen3_30b_a3b": "qwen3_30b_a3b",
    "mixtral_8x7b": "mixtral_8x7b",
    "olmoe": "olmoe_1b_7b",
    "gpt_oss_120b": "gpt_oss_120b",
    "gpt_oss_20b": "gpt_oss_20b",
}
"""Preset of each shape that is a model's."""


def _of_model(name: str) -> Shape:
    config = preset(MODELS[name])
    assert config.moe_intermediate_size is not None
    return Shape(
        name, config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
    )


SHAPES = {shape.name: shape for shape in (*map(_of_model, MODELS), *SONIC)}


def shrink(shape: Shape, by: int = 64) -> Shape:
    """The same experts and proportions, small enough to run on a CPU in milliseconds."""

    def scaled(width: int) -> int:
        return max(16, round(width / by / 16) * 16)  # torch's grouped_mm requires rows of a multiple of 16 bytes

    return replace(shape, d=scaled(shape.d), n=scaled(shape.n), tokens=(33,), decode_tokens=(1, 4), shrunk=True)


def parse_shape(text: str) -> Shape:
    """A registry name, or T,d,n,E,K. Raises BadInput."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 5:
        raise BadInput(f"--shape {text}: unknown shape; expected T,d,n,E,K or one of {', '.join(SHAPES)}")
    try:
        tokens, d, n, experts, top_k = (int(part) for part in parts)
    except ValueError:
        raise BadInput(f"--shape {text}: not five integers; expected T,d,n,E,K") from None
    if not 1 <= min(tokens, d, n, experts, top_k) <= max(tokens, d, n, experts, top_k) <= LARGEST:
        raise BadInput(f"--shape {text}: a size is out of range; expected integers from 1 to {LARGEST}")
    if top_k > experts:
        raise BadInput(f"--shape {text}: K exceeds E; expected at most {experts} experts per token; found {top_k}")
    return Shape(f"{d}x{n}x{experts}x{top_k}", d, n, experts, top_k, (tokens,))

"""The shapes that are timed. Data only; d is the model's width, n an expert's hidden width."""

from dataclasses import dataclass, replace

from benchmarks.harness import BadInput

LARGEST = 2**31 - 1  # of any size


@dataclass(frozen=True)
class Shape:
    """One MoE layer: d, n, E experts of which K for each token, and the token counts that it is timed with."""

    name: str
    d: int
    n: int
    experts: int
    top_k: int
    tokens: tuple[int, ...] = (256, 4096, 32768)
    decode_tokens: tuple[int, ...] = (1, 4, 16, 64)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
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

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("deepseek_v3", 7168, 2048, 256, 8),
        Shape("deepseek_v2_lite", 2048, 1408, 64, 6),
        Shape("qwen3_30b_a3b", 2048, 768, 128, 8),
        Shape("mixtral_8x7b", 4096, 14336, 8, 2),
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("gpt_oss_120b", 2880, 2880, 128, 4),
        Shape("gpt_oss_20b", 2880, 2880, 32, 4),
        *SONIC,
    )
}


def small(shape: Shape, by: int = 64) -> Shape:
    """The same experts and proportions in a size that a CPU goes through in milliseconds."""

    def scaled(width: int) -> int:
        return max(16, round(width / by / 16) * 16)  # multiples of 16: torch's grouped_mm wants rows of whole 16 bytes

    return replace(shape, d=scaled(shape.d), n=scaled(shape.n), tokens=(33,), decode_tokens=(1, 4))


def parse_shape(text: str) -> Shape:
    """A name of the registry, or T,d,n,E,K. Raises BadInput."""
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 5:
        raise BadInput(f"--shape {text}: expected T,d,n,E,K or one of {', '.join(SHAPES)}")
    try:
        tokens, d, n, experts, top_k = (int(part) for part in parts)
    except ValueError:
        raise BadInput(f"--shape {text}: expected five integers T,d,n,E,K") from None
    if not 1 <= min(tokens, d, n, experts, top_k) <= max(tokens, d, n, experts, top_k) <= LARGEST:
        raise BadInput(f"--shape {text}: expected positive sizes up to {LARGEST}")
    if top_k > experts:
        raise BadInput(f"--shape {text}: {top_k} experts for each token, of {experts}")
    return Shape(f"{d}x{n}x{experts}x{top_k}", d, n, experts, top_k, (tokens,))

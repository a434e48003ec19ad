"""Training runs whose GPU hours are published, beside what the model says of them.

`fit` finds the one free number, `Rates.matmul_share`, on DeepSeek-V3; the other runs are compared with it as it is.
What a publication leaves open is assumed, and said in `assumed`.
"""

from dataclasses import dataclass, replace

from moe.planning.cluster.gpus import GPUS
from moe.planning.cluster.settings import Mesh, Rates, Run, Training
from moe.planning.cluster.stages import model_flops
from moe.planning.cluster.step import Step, step
from moe.presets import PRESETS


@dataclass(frozen=True)
class Published:
    """A run: `gpu_hours` for `tokens` tokens, where it stands, and what it does not say."""

    name: str
    run: Run
    gpu: str
    overlap: float
    tokens: float
    gpu_hours: float
    source: str
    assumed: str

    def step(self, rates: Rates) -> Step:
        return step(self.run, GPUS[self.gpu], rates)

    def implied_mfu(self) -> float:
        """Of the published hours, by the model's FLOPs alone."""
        flops = model_flops(self.run.config, self.run.training.sequence) * self.tokens
        return flops / (self.gpu_hours * 3600 * GPUS[self.gpu].bf16 * 1e12)


V3 = Published(
    "DeepSeek-V3",
    Run(
        PRESETS["deepseek_v3"],
        Mesh(gpus=2048, pp=16, ep=64),
        Training(global_batch=15360, schedule="dualpipe", moments="bf16", dispatch="fp8"),
        tokens=4096,
        dtype="fp8",
    ),
    "h800",
    overlap=1.0,
    tokens=14.8e12,
    gpu_hours=2.664e6,
    source="arXiv 2412.19437: tables 1 and 2, sections 3.2, 3.3 and 4.2",
    assumed="one sequence per micro-batch; all-to-all completely hidden, as in the report; the final batch size",
)
OTHERS = (
    Published(
        "DeepSeek-V2",
        Run(
            PRESETS["deepseek_v2"],
            Mesh(gpus=1024, pp=16, ep=8),
            Training(global_batch=9216, schedule="zb1p"),
            tokens=4096,
            dtype="bf16",
        ),
        "h800",
        overlap=0.5,
        tokens=1e12,
        gpu_hours=172.8e3,
        source="arXiv 2405.04434, sections 3.1.2, 3.1.3 and 3.2.3",
        assumed="1,024 GPUs; one sequence per micro-batch; half of communication hidden",
    ),
    Published(
        "dots.llm1",
        Run(
            PRESETS["dots_llm1"],
            Mesh(gpus=1024, pp=16, ep=8),
            Training(sequence=8192, global_batch=8192),
            tokens=8192,
            dtype="bf16",
        ),
        "h800",
        overlap=0.5,
        tokens=11.2e12,
        gpu_hours=1.456e6,
        source="arXiv 2506.05767: 130K GPU hours per trillion tokens",
        assumed="H800, the mesh, the schedule, 64M tokens per batch; half of communication hidden",
    ),
    Published(
        "OLMoE-1B-7B",
        Run(
            PRESETS["olmoe_1b_7b"],
            Mesh(gpus=256),
            Training(global_batch=1024, sharding="fsdp"),
            tokens=16384,
            dtype="bf16",
        ),
        "h100",
        overlap=0.5,
        tokens=5.133e12,
        gpu_hours=256 * 10 * 24,
        source="arXiv 2409.02060: 256 H100 for about 10 days, 5.1T tokens",
        assumed="four sequences per micro-batch, so that a step has one micro-batch; half of communication hidden",
    ),
)


def rates_of(published: Published, matmul_share: float) -> Rates:
    return replace(Rates(), matmul_share=matmul_share, overlap=published.overlap)


def fit(published: Published = V3) -> float:
    """The share of the matmul peak at which the model gives the published hours, by bisection."""
    low, high = 0.01, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = published.step(rates_of(published, middle)).gpu_hours(published.tokens) > published.gpu_hours
        low, high = (middle, high) if slow else (low, middle)
    return low


@dataclass(frozen=True)
class Comparison:
    """GPU hours. `hidden` and `exposed`: modelled with all communication hidden, and with none."""

    published: Published
    hours: float
    hidden: float
    exposed: float
    mfu: float

    @property
    def error(self) -> float:
        """Of the modelled hours, as a share of the published ones."""
        return self.hours / self.published.gpu_hours - 1


def compare(published: Published, matmul_share: float) -> Comparison:
    rates = rates_of(published, matmul_share)
    made = published.step(rates)
    hidden, exposed = (
        published.step(replace(rates, overlap=share)).gpu_hours(published.tokens) for share in (1.0, 0.0)
    )
    return Comparison(published, made.gpu_hours(published.tokens), hidden, exposed, made.mfu)

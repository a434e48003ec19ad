"""Published training runs, compared with the cost model.

`fit` determines the only free parameter, `Rates.matmul_share`, from DeepSeek-V3. The other runs are predicted with it.
Values that a publication does not state are assumed, and listed in `assumed`.
"""

from dataclasses import dataclass, replace

from moe.planning.cluster.gpus import GPUS
from moe.planning.cluster.settings import Mesh, Rates, Run, Training
from moe.planning.cluster.stages import model_flops
from moe.planning.cluster.step import Step, step
from moe.presets import PRESETS


@dataclass(frozen=True)
class PublishedRun:
    """Training run that took `gpu_hours` for `tokens` tokens, with its source and the assumptions made."""

    name: str
    run: Run
    gpu: str
    overlap: float
    tokens: float
    gpu_hours: float
    source: str
    assumed: str

    def step(self, rates: Rates) -> Step:
        """Modelled time of a step."""
        return step(self.run, GPUS[self.gpu], rates)

    def implied_mfu(self) -> float:
        """MFU that the published hours imply, by the model's FLOPs."""
        flops = model_flops(self.run.config, self.run.training.sequence) * self.tokens
        return flops / (self.gpu_hours * 3600 * GPUS[self.gpu].bf16 * 1e12)


V3 = PublishedRun(
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
    assumed="one sequence per micro-batch; all-to-all fully hidden, as the report says; final batch size",
)
OTHERS = (
    PublishedRun(
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
    PublishedRun(
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
    PublishedRun(
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
        assumed="four sequences per micro-batch, one micro-batch per step; half of communication hidden",
    ),
)


def rates_of(published: PublishedRun, matmul_share: float) -> Rates:
    """Rates with the overlap of a run."""
    return replace(Rates(), matmul_share=matmul_share, overlap=published.overlap)


def fit(published: PublishedRun = V3) -> float:
    """Find the `matmul_share` with which the model gives the published hours, by bisection."""
    low, high = 0.01, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = published.step(rates_of(published, middle)).gpu_hours(published.tokens) > published.gpu_hours
        low, high = (middle, high) if slow else (low, middle)
    return low


@dataclass(frozen=True)
class Comparison:
    """Modelled GPU hours and MFU of a run; `hidden` and `exposed` are hours with all, and no, communication hidden."""

    published: PublishedRun
    hours: float
    hidden: float
    exposed: float
    mfu: float

    @property
    def error(self) -> float:
        """Relative error of the modelled hours."""
        return self.hours / self.published.gpu_hours - 1


def compare(published: PublishedRun, matmul_share: float) -> Comparison:
    """Compare the modelled hours of a run with the published ones."""
    rates = rates_of(published, matmul_share)
    made = published.step(rates)
    hidden, exposed = (
        published.step(replace(rates, overlap=share)).gpu_hours(published.tokens) for share in (1.0, 0.0)
    )
    return Comparison(published, made.gpu_hours(published.tokens), hidden, exposed, made.mfu)

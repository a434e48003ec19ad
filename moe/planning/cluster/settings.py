"""Settings of a training run on a cluster, and the assumptions of the cost model."""

from dataclasses import dataclass
from typing import Literal

from moe.config import ModelConfig
from moe.errors import ConfigError

Precision = Literal["fp8", "bf16"]


@dataclass(frozen=True)
class Mesh:
    """Mesh of gpus = pp x dp ranks, in which `ep` consecutive ranks of a stage divide the experts of a layer.

    The ranks of a stage are consecutive, so such an expert group spans max(1, ep / gpus_per_node) nodes.
    """

    gpus: int
    pp: int = 1
    ep: int = 1
    gpus_per_node: int = 8

    @property
    def dp(self) -> int:
        """Number of data-parallel ranks of a stage."""
        return self.gpus // self.pp

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks of an expert group on one node."""
        return min(self.ep, self.gpus_per_node)

    def check(self, config: ModelConfig) -> None:
        """Raise `ConfigError` if the numbers of the mesh do not fit together."""
        for name in ("gpus", "pp", "ep", "gpus_per_node"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "a positive integer")
        _require("pp", self.pp, self.gpus % self.pp == 0, f"a divisor of the {self.gpus} GPUs")
        blocks = config.num_hidden_layers + config.num_nextn_predict_layers
        _require("pp", self.pp, self.pp <= blocks, f"at most the {blocks} blocks of the model, MTP included")
        experts = config.n_routed_experts
        _require("ep", self.ep, experts > 0 or self.ep == 1, "1 for a model without experts")
        _require("ep", self.ep, self.ep <= max(experts, 1), f"at most the {experts} experts of a layer")
        _require("ep", self.ep, experts % self.ep == 0, f"a divisor of the {experts} experts of a layer")
        ranks = f"a divisor of the {self.dp} data-parallel ranks ({self.gpus} GPUs / {self.pp} stages)"
        _require("ep", self.ep, self.dp % self.ep == 0, ranks)
        node = self.gpus_per_node
        aligned = self.ep % node == 0 or node % self.ep == 0
        _require("ep", self.ep, aligned, f"a divisor or multiple of the {node} GPUs of a node")
        whole = self.dp % node == 0 or node % self.dp == 0
        _require("gpus_per_node", node, whole, f"a divisor or multiple of the {self.dp} data-parallel ranks")


@dataclass(frozen=True)
class Training:
    """Layout of the training run."""

    sequence: int = 4096
    """Sequence length in tokens; attention is causal over the whole sequence."""
    global_batch: int = 15360
    """Sequences per optimizer step."""
    schedule: Literal["1f1b", "zb1p", "dualpipe"] = "1f1b"
    """Pipeline schedule; bubbles and copies of parameters are those of table 2 of the DeepSeek-V3 report."""
    sharding: Literal["zero1", "fsdp"] = "zero1"
    """Sharding over data-parallel ranks. zero1: optimizer state; fsdp: also parameters and gradients."""
    recompute: Literal["none", "selective", "full"] = "selective"
    """Recomputation in the backward pass. selective: norms, SwiGLU and MLA's up-projections; full: whole blocks."""
    moments: Literal["bf16", "fp32"] = "fp32"
    """Dtype of AdamW's moments; master weights and gradients are fp32."""
    dispatch: Precision = "bf16"
    """Dtype of tokens on their way to experts; fp8 adds an fp32 scale per 128 values. Tokens return in bf16."""
    transport: Literal["node", "rank"] = "node"
    """Path of dispatched tokens. node: one copy per node over the network, forwarded over NVLink; rank: one copy per
    rank over the network."""


@dataclass(frozen=True)
class Rates:
    """Fractions of the GPU's rates that are reached."""

    matmul_share: float = 0.2455
    """Fraction of peak reached by matrix products.
    Fitted (--published), so it absorbs everything not modelled separately."""
    attention_share: float = 0.5
    """Fraction of the bf16 peak reached by causal attention (FlashAttention-3 on an H100: 0.4 to 0.6)."""
    link_share: float = 0.8
    """Fraction of NVLink and network bandwidth reached (DeepSeek-V3 report: 160 of 200 GB/s of NVLink)."""
    overlap: float = 0.5
    """Fraction of communication hidden behind computation."""
    latency_us: float = 20.0
    """Latency of one all-to-all in microseconds."""

    def check(self) -> None:
        for name in ("matmul_share", "attention_share", "link_share"):
            _require(name, getattr(self, name), 0 < getattr(self, name) <= 1, "a fraction above 0, at most 1")
        _require("overlap", self.overlap, 0 <= self.overlap <= 1, "a fraction from 0 to 1")
        _require("latency_us", self.latency_us, 0 <= self.latency_us < float("inf"), "a finite number of at least 0")


@dataclass(frozen=True)
class Run:
    """Training run of a model on a mesh: `tokens` per GPU and micro-batch; `dtype` of the matrix products."""

    config: ModelConfig
    mesh: Mesh
    training: Training
    tokens: int
    dtype: Precision

    def __post_init__(self) -> None:
        self.mesh.check(self.config)
        training = self.training
        for name in ("sequence", "global_batch"):
            _require(name, getattr(training, name), getattr(training, name) >= 1, "a positive integer")
        whole = self.tokens >= 1 and self.tokens % training.sequence == 0
        _require("tokens", self.tokens, whole, f"a multiple of the {training.sequence} tokens of a sequence")
        each = self.mesh.dp * self.tokens // training.sequence
        batch = f"a multiple of the {each} sequences that the {self.mesh.dp} data-parallel ranks run at a time"
        _require("global_batch", training.global_batch, training.global_batch % each == 0, batch)
        if self.folded:
            _require("pp", self.mesh.pp, self.mesh.pp % 2 == 0, "an even number of stages for dualpipe")
            even = f"an even number of micro-batches for dualpipe; it makes {self.micro_batches}"
            _require("global_batch", training.global_batch, self.micro_batches % 2 == 0, even)

    @property
    def folded(self) -> bool:
        """Whether each rank holds two stages, one from either end of the pipeline."""
        return self.training.schedule == "dualpipe"

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of each pipeline in a step."""
        return self.training.global_batch * self.training.sequence // (self.mesh.dp * self.tokens)

    @property
    def step_tokens(self) -> int:
        """Number of tokens in an optimizer step."""
        return self.training.global_batch * self.training.sequence


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(name, value, allowed)

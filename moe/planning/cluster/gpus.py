"""Data of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Specification of a GPU by its vendor, without sparsity.

    Attributes:
        memory: GiB.
        bf16, fp8: rates of dense matrix products, TFLOP/s; None if not supported.
        bandwidth: memory bandwidth, GB/s.
        nvlink: NVLink bandwidth to all GPUs of the node together, GB/s per direction.
        network: network bandwidth per GPU, GB/s per direction.
    """

    memory: float
    bf16: float
    fp8: float | None
    bandwidth: float
    nvlink: float
    network: float


# Data sheets give HBM in GB but mean GiB. Those of Hopper and Blackwell give FLOP/s with sparsity, which are halved
# here. The network is that of the vendor's 8-GPU system, if it has one.
GPUS = {
    # NVIDIA A100 80GB SXM data sheet, 2021: NVLink 600 GB/s both ways. DGX A100: one 200 Gb/s adapter per GPU.
    "a100": Gpu(memory=80, bf16=312, fp8=None, bandwidth=2039, nvlink=300, network=25),
    # NVIDIA H100 SXM data sheet: NVLink 900 GB/s both ways. DGX H100: one 400 Gb/s adapter per GPU.
    "h100": Gpu(memory=80, bf16=989.4, fp8=1978.9, bandwidth=3350, nvlink=450, network=50),
    # An H100 SXM with NVLink cut to 400 GB/s both ways. Eight 400 Gb/s adapters per node: arXiv 2505.09343, section 4.
    "h800": Gpu(memory=80, bf16=989.4, fp8=1978.9, bandwidth=3350, nvlink=200, network=50),
    # NVIDIA H200 SXM data sheet; network of DGX H200 as in DGX H100.
    "h200": Gpu(memory=141, bf16=989.4, fp8=1978.9, bandwidth=4800, nvlink=450, network=50),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity, 14.4 TB/s NVLink
    # both ways, 400 Gb/s adapters.
    "b200": Gpu(memory=180, bf16=2250, fp8=4500, bandwidth=8000, nvlink=900, network=50),
    # AMD Instinct MI300X data sheet: seven links of 128 GB/s both ways. Assumes a 400 Gb/s adapter.
    "mi300x": Gpu(memory=192, bf16=1307.4, fp8=2614.9, bandwidth=5300, nvlink=448, network=50),
}

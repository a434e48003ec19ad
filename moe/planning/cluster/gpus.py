"""GPUs of a cluster, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What the vendor states, without sparsity.

    memory: GiB. bf16, fp8: 10^12 FLOP/s of dense matrix products; None where there are no such units. bandwidth: of the
    memory, 10^9 bytes/s. nvlink: to the GPUs of its node together, network: its share of the node's adapters to other
    nodes; both 10^9 bytes/s in one direction.
    """

    memory: float
    bf16: float
    fp8: float | None
    bandwidth: float
    nvlink: float
    network: float


# The GB of HBM in a data sheet are GiB. Data sheets of Hopper and Blackwell print FLOP/s with sparsity: halved here.
# The network is that of the vendor's own 8-GPU system where it has one.
GPUS = {
    # NVIDIA A100 80GB SXM data sheet, 2021: NVLink 600 GB/s both ways. DGX A100: one 200 Gb/s adapter a GPU.
    "a100": Gpu(memory=80, bf16=312, fp8=None, bandwidth=2039, nvlink=300, network=25),
    # NVIDIA H100 SXM data sheet: NVLink 900 GB/s both ways. DGX H100: one 400 Gb/s adapter a GPU.
    "h100": Gpu(memory=80, bf16=989.4, fp8=1978.9, bandwidth=3350, nvlink=450, network=50),
    # An H100 SXM with NVLink cut to 400 GB/s both ways. Eight 400 Gb/s adapters a node: arXiv 2505.09343, section 4.
    "h800": Gpu(memory=80, bf16=989.4, fp8=1978.9, bandwidth=3350, nvlink=200, network=50),
    # NVIDIA H200 SXM data sheet; DGX H200 as DGX H100.
    "h200": Gpu(memory=141, bf16=989.4, fp8=1978.9, bandwidth=4800, nvlink=450, network=50),
    # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB, 64 TB/s, 72 PFLOP/s FP8 with sparsity, 14.4 TB/s NVLink
    # both ways, 400 Gb/s adapters.
    "b200": Gpu(memory=180, bf16=2250, fp8=4500, bandwidth=8000, nvlink=900, network=50),
    # AMD Instinct MI300X data sheet: seven links of 128 GB/s both ways. The adapter is the usual 400 Gb/s.
    "mi300x": Gpu(memory=192, bf16=1307.4, fp8=2614.9, bandwidth=5300, nvlink=448, network=50),
}

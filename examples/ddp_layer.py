"""An MoE layer in your own DistributedDataParallel trainer: two processes on the CPU, over gloo.

    torchrun --standalone --nproc-per-node 2 examples/ddp_layer.py

Each rank trains on its own data. DDP averages the gradients, and `attach(..., group=...)` sums the expert counts over
the group, so the correction biases stay equal on all ranks. Nothing is written.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moe

WIDTH, EXPERTS, STEPS = 32, 8, 40


class Block(nn.Module):
    """A stand-in for your model: any module that contains a MoELayer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = moe.MoELayer(WIDTH, 64, n_routed_experts=EXPERTS, num_experts_per_tok=2, aux_loss_alpha=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    block = Block()
    target = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    model = DistributedDataParallel(block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = moe.balance.attach(model, optimizer, group=dist.group.WORLD)

    data = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 32, WIDTH, generator=data)  # [B, S, D]
        loss = (model(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0:
            tokens = next(iter(handle.loads(reset=True).values()))
            print(f"step {step}: loss {loss.item():.3f}, tokens per expert on all ranks {tokens.tolist()}")

    biases: list[Tensor] = [torch.empty(EXPERTS) for _ in range(dist.get_world_size())]
    dist.all_gather(biases, block.moe.gate.e_score_correction_bias)
    assert all(bias.equal(biases[0]) for bias in biases)
    dist.barrier()  # Python must not exit while a thread of gloo still frees the tensors of the last collective
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

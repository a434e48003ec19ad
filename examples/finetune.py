"""Load a checkpoint, fine-tune it on a text file and save it.

    python examples/finetune.py CHECKPOINT --text notes.txt --out finetuned

CHECKPOINT is a Hugging Face folder with a tokenizer.json, for example runs/tiny/checkpoint after `moesmith train`.
Only --out is written. `moesmith train --init CHECKPOINT` does the same with validation, logs and resuming.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import moe
from moe.train.batches import BatchTrainer


def batches(ids: Tensor, batch_size: int, length: int) -> Iterator[Tensor]:
    """Yield token ids [batch_size, length] from random positions of `ids`, endlessly."""
    while True:
        starts = torch.randint(len(ids) - length + 1, (batch_size,)).tolist()
        yield torch.stack([ids[start : start + length] for start in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a checkpoint on a text file.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = moe.load(args.checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(args.text.read_text()).ids)

    length = min(128, len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    trainer = BatchTrainer(model, batches(ids, 4, length), optimizer, accumulation=2)
    for report in itertools.islice(trainer, args.steps):
        print(f"step {report.step}: loss {report.loss:.3f}, gradient norm {report.grad_norm:.2f}")
    moe.save(model, args.out)  # the tokenizer and other files of the checkpoint are copied
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()

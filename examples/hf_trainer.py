"""Train a moe.Transformer with the Trainer of Hugging Face transformers.

    pip install -e ".[trainers]"  # the Trainer requires accelerate
    python examples/hf_trainer.py --out hf_run

BalanceCallback updates the correction biases, scales the balance losses as the Trainer scales its own loss, and adds
MaxVio (the largest load of an expert, relative to the mean, minus 1) and the number of dead experts to the logs. Only
--out is written; `AutoModelForCausalLM.from_pretrained` can load the folder `checkpoint` in it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import moe
from moe.integrations.transformers import BalanceCallback


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small model with transformers' Trainer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = moe.Transformer(moe.preset("tiny"))
    ids = torch.randint(1000, (64, 32))  # your tokens; every example has input_ids and labels
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(
        str(args.out / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, settings, train_dataset=data, callbacks=[BalanceCallback()]).train()
    model.save(args.out / "checkpoint")


if __name__ == "__main__":
    main()

"""Train a moe.Transformer with TRL on the Countdown game: SFTTrainer on solutions, then GRPOTrainer on accuracy.

    pip install -e ".[trainers]"  # TRL
    python examples/trl_countdown.py --out countdown_trl

ReplayCallback gives each token the experts in training that it had when it was generated. Only --out is written;
`moe.load` reads the folder `trained` in it. A few steps show that all parts work; learning the game takes more.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore

import moe
from moe.integrations.trl import ReplayCallback
from moe.recipes.countdown import Problem, generate, score, solve
from moe.train.tokenizer import END_OF_TEXT, train_tokenizer


def row(problem: Problem) -> dict[str, Any]:
    text = f" <think></think> <answer>{solve(problem)}</answer>"
    return {"prompt": problem.prompt, "completion": text, "numbers": problem.numbers, "target": problem.target}


def reward(numbers: list[list[int]], target: list[int], completions: list[str], **_: Any) -> Any:
    scores = [score(Problem(tuple(n), t), text) for n, t, text in zip(numbers, target, completions, strict=True)]
    return [each.accuracy + 0.1 * each.format for each in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small MoE with TRL.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    rows = [row(problem) for problem in generate(256, seed=0, split="train")]
    words = train_tokenizer((each["prompt"] + each["completion"] for each in rows), 400)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    moe.save(moe.Transformer(moe.preset("tiny")), args.out / "base")
    tokenizer.save_pretrained(args.out / "base")

    moe.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(args.out / "base", experts_implementation="moesmith")
    settings: Any = dict(max_steps=args.steps, learning_rate=1e-3, logging_steps=1, use_cpu=True, bf16=False)
    settings |= dict(save_strategy="no", report_to=[], disable_tqdm=True, per_device_train_batch_size=8)
    shared: Any = dict(train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[ReplayCallback()])
    SFTTrainer(model, args=SFTConfig(str(args.out / "sft"), **settings), **shared).train()
    settings |= dict(num_generations=8, num_iterations=2, max_completion_length=48)
    trainer = GRPOTrainer(model, reward, args=GRPOConfig(str(args.out / "grpo"), **settings), **shared)
    trainer.train()
    trainer.save_model(str(args.out / "trained"))
    for entry in trainer.state.log_history[:-1]:
        print({name: entry[name] for name in ("moe_recorded", "moe_router_agreement", "moe_max_vio")})


if __name__ == "__main__":
    main()

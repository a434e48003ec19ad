"""Completions as text, and their scores in a task."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from moe.model import Transformer
from moe.recipes.rollout import Rollout, rollout
from moe.recipes.task import Task


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the token ids of a prompt, those of `moesmith generate` and `moesmith sft`."""
    return tokenizer.encode(prompt).ids


def complete(
    model: Transformer,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    end_of_text: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Rollout]:
    """Complete each prompt once, `batch_size` at a time, without recording the routing.

    A temperature of 0 selects the most likely tokens. Raises ConfigError and FloatingPointError as `rollout` does.
    """
    return [
        rollout(
            model,
            [encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + batch_size]],
            max_new_tokens=max_new_tokens,
            end_of_text=(end_of_text,),
            temperature=temperature,
            seed=(seed,),
            first_prompt=start,
            record=False,
        )
        for start in range(0, len(prompts), batch_size)
    ]


def score_completions(
    task: Task, prompts: Sequence[str], batches: Sequence[Rollout], tokenizer: Tokenizer
) -> dict[str, list[float]]:
    """Score completions of `prompts`, which has one prompt for each of them. Uses no model.

    Returns:
        lists of numbers: "reward", its parts, "length" (sampled tokens), "ended" (1 with an end-of-text token).

    Raises ConfigError for an error in the task's reward.
    """
    texts = [
        text for batch in batches for text in tokenizer.decode_batch(batch.completions(), skip_special_tokens=False)
    ]
    scores = [task.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    found = {name: [score[name] for score in scores] for name in (*task.weights, "reward")}
    found["length"] = [length for batch in batches for length in batch.lengths.double().tolist()]
    found["ended"] = [ended for batch in batches for ended in batch.ended.double().tolist()]
    return found

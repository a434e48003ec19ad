"""Routing as the experts of a transformers model see it, per token: independent of routers and of padding."""

from typing import Any

import torch
from torch import Tensor, nn

Text = tuple[int, ...]  # a token and those before it


class Seen:
    """Expert ids of each token, by layer and text, in passes with a KV cache and in others.

    Attributes:
        generated: (layer, text) -> ids of every time that a model in training mode processed it with a cache, since the
            last pass without.
        trained: (layer, text, ids, whether it is the last of its row) of each real token of passes without cache.
        wrong: layer and text of those of a model in training mode whose ids are not among the generated ones.
    """

    def __init__(self, model: Any) -> None:
        self.generated: dict[tuple[str, Text], list[Text]] = {}
        self.trained: list[tuple[str, Text, Text, bool]] = []
        self.wrong: list[tuple[str, Text]] = []
        self._rows: list[Text] = []
        self._texts: list[tuple[Text, bool] | None] = []
        self._cached = self._now_cached = self._training = False
        model.base_model.register_forward_pre_hook(self._tokens, with_kwargs=True)
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda _, args, name=name: self._ids(name, args[1]))

    def _tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens, mask = kwargs["input_ids"], kwargs["attention_mask"]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        cached, mask = cache is not None, torch.ones_like(tokens) if mask is None else mask
        self._training, self._now_cached = module.training, cached
        if self._training:
            if cached and not self._cached:
                self.generated = {}
            self._cached = cached
        if cache is None or cache.get_seq_length() == 0:
            self._rows = [()] * len(tokens)
        self._texts = []
        for row, (new, real) in enumerate(zip(tokens.tolist(), mask[:, -tokens.shape[1] :].tolist(), strict=True)):
            count = sum(real)
            for token, here in zip(new, real, strict=True):
                self._rows[row] += (token,) * here
                count -= here
                self._texts.append((self._rows[row], count == 0) if here else None)

    def _ids(self, layer: str, ids: Tensor) -> None:
        for text, chosen in zip(self._texts, ids.tolist(), strict=True):
            if text is None or (self._now_cached and not self._training):
                continue
            if self._now_cached:
                self.generated.setdefault((layer, text[0]), []).append(tuple(chosen))
            else:
                self.trained.append((layer, text[0], tuple(chosen), text[1]))
                if self._training and not text[1] and tuple(chosen) not in self.generated.get((layer, text[0]), []):
                    self.wrong.append((layer, text[0]))

"""Cache of earlier tokens for attention: keys and values, or the latents of MLA."""

from collections.abc import Callable, Hashable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from moe.config import ModelConfig

_Made = TypeVar("_Made")


class LayerCache:
    """Cache of one layer: growing tensors [B, capacity, ...], uninitialised past the length of the cache."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.entries: list[Tensor] = []
        self.made: tuple[Hashable, Any] | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Return an empty cache for an attention layer of this model."""
        if config.kv_lora_rank is not None:
            return cls([(config.kv_lora_rank + config.rope_dim,)])
        return cls([(config.num_key_value_heads or config.num_attention_heads, config.qk_head_dim)] * 2)

    def append(self, start: int, *new: Tensor) -> list[Tensor]:
        """Write `new` (each [B, S, ...]) at rows start to start + S; return views of rows 0 to start + S.

        Raises ValueError if B differs from that of the rows before `start`.
        """
        end = start + new[0].shape[1]
        if start == 0:
            self.made = None
        if self.entries and self.entries[0].shape[0] != new[0].shape[0]:
            if start:
                raise ValueError(f"the cache holds {self.entries[0].shape[0]} sequences: found {new[0].shape[0]}")
            self.entries = []
        if not self.entries or end > self.entries[0].shape[1]:
            capacity = max(end, 2 * start, 64)
            grown = [n.new_empty(n.shape[0], capacity, *shape) for n, shape in zip(new, self.shapes, strict=True)]
            for old, fresh in zip(self.entries, grown, strict=False):
                fresh[:, :start] = old[:, :start]
            self.entries = grown
        for entry, n in zip(self.entries, new, strict=True):
            entry[:, start:end] = n
        return [entry[:, :end] for entry in self.entries]

    def select(self, rows: Tensor) -> None:
        """Keep only the sequences `rows`, in that order."""
        self.entries = [torch.index_select(entry, 0, rows) for entry in self.entries]

    def memoize(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Return `make()`, computed once per key until the cache is emptied; for values that depend on weights only."""
        if self.made is None or self.made[0] != key:
            self.made = key, make()
        return self.made[1]


class Cache:
    """Cache of a whole model, filled and advanced by `Transformer.forward(cache=...)`.

    An MLA layer keeps C + qk_rope_head_dim values per token (normalised latent, rotated shared key); a grouped-query
    layer keeps keys and values, num_key_value_heads * head_dim each. Storage grows by doubling. `length` is the number
    of tokens in the cache, padding included.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.layers = [LayerCache.of(config) for _ in range(config.num_hidden_layers)]
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes used by the cached tokens, without unused capacity."""
        rows = (e[:, : self.length] for layer in self.layers for e in layer.entries)
        return sum(r.numel() * r.element_size() for r in rows)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length = {length}: expected 0 to {self.length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep only the sequences `rows` (int64 indices into the batch), in that order."""
        for layer in self.layers:
            layer.select(rows)

    def advance(self, length: int) -> None:
        """Add `length` tokens, already appended by every layer, to the length."""
        self.length += length

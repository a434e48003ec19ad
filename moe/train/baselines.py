"""Unigram and bigram baselines, scored on the same tokens as a trained model.

The first token of `validation` is context only. All others are scored, or those where `scored` [len - 1] is True. Bits
per byte divide the summed nats by ln 2 and by the bytes of text of the scored tokens, so they are comparable across
vocabularies. With `moesmith train --document-mask` the first token of each document is not scored.
"""

import math

import numpy as np

CHUNK = 2**24  # tokens counted at a time


def bits_per_byte(total_nats: float, text_bytes: int) -> float:
    return total_nats / math.log(2) / text_bytes


def unigram_nats(
    train: np.ndarray, validation: np.ndarray, vocab_size: int, scored: np.ndarray | slice = slice(None)
) -> float:
    """Sum -ln p over validation[1:], with p(b) = (c(b) + U / V) / (N + U).

    c counts the N tokens train[1:], and U is the number of distinct ones (Witten-Bell over the uniform model).
    """
    return float(-np.log(_unigram(train, vocab_size)[validation[1:][scored]]).sum())


def bigram_nats(
    train: np.ndarray, validation: np.ndarray, vocab_size: int, scored: np.ndarray | slice = slice(None)
) -> float:
    """Sum -ln p over validation[1:], with p(b | a) = (c(a, b) + U(a) p(b)) / (c(a) + U(a)), p(b) as in `unigram_nats`.

    U(a) is the number of distinct tokens after a in training (interpolated Witten-Bell); if it is 0, p(b | a) = p(b).
    """
    unigram = _unigram(train, vocab_size)
    pairs, counts = _count_pairs(train, vocab_size)
    first = pairs // vocab_size
    total = np.bincount(first, weights=counts, minlength=vocab_size)
    followers = np.bincount(first, minlength=vocab_size)

    wanted = _pair_keys(validation, vocab_size)
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    a, b = validation[:-1], validation[1:]
    seen = total[a] > 0
    denominator = np.where(seen, total[a] + followers[a], 1)
    p = np.where(seen, (count + followers[a] * unigram[b]) / denominator, unigram[b])
    return float(-np.log(p[scored]).sum())


def _unigram(train: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(1, len(train), CHUNK):
        counts += np.bincount(train[start : start + CHUNK], minlength=vocab_size)
    distinct = np.count_nonzero(counts)
    return (counts + distinct / vocab_size) / (counts.sum() + distinct)


def _count_pairs(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct pairs of adjacent tokens and their counts. One chunk of tokens is in memory."""
    pairs = counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens) - 1, CHUNK):
        found, times = np.unique(_pair_keys(tokens[start : start + CHUNK + 1], vocab_size), return_counts=True)
        known, (pairs, places) = len(pairs), np.unique(np.concatenate((pairs, found)), return_inverse=True)
        before, counts = counts, np.zeros(len(pairs), dtype=np.int64)
        counts[places[:known]] = before
        counts[places[known:]] += times
    return pairs, counts


def _pair_keys(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]

"""PNG plots of a run. The only part of the package that needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

WIDTH_INCHES = 8.0
DPI = 120


def plot_loss(
    file: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], baselines: dict[str, float]
) -> None:
    """Training and validation loss over steps, with a line for each baseline, all in nats per token."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in train], [r["ce"] for r in train], linewidth=0.8, label="training")
    steps = [r["step"] for r in validation]
    axes.plot(steps, [r["nats_per_token"] for r in validation], "o-", label="validation")
    for style, (name, nats) in zip(("--", ":"), baselines.items(), strict=True):
        axes.axhline(nats, color="gray", linestyle=style, label=f"{name}, validation")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)")
    axes.legend()
    figure.savefig(file, dpi=DPI)


def plot_load(file: Path, layers: list[str], load: np.ndarray) -> None:
    """Heat map of each expert's load [L, E], as a multiple of its layer's mean."""
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.4 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    relative = load / load.mean(axis=1, keepdims=True)
    image = axes.imshow(relative, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    axes.set(xlabel="expert", title="expert load on the validation text, 1 = even")
    axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=DPI)

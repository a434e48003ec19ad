"""PNG plots of a run. The only part of the package that needs matplotlib."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.trace import Trace, co_activation, predicted_pairs

DPI = 120
SMOOTHED_SHARE = 0.04  # of the steps, over which noisy lines are averaged
MOST_RELATIVE_LOAD = 2.0  # at the end of the colour scale
MOST_TALL_ROWS = 16
MOST_COLUMNS_WITH_VALUES = 24  # experts in 8 inches: four digits of 6 points in each cell
MOST_PAIRS_WITH_VALUES = 10  # experts in 2.6 inches
MOST_BARS_WITH_VALUES = 12
MOST_LIFT_EXPONENT = 3  # at the end of the colour scale
MOST_MAPS = 6
LEAST_PREDICTED = 5  # tokens; below, chance alone decides whether a pair occurs


def plot_run(
    folder: Path,
    title: str,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    baselines: dict[str, float],
    layers: Sequence[str],
    load: np.ndarray,
) -> list[Path]:
    """Write loss.png and, if there are layers with experts, load.png; returns the files.

    Args:
        title: names the run; long ones are wrapped.
        train, validation: records of metrics.jsonl.
        baselines: validation loss of simple models, in nats per token.
        load: tokens of the validation text that chose each expert, integers [layers, E].
    """
    files = [folder / "loss.png"]
    plot_loss(title, train, validation, baselines).savefig(files[0], dpi=DPI)
    if len(layers):
        files.append(folder / "load.png")
        plot_load(title, layers, load).savefig(files[1], dpi=DPI)
    return files


def _wrapped(figure: Figure, *paragraphs: str) -> str:
    """Break paragraphs of 10 points into lines that the figure is wide enough for, whatever their letters."""
    return "\n".join(textwrap.fill(text, int(10 * figure.get_figwidth())) for text in paragraphs)


def plot_loss(
    title: str,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    baselines: dict[str, float],
) -> Figure:
    """Loss, MaxVio (if there are layers with experts) and learning rate over steps."""
    steps = [r["step"] for r in train]
    balance = [r["max_vio"] for r in train]
    panels = [(3.0, "cross entropy\n(nats per token)"), (1.0, "learning rate")]
    if any(balance):
        panels.insert(1, (1.2, "MaxVio\n(max / mean - 1)"))
    figure = Figure(figsize=(8.0, 3.2 + 1.3 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=[height for height, _ in panels])
    for axes, (_, label) in zip(all_axes, panels, strict=True):
        axes.set_ylabel(label, fontsize=9)
        axes.grid(alpha=0.3)
    figure.suptitle(_wrapped(figure, title), fontsize=10)
    figure.align_ylabels()

    loss = all_axes[0]
    _noisy_line(loss, steps, [r["ce"] for r in train], "training", "C0", digits=3)
    if validation:
        nats = [r["nats_per_token"] for r in validation]
        label = f"validation, at the end: {nats[-1]:.3f}"
        loss.plot([r["step"] for r in validation], nats, "o-", color="C1", markersize=4, label=label)
    for style, (name, nats) in zip(("--", ":"), baselines.items(), strict=False):
        loss.axhline(nats, color="gray", linestyle=style, label=f"{name} model, validation: {nats:.3f}")
    loss.legend(fontsize=8)
    if any(balance):
        _noisy_line(all_axes[1], steps, [max(row, default=np.nan) for row in balance], "worst layer", "C3", digits=2)
        all_axes[1].legend(fontsize=8)
    rates = [r["lr"] for r in train]
    all_axes[-1].plot(steps, rates, _mark(rates), color="C2")
    all_axes[-1].set_ylim(bottom=0)
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_policy(
    title: str, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], parts: Sequence[str]
) -> Figure:
    """Reward and its parts, length and entropy, and the difference between sampling and training, over steps.

    Args:
        title: names the run; long ones are wrapped.
        train, validation: records of metrics.jsonl of a run of `moesmith grpo`.
        parts: names of the parts of the reward.
    """
    steps = [r["step"] for r in train]
    panels = [
        ("reward", [*dict.fromkeys((*parts, "reward"))], 3),
        ("length (tokens)", ["length"], 1),
        ("entropy (nats/token)", ["entropy"], 3),
        ("largest difference\nof log-probabilities", ["logprob_difference"], 7),
        ("equal expert ids", ["router_agreement"], 5),
    ]
    figure = Figure(figsize=(8.0, 11.0), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=[2.6, 1, 1, 1, 1])
    figure.suptitle(_wrapped(figure, title), fontsize=10)
    for axes, (label, names, digits) in zip(all_axes, panels, strict=True):
        axes.set_ylabel(label, fontsize=9)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        for number, name in enumerate(names):
            values = [np.nan if r[name] is None else r[name] for r in train]
            if values:
                _noisy_line(axes, steps, values, f"{name.replace('_', ' ')}, sampled", f"C{number}", digits=digits)
            if held_out := [r[name] for r in validation if name in r]:
                text = f"{name}, held out, at the end: {held_out[-1]:.{digits}f}"
                axes.plot([r["step"] for r in validation], held_out, "o-", color=f"C{number}", markersize=4, label=text)
        if axes.lines:
            axes.legend(fontsize=8)
    if any(r["logprob_difference"] for r in train):
        all_axes[3].set_yscale("log")
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return figure


def plot_accuracy(
    title: str, curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], levels: Mapping[str, float]
) -> Figure:
    """Accuracy over steps: a line per run and, thicker, the mean of the runs of each name.

    Args:
        title: long ones are wrapped.
        curves: name -> runs, each a list of (step, accuracy); runs of one name have the same steps.
        levels: name -> accuracy, drawn as a dashed line.
    """
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(_wrapped(figure, title), fontsize=10)
    for number, (name, runs) in enumerate(curves.items()):
        steps = [step for step, _ in runs[0]]
        values = np.array([[value for _, value in run] for run in runs])
        for run in values if len(runs) > 1 else ():
            axes.plot(steps, run, color=f"C{number}", alpha=0.35, linewidth=1)
        mean = values.mean(axis=0)
        label = f"{name}: {mean[0]:.3f} to {mean[-1]:.3f}" + (f", mean of {len(runs)} runs" if len(runs) > 1 else "")
        axes.plot(steps, mean, "o-", color=f"C{number}", markersize=4, label=label)
    for number, (name, value) in enumerate(levels.items(), start=len(curves)):
        axes.axhline(value, color=f"C{number}", linestyle="--", label=f"{name}: {value:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (fraction right)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_load(
    title: str, layers: Sequence[str], load: np.ndarray, text: str = "load of experts on the validation text"
) -> Figure:
    """Heat map of the load of each expert, integers [layers, E], as a multiple of its layer's mean.

    Experts without tokens are black. Values are written into the cells of at most `MOST_COLUMNS_WITH_VALUES` experts.
    """
    rows, experts = load.shape
    mean = load.mean(axis=1, keepdims=True)
    relative = np.divide(load, mean, out=np.full(load.shape, np.nan), where=mean > 0)
    row = 0.32 if rows <= MOST_TALL_ROWS else 0.16  # inches
    height = row * max(rows, 4)
    figure = Figure(figsize=(float(np.clip(1.8 + experts / 30, 8.0, 20.0)), 1.3 + height), layout="constrained")
    axes = figure.add_subplot()
    # Every load but zero is above `vmin`, so that only experts without tokens get the colour below the scale.
    image = axes.imshow(
        relative,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["coolwarm"].with_extremes(under="black", over="gold", bad="lightgray"),
        vmin=float(np.finfo(np.float32).tiny),
        vmax=MOST_RELATIVE_LOAD,
    )
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(_wrapped(figure, title, f"{text}; black: no tokens"), fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(rows), layers, fontsize=8 if rows <= MOST_TALL_ROWS else 7)
    extend = _extend(below=(relative == 0).any(), above=(relative > MOST_RELATIVE_LOAD).any())
    bar = figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.12 / height, aspect=height / 0.16, pad=0.01)
    bar.set_label("load / layer's mean", fontsize=9)
    bar.set_ticks([0, 0.5, 1, 1.5, 2])
    if experts <= MOST_COLUMNS_WITH_VALUES:
        for (y, x), value in np.ndenumerate(relative):
            if not np.isnan(value):
                color = "white" if value == 0 or 0.7 < abs(value - 1) <= 1 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    return figure


def plot_trace(folder: Path, title: str, trace: Trace) -> list[Path]:
    """Write load.png, balance.png and, if tokens choose several experts, co-activation.png; returns the files."""
    layers = trace.layers.tolist()
    figures = {"load": plot_load(title, layers, trace.load.load.numpy(), "load of experts")}
    figures["balance"] = plot_balance(title, trace)
    if trace.expert_ids.shape[2] > 1:
        figures["co-activation"] = plot_co_activation(title, trace)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    return [folder / f"{name}.png" for name in figures]


def plot_balance(title: str, trace: Trace) -> Figure:
    """MaxVio, experts without tokens and tokens near a tie, for each layer."""
    panels = {
        "MaxVio\n(max / mean - 1)": trace.load.max_vio,
        f"experts without tokens\n(of {trace.experts})": trace.load.dead_experts,
        "tokens near a tie\n(percent)": [100 * share for share in trace.near_ties],
    }
    layers = len(trace.layers)
    figure = Figure(figsize=(float(np.clip(2.0 + 0.2 * layers, 6.0, 14.0)), 6.0), layout="constrained")
    figure.suptitle(_wrapped(figure, title), fontsize=10)
    all_axes = figure.subplots(len(panels), sharex=True)
    for axes, color, (label, values) in zip(all_axes, ("C3", "black", "C0"), panels.items(), strict=True):
        bars = axes.bar(range(layers), values, color=color, width=0.7)
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(0, 1.15 * max(values) or 1)
        axes.grid(axis="y", alpha=0.3)
        if layers <= MOST_BARS_WITH_VALUES:
            axes.bar_label(bars, fmt="{:.3g}", fontsize=7)
    all_axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[-1].set_xticks(range(layers), trace.layers.tolist(), fontsize=7, rotation=90)
    all_axes[-1].set_xlim(-0.7, layers - 0.3)
    figure.align_ylabels()
    return figure


def plot_co_activation(title: str, trace: Trace) -> Figure:
    """Heat maps of how often experts were chosen together, for at most `MOST_MAPS` layers, from the first to the last.

    The values are lifts, see `moe.trace.predicted_pairs`. They are written into the cells of few experts.
    """
    layers, experts, k = len(trace.layers), trace.experts, trace.expert_ids.shape[2]
    shown = np.linspace(0, layers - 1, min(layers, MOST_MAPS)).round().astype(int).tolist()
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    side = max(3.2, 0.5 + experts / 50)  # inches, for at least two pixels per expert
    figure = Figure(figsize=(1.6 + side * columns, 1.0 + side * rows), layout="constrained")
    about = f"black: never, white: fewer than {LEAST_PREDICTED} predicted"
    about = f"tokens that chose both experts / number predicted from the loads; {about}"
    figure.suptitle(_wrapped(figure, title, about), fontsize=10)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    most, lifts = float(MOST_LIFT_EXPONENT), np.full((len(shown), experts, experts), np.nan)
    for axes, layer, values in zip(all_axes, shown, lifts, strict=False):
        pairs = co_activation(trace.chosen(layer), experts)
        predicted = predicted_pairs(pairs.diagonal(), k)
        np.divide(pairs, predicted, out=values, where=predicted >= LEAST_PREDICTED)
        # Every lift but zero is on the scale or above it, so that only such pairs get the colour below it.
        exponents = np.log2(values, out=np.full(values.shape, np.nan), where=values > 0).clip(min=-most)
        exponents[values == 0] = -2 * most
        axes.imshow(
            exponents,
            interpolation="nearest",
            cmap=colormaps["coolwarm"].with_extremes(under="black", over="gold", bad="white"),
            vmin=-most,
            vmax=most,
        )
        axes.set_title(trace.layers[layer], fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7)
        if experts <= MOST_PAIRS_WITH_VALUES:
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    color = "white" if value <= 0.3 or 0.7 * most < exponents[y, x] <= most else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    for axes in all_axes[len(shown) :]:
        axes.set_axis_off()
    image = all_axes[0].images[0]
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    extend = _extend(below=(lifts == 0).any(), above=(lifts > 2.0**most).any())
    bar = figure.colorbar(image, ax=all_axes, extend=extend, aspect=30, shrink=0.8, pad=0.01)
    bar.set_label("chosen together / predicted", fontsize=9)
    ticks = range(-MOST_LIFT_EXPONENT, MOST_LIFT_EXPONENT + 1)
    labels = [f"{2**e}" if e >= 0 else f"1/{2**-e}" for e in ticks]
    bar.set_ticks([*ticks], labels=[f"\u2264 {labels[0]}", *labels[1:]])
    return figure


def _extend(*, below: Any, above: Any) -> str:
    """The ends of a colour bar that stand for values outside it."""
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        bool(below), bool(above)
    ]


def smoothed(values: Sequence[float], reach: int) -> np.ndarray:
    """Centred mean of each value and `reach` values on either side; near an end both sides shrink alike.

    Values that are not finite are left out; NaN if all are.
    """
    found = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(found)
    sums, counts = (np.concatenate(([0.0], np.cumsum(part))) for part in (np.where(finite, found, 0.0), finite))
    place = np.arange(len(found))
    reaches = np.minimum(reach, np.minimum(place, place[::-1]))
    start, end = place - reaches, place + reaches + 1
    count = counts[end] - counts[start]
    return np.divide(sums[end] - sums[start], count, out=np.full(len(found), np.nan), where=count > 0)


def _noisy_line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, color: str, *, digits: int
) -> None:
    """The values, pale, and smoothed; the legend has the mean of the last of them."""
    reach = round(SMOOTHED_SHARE * len(values) / 2)
    last = [value for value in values[-2 * reach - 1 :] if np.isfinite(value)]
    if reach:
        axes.plot(steps, np.where(np.isfinite(values), values, np.nan), color=color, alpha=0.3, linewidth=0.7)
        name += f" (smoothed), mean of the last {2 * reach + 1} steps"
    label = f"{name}: {np.mean(last):.{digits}f}" if last else name
    axes.plot(steps, smoothed(values, reach), _mark(values), color=color, linewidth=1.6, label=label)


def _mark(values: Sequence[float]) -> str:
    """A line of one value is invisible without a marker."""
    return "-" if len(values) > 1 else "o"

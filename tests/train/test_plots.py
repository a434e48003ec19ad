"""The plots of a run: values, labels and what they say of data that do not fit, read back through matplotlib."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from moe.trace import Trace
from moe.train.plots import (
    DPI,
    MOST_BARS_WITH_VALUES,
    MOST_COLUMNS_WITH_VALUES,
    MOST_MAPS,
    MOST_PAIRS_WITH_VALUES,
    plot_balance,
    plot_co_activation,
    plot_load,
    plot_loss,
    plot_policy,
    plot_run,
    plot_trace,
    smoothed,
)

TITLE = "tiny, 1,000 parameters, 100 activated, 100 steps"
BASELINES = {"unigram": 6.0, "bigram": 5.0}
LAYERS = ["layers.1.mlp", "layers.2.mlp"]


def train_records(steps: int, layers: int = 2, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        max_vio = [float(vio) for vio in rng.random(layers)]
        records.append({"step": step, "ce": float(7 / step + rng.random()), "lr": 1e-3 / step, "max_vio": max_vio})
    return [record | changes for record in records]


def validation_records(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "nats_per_token": 7.0 - step / 100} for step in steps]


def line(axes: Axes, start: str) -> Any:
    return next(each for each in axes.lines if str(each.get_label()).startswith(start))


def points(drawn: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)]


def drawn(figure: Figure, tmp_path: Path) -> None:
    """Warnings of the layout and of values that cannot be drawn come with the drawing, and are errors here.

    At the resolution of the files, to which extents of texts refer afterwards.
    """
    figure.set_dpi(DPI)
    figure.savefig(tmp_path / "figure.png", dpi=DPI)


def assert_inside(figure: Figure, beginning: str) -> None:
    """The text that begins so is inside the figure, which was drawn."""
    (text,) = (text for text in figure.findobj(Text) if text.get_text().startswith(beginning))
    extent, whole = text.get_window_extent(), figure.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= whole.x1 and extent.y1 <= whole.y1


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
def test_smoothing_is_the_mean_of_both_sides(reach: int) -> None:
    values = np.random.default_rng(1).normal(size=41)
    values[[3, 4, 5, 20]] = np.nan, np.inf, -np.inf, np.nan
    found = smoothed(values.tolist(), reach)
    for i in range(len(values)):
        sides = min(reach, i, len(values) - 1 - i)
        window = [v for v in values[i - sides : i + sides + 1] if math.isfinite(v)]
        assert found[i] == pytest.approx(sum(window) / len(window)) if window else math.isnan(found[i])
    assert smoothed([], reach).size == 0


def test_the_loss_is_drawn_raw_and_smoothed_with_its_last_values(tmp_path: Path) -> None:
    records = train_records(100)
    figure = plot_loss(TITLE, records, validation_records(0, 50, 100), BASELINES)
    drawn(figure, tmp_path)
    loss, balance, rate = figure.axes
    ce = [r["ce"] for r in records]
    raw, trend = loss.lines[0], line(loss, "training (smoothed)")
    assert points(raw) == list(enumerate(ce, 1))
    assert raw.get_alpha() == 0.3 and raw.get_color() == trend.get_color()
    assert points(trend) == list(enumerate(smoothed(ce, 2).tolist(), 1))
    assert trend.get_label() == f"training (smoothed), mean of the last 5 steps: {sum(ce[-5:]) / 5:.3f}"
    scored = line(loss, "validation")
    assert scored.get_marker() == "o" and points(scored) == [(0, 7.0), (50, 6.5), (100, 6.0)]
    assert scored.get_label() == "validation, at the end: 6.000"
    for name, nats in BASELINES.items():
        assert set(line(loss, f"{name} model, validation: {nats:.3f}").get_ydata()) == {nats}
    worst = [max(r["max_vio"]) for r in records]
    assert points(balance.lines[0]) == list(enumerate(worst, 1))
    assert points(line(balance, "worst layer (smoothed)")) == list(enumerate(smoothed(worst, 2).tolist(), 1))
    assert points(rate.lines[0]) == [(r["step"], r["lr"]) for r in records]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["cross entropy\n(nats per token)", "MaxVio\n(max / mean - 1)", "learning rate"]
    assert rate.get_xlabel() == "step" and figure.get_suptitle() == TITLE
    assert all(axes.get_xlim() == rate.get_xlim() for axes in figure.axes)


@pytest.mark.parametrize(
    ("train", "validation", "panels"),
    [
        (train_records(1), validation_records(0, 1), 3),
        (train_records(60)[30:], validation_records(40), 3),  # a run whose first records are lost
        (train_records(50), [], 3),
        (train_records(50, ce=math.nan), validation_records(0, 50), 3),
        (train_records(50, max_vio=[math.nan, math.nan]), validation_records(0, 50), 3),
        (train_records(50, ce=math.inf), [{"step": 0, "nats_per_token": math.inf}], 3),
        (train_records(50, layers=0), validation_records(0, 50), 2),
        ([], validation_records(0), 2),
    ],
    ids=["one step", "resumed", "no validation", "NaN", "NaN in MaxVio", "infinite", "no experts", "no step"],
)
def test_what_a_run_may_lack(tmp_path: Path, train: Any, validation: Any, panels: int) -> None:
    figure = plot_loss(TITLE, train, validation, BASELINES if validation else {})
    drawn(figure, tmp_path)
    assert len(figure.axes) == panels
    if len(train) == 1:
        assert line(figure.axes[0], "training: ").get_marker() == "o", "a line of one point is invisible"
    if train and not math.isfinite(train[0]["ce"]):
        assert line(figure.axes[0], "training").get_label() == "training (smoothed), mean of the last 3 steps"


@pytest.mark.parametrize(
    ("load", "extend"),
    [
        ([[3, 4, 5], [4, 4, 4]], "neither"),
        ([[3, 0, 3], [1, 1, 1]], "min"),
        ([[1, 1, 7], [1, 1, 1]], "max"),
        ([[0, 1, 8], [1, 1, 1]], "both"),
        ([[0, 6, 3], [0, 0, 0]], "min"),  # twice the mean is still on the scale; a layer without tokens has no loads
        ([[0, 0, 0], [0, 0, 0]], "neither"),
    ],
)
def test_the_colour_bar_shows_what_it_clips(tmp_path: Path, load: list[list[int]], extend: str) -> None:
    figure = plot_load(TITLE, LAYERS, np.array(load))
    drawn(figure, tmp_path)
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.colorbar is not None and image.colorbar.extend == extend
    found: Any = image.get_array()
    for row, values in zip(load, found, strict=True):
        mean = sum(row) / len(row)
        assert [values.tolist()] == [[n / mean for n in row] if mean else [None] * len(row)]
    colors: Any = image.cmap(image.norm(np.array([0, 1e-3, 3])))
    none, little, much = colors
    assert none == pytest.approx(to_rgba("black")) and much == pytest.approx(to_rgba("gold"))
    assert little != pytest.approx(to_rgba("black"))
    assert bar.get_ylabel() == "load / layer's mean" and axes.get_xlabel() == "expert"
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    assert axes.get_title().startswith(TITLE)


@pytest.mark.parametrize("experts", [MOST_COLUMNS_WITH_VALUES, MOST_COLUMNS_WITH_VALUES + 1])
def test_values_stand_in_the_cells_while_they_can_be_read(tmp_path: Path, experts: int) -> None:
    load = np.random.default_rng(0).integers(0, 100, (2, experts))
    load[1] = 0
    figure = plot_load(TITLE, LAYERS, load)
    drawn(figure, tmp_path)
    axes = figure.axes[0]
    if experts > MOST_COLUMNS_WITH_VALUES:
        assert not axes.texts
        return
    expected = {(x, 0): f"{n / load[0].mean():.2f}" for x, n in enumerate(load[0])}
    assert {text.get_position(): text.get_text() for text in axes.texts} == expected
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)), "texts overlap"


def test_the_map_of_58_layers_of_256_experts(tmp_path: Path) -> None:
    names = [f"layers.{i}.mlp" for i in range(3, 61)]
    figure = plot_load(TITLE, names, np.random.default_rng(0).integers(1, 100, (58, 256)))
    drawn(figure, tmp_path)
    axes = figure.axes[0]
    labels = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(labels) == 58 and not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
    width, height = axes.get_window_extent().width / figure.dpi, axes.get_window_extent().height / figure.dpi
    assert width * 120 / 256 > 3 and height * 120 / 58 > 15, "pixels of a cell"


def test_the_files_of_a_run(tmp_path: Path) -> None:
    train, validation = train_records(5), validation_records(0, 5)
    files = plot_run(tmp_path, "name " * 60, train, validation, BASELINES, LAYERS, np.ones((2, 4), np.int64))
    assert files == [tmp_path / "loss.png", tmp_path / "load.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    alone = tmp_path / "dense"
    alone.mkdir()
    assert plot_run(alone, TITLE, train_records(5, layers=0), validation, {}, [], np.zeros((0, 4), np.int64)) == [
        alone / "loss.png"
    ]


def test_the_plot_of_reinforcement_learning(tmp_path: Path) -> None:
    names = ("accuracy", "format", "reward", "length", "entropy", "logprob_difference", "router_agreement")
    train = [{"step": step, **{name: step / 10 for name in names}} for step in range(1, 6)]
    validation = [{"step": step, **{name: step / 8 for name in names[:4]}} for step in (0, 5)]
    figure = plot_policy(TITLE, train, validation, ("accuracy", "format"))
    drawn(figure, tmp_path)
    lines = [{line.get_label(): line for line in axes.lines} for axes in figure.axes]
    assert [len(each) for each in lines] == [6, 2, 1, 1, 1]
    assert lines[0]["accuracy, held out, at the end: 0.625"].get_xydata().tolist() == [[0, 0], [5, 0.625]]  # pyright: ignore
    assert lines[4]["router agreement, sampled: 0.50000"].get_ydata() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # pyright: ignore
    assert figure.axes[3].get_yscale() == "log"
    # Nothing was trained on, by a model without experts.
    none = [{**record, "logprob_difference": None, "router_agreement": None} for record in train]
    drawn(plot_policy(TITLE, none, validation, ("reward",)), tmp_path)
    drawn(plot_policy(TITLE, [], validation[:1], ("reward",)), tmp_path)


def trace_of(ids: Any, experts: int, margins: Any = None) -> Trace:
    ids = np.asarray(ids, np.uint8)
    found = np.ones(ids.shape[:2]) if margins is None else np.asarray(margins)
    layers = np.array([f"layers.{i}.mlp" for i in range(1, len(ids) + 1)])
    return Trace(layers, experts, 0, ids, np.ones(ids.shape), found, np.array([0]), np.ones(ids.shape[:2], bool))


def random_trace(layers: int, experts: int, tokens: int = 200) -> Trace:
    rng = np.random.default_rng(0)
    return trace_of(rng.random((layers, tokens, experts)).argsort(axis=2)[:, :, :2], experts)


def test_the_balance_of_each_layer_is_drawn(tmp_path: Path) -> None:
    trace = trace_of([[[0], [0], [0], [1]], [[0], [1], [0], [1]]], 3, [[0.5, 2, np.inf, 0], [1, 1, 1, 1]])
    figure = plot_balance(TITLE, trace)
    drawn(figure, tmp_path)
    bars: list[list[Any]] = [list(axes.patches) for axes in figure.axes]
    vio, dead, ties = ([bar.get_height() for bar in panel] for panel in bars)
    assert vio == pytest.approx([3 / (4 / 3) - 1, 2 / (4 / 3) - 1])
    assert dead == [1, 1] and ties == [50, 0]
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["layers.1.mlp", "layers.2.mlp"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[1:] == ["experts without tokens\n(of 3)", "tokens near a tie\n(percent)"]
    assert [text.get_text() for text in figure.axes[2].texts] == ["50", "0"]
    for axes in figure.axes:
        top = axes.get_window_extent().y1
        assert all(text.get_window_extent().y1 < top for text in axes.texts), "a value overlaps the frame"
    many = plot_balance(TITLE, random_trace(MOST_BARS_WITH_VALUES + 1, 4))
    drawn(many, tmp_path)
    assert not any(axes.texts for axes in many.axes)


def test_experts_that_are_chosen_together_are_drawn(tmp_path: Path) -> None:
    tokens = [[0, 1]] * 64 + [[2, 3]] * 64 + [[0, 2]] * 2 + [[3, 4]]
    figure = plot_co_activation(TITLE, trace_of([tokens], 6))
    drawn(figure, tmp_path)
    axes, bar = figure.axes
    (image,) = axes.images
    values: Any = image.get_array()
    load = [66, 64, 66, 65, 1, 0]
    for a, b in itertools.product(range(6), repeat=2):
        predicted = load[a] * load[b] / 131 * 6 / (2 * 5)
        together = sum({a, b} == set(token) for token in tokens)
        if a == b or predicted < 5:
            assert values.mask[a, b]
        elif together == 0:
            assert values[a, b] < -3
        else:
            assert values[a, b] == pytest.approx(max(math.log2(together / predicted), -3))
    assert values[0, 2] == -3 and values[0, 3] < -3  # rare is not never
    colors: Any = image.cmap(image.norm(np.ma.array([-6, -3, 4, 0], mask=[False, False, False, True])))
    never, rare, much, unknown = colors
    assert never == pytest.approx(to_rgba("black")) and rare != pytest.approx(to_rgba("black"))
    assert much == pytest.approx(to_rgba("gold")) and unknown == pytest.approx(to_rgba("white"))
    assert image.colorbar is not None and image.colorbar.extend == "min"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["≤ 1/8", "1/4", "1/2", "1", "2", "4", "8"]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(shown) == 12 and shown[1, 0] == f"{64 / (66 * 64 / 131 * 0.6):.2f}" and shown[3, 0] == "0.00"


@pytest.mark.parametrize(("layers", "maps"), [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (58, [1, 12, 24, 35, 47, 58])])
def test_some_layers_have_a_map_of_pairs(tmp_path: Path, layers: int, maps: list[int]) -> None:
    figure = plot_co_activation(TITLE, random_trace(layers, 12, tokens=50))
    drawn(figure, tmp_path)
    assert len(maps) <= MOST_MAPS
    assert [axes.get_title() for axes in figure.axes if axes.images] == [f"layers.{i}.mlp" for i in maps]
    assert not any(axes.texts for axes in figure.axes)
    assert_inside(figure, TITLE[:10])


def test_the_map_of_pairs_of_256_experts(tmp_path: Path) -> None:
    figure = plot_co_activation(TITLE, random_trace(2, 256, tokens=20))
    drawn(figure, tmp_path)
    assert figure.axes[0].get_window_extent().width / figure.dpi * 120 / 256 >= 2, "pixels of a cell"


@pytest.mark.parametrize("experts", [MOST_PAIRS_WITH_VALUES, MOST_PAIRS_WITH_VALUES + 1])
def test_values_of_pairs_can_be_read(tmp_path: Path, experts: int) -> None:
    figure = plot_co_activation(TITLE, random_trace(3, experts, tokens=2000))
    drawn(figure, tmp_path)
    texts = figure.axes[0].texts
    assert len(texts) == (experts * (experts - 1) if experts == MOST_PAIRS_WITH_VALUES else 0)
    extents = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2)), "texts overlap"


@pytest.mark.parametrize("title", ["/Wide_Name" * 20, "Window " * 20, TITLE])
@pytest.mark.parametrize("plot", [plot_balance, plot_co_activation, plot_load])
def test_a_long_title_is_inside_the_figure(plot: Any, title: str, tmp_path: Path) -> None:
    figure = plot_load(title, LAYERS, np.ones((2, 8))) if plot is plot_load else plot(title, random_trace(2, 4))
    drawn(figure, tmp_path)
    assert_inside(figure, title[:5])


def test_the_files_of_a_trace(tmp_path: Path) -> None:
    names = ["load.png", "balance.png", "co-activation.png"]
    files = plot_trace(tmp_path, "name " * 60, random_trace(2, 4))
    assert files == [tmp_path / name for name in names]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    one = trace_of(np.zeros((1, 3, 1)), 1)  # K = 1: no pairs
    assert plot_trace(tmp_path, TITLE, one) == files[:2]
    assert (
        plot_load(TITLE, LAYERS, np.ones((2, 2)), "a text").axes[0].get_title() == f"{TITLE}\na text; black: no tokens"
    )

"""The demo's figures, drawn without a display."""

from __future__ import annotations

from typing import Any

from .data import optional

BLUE, SKY, GREEN, ORANGE, RED, PURPLE, GREY = (
    "#0b4f9e",
    "#56a4e0",
    "#2a9d5c",
    "#e08214",
    "#c0282d",
    "#7b4fa3",
    "#6b6b6b",
)
STYLES: dict[str, tuple[str, str, str]] = {  # colour, line, marker; by the beginning of a name
    "HesScaleGN": (SKY, "-", "s"),
    "HesScale": (BLUE, "-", "o"),
    "BL89": (GREEN, "-", "^"),
    "GGN-MC, 1 ": (ORANGE, "--", "v"),
    "GGN-MC": (ORANGE, "-", "v"),
    "squared": (GREY, "-", "x"),
    "gradient": (GREY, "-", "x"),
    "Hutchinson, 1 ": (RED, "--", "D"),
    "Hutchinson": (RED, "-", "D"),
    "|Hv|": (PURPLE, "--", "P"),
    "SGD": (GREY, "-", ""),
    "AdaHesScaleGN": (SKY, "-", ""),
    "AdaHesScale": (BLUE, "-", ""),
    "Adam": (ORANGE, "-", ""),
}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    optional("matplotlib", "matplotlib").use("Agg")
    return optional("matplotlib.pyplot", "matplotlib")


def style(name: str) -> dict[str, Any]:
    """Colour, line and marker of a method: the same in every figure."""
    colour, line, marker = next(v for k, v in STYLES.items() if name.startswith(k))
    return {"color": colour, "linestyle": line, "marker": marker, "markersize": 4.5, "linewidth": 1.6}


def _tidy(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def quality(plt: Any, results: dict[str, Any]) -> Any:
    """Relative distance against the training step."""
    figure, axes = plt.subplots(figsize=(8.6, 5), layout="constrained")
    for name, errors in results["errors"].items():
        axes.plot(results["steps"], errors, label=name, **style(name))
    axes.axhline(1, color="black", linewidth=0.9, linestyle=":", label="an estimate of zero")
    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=3)
    axes.set_xlim(0, results["steps"][-1] * 1.08)
    ticks = [0, *(10**k for k in range(7) if 10**k <= results["steps"][-1])]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks(
        [d * 10**k for k in range(1, 6) for d in range(2, 10) if d * 10**k < results["steps"][-1]], minor=True
    )
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -handles[i].get_ydata()[-1])  # as the lines end, top to bottom
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9,
        loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    title = "Distance of each estimate to the exact Hessian diagonal"
    _tidy(axes, "training step", r"$\sum|\mathrm{estimate}-H_{ii}|\ /\ \sum|H_{ii}|$", title)
    return figure


def optimizers(plt: Any, results: dict[str, Any]) -> Any:
    """Loss against steps and against seconds: mean over seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.4), sharey=True, layout="constrained")
    for axes, key, unit in zip(panels, ("steps", "seconds"), ("training step", "seconds of training"), strict=True):
        for name, run in results["runs"].items():
            curves = run["curves"]
            x = [sum(values) / len(values) for values in zip(*(c[key] for c in curves), strict=True)]
            losses = list(zip(*(c["loss"] for c in curves), strict=True))
            look = style(name)
            axes.plot(x, [sum(v) / len(v) for v in losses], label=f"{name}, lr {run['lr']:g}", **look)
            axes.fill_between(x, list(map(min, losses)), list(map(max, losses)), color=look["color"], alpha=0.15, lw=0)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        _tidy(axes, unit, "", f"Loss against {key}")
    panels[0].set_ylabel("cross entropy on all training images")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def cost(plt: Any, results: dict[str, Any]) -> Any:
    """Bars of the medians, quartiles as whiskers; one panel a network."""
    networks = results["networks"]
    figure, panels = plt.subplots(1, len(networks), figsize=(9.6, 3.6), sharey=True, layout="constrained")
    for axes, (title, entry) in zip(panels, networks.items(), strict=True):
        names = list(entry["ratios"])
        low, middle, high = zip(*entry["ratios"].values(), strict=True)
        whiskers = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        colours = [style(name)["color"] for name in names]
        axes.barh(names, middle, xerr=whiskers, color=colours, height=0.65, error_kw={"lw": 1, "capsize": 2})
        for i, (m, top) in enumerate(zip(middle, high, strict=True)):
            axes.text(top, i, f"  {m:.2f}", va="center", fontsize=9)
        axes.set_xlim(0, 1.18 * max(high))
        axes.axvline(1, color="black", linewidth=0.9, linestyle=":")
        _tidy(axes, "time as a multiple of the gradient step", "", f"{title}: step of {entry['milliseconds']:.2g} ms")
    panels[0].invert_yaxis()
    return figure

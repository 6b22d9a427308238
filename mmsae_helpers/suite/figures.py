"""One look for every figure: colour-blind-safe, and readable without colour."""

import html
import textwrap
from itertools import zip_longest

import numpy as np

from mmsae_helpers.suite.observations import Interval

# Okabe and Ito 2008, without yellow
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def style():
    """Set the suite's matplotlib and plotly defaults; call it once, in the import cell.

    Series differ in colour, marker and line style at once. Plotly figures stay JSON in the notebook, drawn by
    JupyterLab and by the report, and fetch nothing from a network.
    """
    import matplotlib
    import pandas as pd
    import plotly.graph_objects as go
    import plotly.io as pio
    from cycler import cycler

    pd.set_option("display.max_colwidth", None)
    pd.set_option("display.float_format", "{:.3g}".format)

    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=PALETTE) + cycler(marker=MARKERS) + cycler(linestyle=LINES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "errorbar.capsize": 3,
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "lines.markersize": 5,
            "image.cmap": "cividis",
        }
    )
    layout = dict(colorway=PALETTE, font_size=13, margin=dict(l=60, r=20, t=48, b=90))
    layout["legend"] = dict(orientation="h", yanchor="top", y=-0.22)
    pio.templates["mmsae"] = go.layout.Template(layout=layout)
    pio.templates.default = "plotly_white+mmsae"
    pio.renderers.default = "plotly_mimetype"


def _ends(intervals):
    """Values [n] and the distances of the interval ends below and above them [2, n], 0 where there are none."""
    values = np.array([iv.value for iv in intervals], float)
    ends = np.array([[iv.value, iv.value] if iv.lo is None else [iv.lo, iv.hi] for iv in intervals], float)
    return values, np.abs(ends.T - values)


def errorbars(ax, x, intervals, i=0, label=None, line=True):
    """Estimates (`results.Interval`, one per ``x``) with their intervals as series number ``i`` on ``ax``."""
    values, errors = _ends(intervals)
    drawn = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7], "linestyle": LINES[i % 7] if line else "none"}
    return ax.errorbar(x, values, yerr=errors, label=label, **drawn)


def bars(ax, labels, intervals, color=PALETTE[0]):
    """Horizontal bars with intervals, first label on top, each value written at its bar; one color, or one a bar."""
    y = np.arange(len(labels))[::-1]
    values, errors = _ends(intervals)
    ax.barh(y, values, xerr=errors, color=color, height=0.65, error_kw={"ecolor": "#444444"})
    ax.set_yticks(y, labels)
    ax.grid(axis="y", visible=False)
    for at, value, hi in zip(y, values, values + errors[1], strict=True):
        beside = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        ax.annotate(f"{value:.3g}", (max(hi, 0), at), **beside)
    ax.margins(x=0.12)


def heat(ax, frame, low, high):
    """A data frame as a map of colours from ``low`` to ``high`` with each number written in it."""
    ax.imshow(frame, vmin=low, vmax=high, cmap="PuOr", aspect="auto")
    for (y, x), value in np.ndenumerate(frame.to_numpy()):
        strong = abs(2 * (value - low) / (high - low) - 1) > 0.65
        ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if strong else "black")
    ax.set_xticks(range(frame.shape[1]), frame.columns, rotation=40, ha="right")
    ax.set_yticks(range(len(frame)), [" ".join(key) if isinstance(key, tuple) else key for key in frame.index])
    ax.grid(visible=False)


def pictures(axes, images, titles=(), **look):
    """Images in ``axes``, in their order, without frames or ticks, each under its title (``look``: of the titles, in
    which a $ is a dollar); axes that are left over stay empty."""
    for ax, image, title in zip_longest(np.ravel(axes), images, titles):
        ax.set_axis_off()
        if image is not None:
            ax.imshow(image)
            ax.set_title(title or "", **{"fontsize": 9, "parse_math": False} | look)


def caption(fig, sentence, lead=False):
    """Show a matplotlib or plotly figure with a sentence under it that says how to read it.

    The sentence is Markdown; ``<`` and ``&`` in it are text. Closes a matplotlib figure, so it appears once. ``lead``:
    it carries the notebook's story, and stands at the head of its report.
    """
    from IPython.display import Markdown, display

    display(fig)
    if hasattr(fig, "canvas"):
        import matplotlib.pyplot as plt

        plt.close(fig)
    display(
        Markdown(f"*Figure.* {html.escape(sentence, quote=False)}", metadata={"mmsae": "lead" if lead else "caption"})
    )


def forest(said, about):
    """Figure of a claim (`claims.Claim.as_dict`): the primary effect and its control, parts, readings, sensitivity.

    A diamond is an effect, a ring its control's; the dashed line is what the verdict is judged against. What goes
    beyond the axis, which a part far off does not widen, ends in an arrow; every effect is also printed, and what a
    part is beyond its control.
    """
    import matplotlib.pyplot as plt

    stated, beyond = said["as_stated"], said.get("beyond_control", {})
    rows = [("as stated", stated, beyond.get("control"), 0)]
    rows += [("beyond control", beyond, None, 0)] if beyond else []
    rows += [(name, part | {"ci": part["ci_holm"]}, part["control"], 2) for name, part in said["parts"].items()]
    rows += [(f"reading: {name}", part, None, 3) for name, part in said["readings"].items()]
    rows += [
        (f"{name} {value}", part, None, 4) for name, by in said["sensitivity"].items() for value, part in by.items()
    ]
    fig, ax = plt.subplots(figsize=(8.6, 0.34 * len(rows) + 0.9))
    for y, (_, effect, control, i) in enumerate(rows):
        _whisker(ax, y, effect, PALETTE[i], marker="D", ms=7 if y < 2 else 5)
        if control:
            _whisker(ax, y + 0.25, control, "#666666", marker="o", mfc="white", ms=5)
        beside = dict(transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
        less = f"; beyond control {Interval.told(effect['beyond'])}" if effect.get("beyond") else ""
        ax.text(1.04, y, f"{Interval.told(effect)}{less}", **beside)
        null = beyond["null"] if effect is beyond else stated["null"]
        ax.plot([null, null], [y - 0.5, y + 0.5], color="#444444", lw=1, ls="--", marker="")
    main = [x for one in (stated, beyond, beyond.get("control")) if one for x in (one["effect"], *(one["ci"] or []))]
    low, high = min([*main, stated["null"]]), max([*main, stated["null"]])
    reach = 2 * (high - low) or np.inf  # all of it may be one number, as where nothing has an effect
    low, high = max(low - reach, ax.get_xlim()[0]), min(high + reach, ax.get_xlim()[1])
    ax.set_xlim(low, high)
    drawn = [(y, effect, PALETTE[i]) for y, (_, effect, _, i) in enumerate(rows)]
    drawn += [(y + 0.25, control, "#666666") for y, (_, _, control, _) in enumerate(rows) if control]
    for y, one, color in drawn:
        ends = [one["effect"], *(one["ci"] or [])]
        for edge, past in enumerate((min(ends) < low, max(ends) > high)):
            if past:
                look = dict(marker="<>"[edge], color=color, ms=5, clip_on=False)
                ax.plot(edge, y, transform=ax.get_yaxis_transform(), **look)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    ax.set(xlabel=about.unit, ylim=(len(rows) - 0.4, -0.6))
    ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="y", visible=False)
    return fig


def _whisker(ax, y, effect, color, **look):
    lo, hi = effect["ci"] or (effect["effect"], effect["effect"])
    ax.plot([lo, hi], [y, y], color=color, lw=1.6, marker="", ls="-")
    ax.plot(effect["effect"], y, color=color, ls="none", **look)


def forest_of_all(entries):
    """Figure of all measured claims of a `results.ledger`, a panel a paper.

    Units differ, so an effect is drawn as its distance from what it is judged against, in half-widths of its interval,
    to the right where it speaks for the claim: beyond 1 it is replicated, below -1 contradicted; clipped at 10.
    """
    import matplotlib.pyplot as plt

    said = [(about, claim) for about, claim, _ in entries if claim]
    papers = sorted({about.paper for about, _ in said})
    heights = [sum(about.paper == paper for about, _ in said) for paper in papers] or [1]
    size = (8.4, 0.36 * sum(heights) + 0.7 * len(heights) + 0.6)
    fig, axes = plt.subplots(len(heights), 1, figsize=size, squeeze=False, sharex=True, height_ratios=heights)
    looks = {"as_stated": dict(marker="D", mfc=PALETTE[0]), "beyond_control": dict(marker="o", mfc="white")}
    for ax, paper in zip(axes.flat, papers, strict=False):
        some = [(about, claim) for about, claim in said if about.paper == paper]
        ax.axvspan(-1, 1, color="#eeeeee")
        ax.axvline(0, color="#444444", lw=1, ls="--", marker="")
        for i, (key, look) in enumerate(looks.items()):
            ys = [y + 0.15 * (2 * i - 1) for y, (_, claim) in enumerate(some) if key in claim]
            xs = [_half_widths(claim[key], about.direction) for about, claim in some if key in claim]
            ax.plot(np.clip(xs, -10, 10), ys, color=PALETTE[i], ls="none", label=key.replace("_", " "), **look)
        ax.set_yticks(range(len(some)), [f"{a.id}  {textwrap.shorten(a.says, 58, placeholder=' …')}" for a, _ in some])
        ax.set_title("Beyond the papers" if paper == "X" else f"Paper {paper}")
        ax.set(ylim=(len(some) - 0.5, -0.5), xlim=(-10.5, 10.5))
        ax.tick_params(axis="y", labelsize=9)
    axes[0, 0].legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes[-1, 0].set_xlabel("against the claim   ←   half-widths of its interval from its threshold   →   for it")
    return fig


def _half_widths(effect, direction):
    """Distance of an effect from its null in half-widths of its interval, positive for the claim; 0 without one."""
    if effect["ci"] is None:
        return 0.0
    gap = effect["effect"] - effect["null"]
    side = effect["effect"] - effect["ci"][0] if gap > 0 else effect["ci"][1] - effect["effect"]
    return (gap if direction == "greater" else -gap) / max(side, 1e-12)

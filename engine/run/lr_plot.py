"""The picture of a learning-rate search. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from .loss_curve import LossCurve


def draw_search(
    ax: Axes, lrs: list[float], losses: list[float], suggestions: Mapping[str, float]
) -> Axes:
    """Draw smoothed and single losses up to the explosion, and a point for each suggestion."""
    curve = LossCurve(losses)
    smoothed = curve.smoothed
    end = len(losses)
    if losses:
        low, high = _visible(losses, smoothed, curve.last_low())
        end = next((i for i in range(curve.last_low(), end) if smoothed[i] > high), end - 1) + 1
        ax.set_ylim(low, high)
    ax.plot(lrs[:end], losses[:end], color="C0", alpha=0.3, linewidth=1, label="single losses")
    ax.plot(lrs[:end], smoothed[:end], color="C0", linewidth=2, label="smoothed")
    for color, (name, lr) in enumerate(suggestions.items(), start=1):
        nearest = min(range(len(lrs)), key=lambda i: abs(lrs[i] - lr))
        ax.plot(lr, smoothed[nearest], "o", color=f"C{color}", label=f"{name}: {lr:.2e}")
    ax.legend()
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
    return ax


def _visible(losses: list[float], smoothed: list[float], last_low: int) -> tuple[float, float]:
    """The range of losses to show: that before the loss rises, without its rarest extremes."""
    single = sorted(losses[: last_low + 1])
    rare = len(single) // 20
    low = min(*smoothed[: last_low + 1], single[rare])
    high = max(*smoothed[: last_low + 1], single[-1 - rare])
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin

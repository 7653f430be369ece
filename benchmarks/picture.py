"""The ratios of peers as a picture."""

import pathlib

import matplotlib

from benchmarks.trials import Ratio

PICTURE = pathlib.Path(__file__).with_name("peers.png")
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")


def draw(ratios: dict[str, dict[str, dict[str, Ratio]]], path: pathlib.Path = PICTURE) -> None:
    """Draws how many times as long as embax each peer takes, with ranges, a panel an optimizer.

    Args:
        ratios: by optimizer, workload and title of the peer.
        path: the file that is written.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = sorted({title for of in ratios.values() for peers in of.values() for title in peers})
    figure, panels = plt.subplots(
        len(ratios), 1, figsize=(9, 2.6 * len(ratios)), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (optimizer, of_workloads) in zip(panels[:, 0], ratios.items(), strict=True):
        for place, title in enumerate(titles):
            found = [(n, peers[title]) for n, peers in enumerate(of_workloads.values()) if title in peers]
            if not found:
                continue
            middles = [ratio.median for _, ratio in found]
            reach = [[r.median - r.low for _, r in found], [r.high - r.median for _, r in found]]
            width = 0.8 / len(titles)
            left = [n + (place - (len(titles) - 1) / 2) * width for n, _ in found]
            heights, color = [middle - 1 for middle in middles], COLORS[place % len(COLORS)]
            axes.bar(left, heights, width, bottom=1, label=title, color=color, yerr=reach, ecolor="#777777")
            for x, middle in zip(left, middles, strict=True):
                axes.annotate(f"{middle:.1f}", (x, middle), ha="center", va="bottom", fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"{optimizer}:\ntime / embax's")
        axes.set_xticks(range(len(of_workloads)), list(of_workloads))
    bars = {label: bar for axes in panels[:, 0] for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(bars.values(), bars.keys(), ncols=len(bars), loc="outside lower center")
    figure.suptitle("One training step: how many times as long as embax, with the range of rounds")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")

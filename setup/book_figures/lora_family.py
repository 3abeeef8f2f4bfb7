"""LoRA's relatives: which came when, and what each of them changes.

Orange is what the relatives of one row have in common; grey are those that change how W is stored.
"""

from book_figures.parts import SMALL, arrow, box, canvas, line, write

FAMILY = {  # what changes: {name: (year, number on arXiv)}
    "what is trained": {"LoRA-FA": (2023, "2308.03303"), "VeRA": (2023, "2310.11454")},
    "scale and\nlearning rates": {"rsLoRA": (2023, "2312.03732"), "LoRA+": (2024, "2402.12354")},
    "where A and B start": {"PiSSA": (2024, "2404.02948"), "OLoRA": (2024, "2406.01775")},
    "the rank of each layer": {"AdaLoRA": (2023, "2303.10512")},
    "what becomes of W": {"DoRA": (2024, "2402.09353"), "Delta-LoRA": (2023, "2309.02411")},
    "how W is stored": {"QLoRA": (2023, "2305.14314"), "LoftQ": (2023, "2310.08659")},
}


def family_tree():
    """LoRA (2021, arXiv 2106.09685) at the left, six branches to the right. What is trained: LoRA-FA
    (2308.03303) and VeRA (2310.11454), 2023. Scale and learning rates: rsLoRA (2023, 2312.03732) and LoRA+
    (2024, 2402.12354). Where A and B start: PiSSA (2404.02948) and OLoRA (2406.01775), 2024. The rank of
    each layer: AdaLoRA (2023, 2303.10512). What becomes of W: DoRA (2024, 2402.09353) and Delta-LoRA (2023,
    2309.02411). In grey, how W is stored: QLoRA (2305.14314) and LoftQ (2310.08659), 2023."""
    step, trunk = 0.76, 1.45
    fig, ax = canvas(8, step * len(FAMILY) + 0.1)
    heights = [step * (len(FAMILY) - row - 0.5) + 0.05 for row in range(len(FAMILY))]
    root = sum(heights) / len(heights)
    box(ax, 0.65, root, 1.1, 0.8, color="blue")
    write(ax, 0.65, root + 0.2, "LoRA", weight="bold", zorder=3)
    write(ax, 0.65, root - 0.13, "2021\n2106.09685", size=SMALL, zorder=3)
    line(ax, [(1.2, root), (trunk, root)])
    line(ax, [(trunk, heights[0]), (trunk, heights[-1])])
    for y, (change, relatives) in zip(heights, FAMILY.items()):
        stored = change == "how W is stored"
        arrow(ax, (trunk, y), (1.75, y))
        write(ax, 1.85, y, change, ha="left", style="italic")
        for place, (name, (year, number)) in enumerate(relatives.items()):
            x = 4.7 + 2.15 * place
            box(ax, x, y, 1.95, 0.56, color="grey" if stored else "orange")
            write(ax, x, y + 0.12, name, weight="bold", zorder=3)
            write(ax, x, y - 0.13, f"{year} · {number}", size=SMALL, zorder=3)
    return fig

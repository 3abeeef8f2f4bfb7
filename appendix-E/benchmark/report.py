"""Measurements of the contenders, the machine's roofline for them, ratios, the table and the figure."""

import statistics
from dataclasses import dataclass

import pandas as pd

NAMES = {"book": "book's loop", "ours": "ours", "hf": "transformers + PEFT", "compiled": "ours, compiled"}


def block_parameters(config):
    """Return the number of weights in the matrices of one transformer block: 12 D²."""
    return 12 * config["emb_dim"] ** 2


def message_flops(config, messages):
    """Return the operations that one forward pass over `messages` needs at least; backward needs as many.

    Two per weight and real token; of the last block, keys and values at all tokens (2 D² of its 12 D²)
    and the rest at the last token only. Attention's own products (about 1%) and adapters (4%) are left out.
    """
    tokens = sum(len(ids) for ids in messages)
    last_block = (tokens * 2 + len(messages) * 10) / 12
    return 2 * block_parameters(config) * ((config["n_layers"] - 1) * tokens + last_block)


def token_seconds(config, machine, batch):
    """Return the least seconds for one token of each of `batch` texts: to read the weights, or to compute."""
    weights = config["n_layers"] * block_parameters(config) + config["vocab_size"] * config["emb_dim"]
    return max(4 * weights / machine["bytes_per_second"], 2 * weights * batch / machine["float32_flops"])


@dataclass
class Measurement:
    """What one contender reached in each round, and what one unit of it needs at least.

    `unit` is "s", "MiB" or a rate that ends in "/s". `flops` are operations, `bytes` are read from memory,
    `tokens` says that the unit is a token, generated for so many texts at once.
    """

    what: str
    contender: str
    values: list
    unit: str
    flops: float | None = None
    bytes: int | None = None
    tokens: int | None = None
    extrapolated: bool = False

    @property
    def value(self):
        """The median over the rounds."""
        return statistics.median(self.values)

    @property
    def is_rate(self):
        return self.unit.endswith("/s")

    def ratio(self, other):
        """Return how many times as good as `other` this is: above 1 is faster, or less memory."""
        return self.value / other.value if self.is_rate else other.value / self.value

    def roofline(self, machine, config):
        """Return the seconds that one unit takes at the machine's measured peak, None if not defined."""
        if self.flops:
            return self.flops / machine["float32_flops" if self.contender == "book" else "flops"]
        if self.bytes:
            return self.bytes / machine["bytes_per_second"]
        return token_seconds(config, machine, self.tokens) / self.tokens if self.tokens else None

    def roofline_fraction(self, machine, config):
        """Return the roofline's seconds as a fraction of the measured ones, None if not defined."""
        seconds = self.roofline(machine, config)
        return seconds and (seconds * self.value if self.is_rate else seconds / self.value)


def compare_contenders(measurements, machine, config):
    """Return one dictionary per measurement: its value, its ratios to others, its fraction of the roofline.

    "times_book_at_roofline" is the ratio that the contender would reach at the roofline.
    """
    found = {(m.what, m.contender): m for m in measurements}
    rows = []
    for m in measurements:
        row = {"what": m.what, "contender": m.contender, "value": m.value, "unit": m.unit,
               "extrapolated": m.extrapolated, "rounds": [float(f"{value:.5g}") for value in m.values]}
        for name in ("book", "hf"):
            if (m.what, name) in found and name != m.contender:
                row[f"times_{name}"] = m.ratio(found[m.what, name])
        if fraction := m.roofline_fraction(machine, config):
            row["roofline_fraction"] = fraction
            if "times_book" in row:
                row["times_book_at_roofline"] = row["times_book"] / fraction
        rows.append(row)
    return rows


def table(report):
    """Return the report as Markdown: messages, machine, and a table with one line per measurement."""
    machine, messages, precision = report["machine"], report["messages"], report["precision"]
    rates = {"float32": machine["float32_flops"], precision: machine["flops"]}
    peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    lines = [
        f"{messages['count']} messages, {messages['data']}: mean {messages['mean_tokens']:.1f} tokens, "
        f"longest {messages['longest']}; grouped by length, {messages['padding']:.1%} padding.",
        f"{machine['processor']}, {machine['device']}, {machine['threads']} thread(s), "
        f"torch {machine['torch']}: matrix products {peaks}, memory {machine['bytes_per_second'] / 1e9:.1f} "
        f"GB/s; ours and transformers train in {precision}.",
    ]
    rows = report["rows"]
    if rows and not any(row["contender"] == "hf" for row in rows):
        lines.append("transformers + PEFT did not run; to install them: pip install transformers peft.")
    lines += [*row_lines(rows), ""]
    if percentages := report["percentages"]:
        listed = ", ".join(f"{value:.1f} % {kind}" for kind, value in percentages.items())
        lines += [f"Our training step's time: {listed}.", ""]
    lines += accuracy_lines(report["accuracies"])
    note = "; ~ extrapolated from the token halfway" if any(row["extrapolated"] for row in rows) else ""
    return "\n".join([*lines, f"{report['seconds'] / 60:.1f} minutes{note}."])


def row_lines(rows):
    """Return a Markdown table of `compare_contenders`'s rows, as a list of lines; [] without rows."""
    if not rows:
        return []
    lines = [
        "", "| | contender | median | times the book's | times transformers + PEFT | percent of roofline "
        "| times the book's at the roofline |", "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        value = f"{'~' if row['extrapolated'] else ''}{row['value']:.4g} {row['unit']}"
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("times_book", "times_hf")]
        percent = f"{row['roofline_fraction']:.0%}" if "roofline_fraction" in row else ""
        best = f"{row['times_book_at_roofline']:.1f}" if "times_book_at_roofline" in row else ""
        cells = (row["what"], NAMES[row["contender"]], value, *ratios, percent, best)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def accuracy_lines(runs):
    """Return a Markdown table of the test accuracies: one line per seed, then mean and standard deviation."""
    if not runs:
        return []
    runs = pd.DataFrame(runs).set_index("seed")
    points = 100 * runs[["book", "ours"]].assign(difference=runs["ours"] - runs["book"])
    rows = points.join(runs[["book_seconds", "ours_seconds"]])
    if len(rows) > 1:
        rows = pd.concat([rows, rows.agg(["mean", "std"]).set_axis(["mean", "standard deviation"])])
    cells = "| {} | {:.2f} % | {:.2f} % | {:.2f} | {:.0f} | {:.0f} |"
    return [
        "| gpt2-tiny, seed | printed loop | ours | ours − printed loop | seconds: printed loop | ours |",
        "|---|--:|--:|--:|--:|--:|", *(cells.format(*row) for row in rows.itertuples()), "",
    ]


def plot(rows, path):
    """Save a bar chart of every row's ratio to the book's loop (log scale), if there is one."""
    import matplotlib.pyplot as plt  # not for the contenders' processes

    plt.switch_backend("agg")
    rows = pd.DataFrame([row for row in rows if "times_book" in row and row["contender"] in ("ours", "hf")])
    if rows.empty:
        return
    ratios = rows.pivot(index="what", columns="contender", values="times_book")
    ratios = ratios.loc[rows["what"].unique(), [name for name in ("ours", "hf") if name in ratios]]
    ax = ratios.rename(columns=NAMES).plot.barh(figsize=(7, 0.45 * len(ratios) + 1.2), width=0.8, logx=True)
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12, y=0.02)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set(xlabel="times the book's loop (more is better)", ylabel="")
    ax.legend()
    ax.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(ax.figure)

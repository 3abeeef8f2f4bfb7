"""What `benchmark.py` writes: floors, ratios, the table, the figure, and a file of random weights."""

import json

import numpy as np
import pandas as pd

NAMES = {"book": "book's loop", "ours": "ours", "hf": "transformers + PEFT", "compiled": "ours, compiled"}


def block_parameters(config):
    """Weights of one transformer block's matrices: 12 D²."""
    return 12 * config["emb_dim"] ** 2


def message_flops(config, messages):
    """Operations of one forward pass that no side can spare, for all `messages`; backward takes as many.

    Two a weight and real token; of the last block, keys and values at all tokens (2 D² of its 12 D²)
    and the rest at the last token alone. Attention's own products (about 1%) and adapters (4%) are left out.
    """
    tokens, block = sum(len(ids) for ids in messages), block_parameters(config)
    last = (tokens * 2 + len(messages) * 10) / 12
    return 2 * block * ((config["n_layers"] - 1) * tokens + last)


def token_seconds(config, machine, batch):
    """Seconds that no side can spare for one token of each of `batch` texts: weights read, or products."""
    weights = config["n_layers"] * block_parameters(config) + config["vocab_size"] * config["emb_dim"]
    return max(4 * weights / machine["bytes_per_second"], 2 * weights * batch / machine["float32_flops"])


def floor_seconds(row, machine, config):
    """Seconds that a unit of `row` takes at the machine's measured best, None where there is no floor.

    Takes out of the row what a unit needs: "flops", "bytes" read, or "tokens", one for each of so many texts.
    """
    if flops := row.pop("flops", None):
        return flops / machine["float32_flops" if row["side"] == "book" else "flops"]
    if size := row.pop("bytes", None):
        return size / machine["bytes_per_second"]
    if batch := row.pop("tokens", None):
        return token_seconds(config, machine, batch) / batch
    return None


def finish(report, config):
    """Add to every row its share of the floor and its ratios to the other sides, in place.

    "times_book_at_floor" is the ratio that a side would reach if it spent no time but the floor's.
    """
    rows = report["rows"]
    values = {(row["what"], row["side"]): row["value"] for row in rows}
    for row in rows:
        is_rate = row["unit"].endswith("/s")
        for other, key in (("book", "times_book"), ("hf", "times_hf")):
            if (row["what"], other) in values and other != row["side"]:
                ratio = row["value"] / values[row["what"], other]
                row[key] = ratio if is_rate else 1 / ratio
        if floor := floor_seconds(row, report["machine"], config):
            row["floor_share"] = floor * row["value"] if is_rate else floor / row["value"]
            if "times_book" in row:
                row["times_book_at_floor"] = row["times_book"] / row["floor_share"]


def table(report):
    """Return a Markdown table, a line a measurement, with what it was measured on above it."""
    machine, messages, low = report["machine"], report["messages"], report["precision"]
    rates = {"float32": machine["float32_flops"], low: machine["flops"]}
    peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    lines = [
        f"{messages['count']} messages, {messages['data']}: mean {messages['mean_tokens']:.1f} tokens, "
        f"longest {messages['longest']}; grouped by length, {messages['padding']:.1%} padding.",
        f"{machine['processor']}, {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}: matrix products {peaks}, memory {machine['bytes_per_second'] / 1e9:.1f} "
        f"GB/s; ours and transformers train in {low}.",
    ]
    if report["rows"] and not any(row["side"] == "hf" for row in report["rows"]):
        lines.append("The third side did not run; if it is missing: pip install transformers peft.")
    if report["rows"]:
        lines += row_lines(report["rows"])
    lines.append("")
    if shares := report.get("shares"):
        listed = ", ".join(f"{share:.1f} % {kind}" for kind, share in shares.items())
        lines += [f"Our training step's time: {listed}.", ""]
    lines += accuracy_lines(report.get("accuracies", []))
    note = "; ~ extrapolated from the token halfway" if any(map(is_extrapolated, report["rows"])) else ""
    return "\n".join([*lines, f"{report['seconds'] / 60:.1f} minutes{note}."])


def is_extrapolated(row):
    return row.get("extrapolated", False)


def row_lines(rows):
    """Return a Markdown table, a line a row."""
    lines = [
        "", "| | side | median | times the book's | times transformers + PEFT | share of the floor "
        "| times the book's at the floor |", "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        value = f"{'~' if is_extrapolated(row) else ''}{row['value']:.4g} {row['unit']}"
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("times_book", "times_hf")]
        share = f"{row['floor_share']:.0%}" if "floor_share" in row else ""
        best = f"{row['times_book_at_floor']:.1f}" if "times_book_at_floor" in row else ""
        lines.append("| " + " | ".join((row["what"], NAMES[row["side"]], value, *ratios, share, best)) + " |")
    return lines


def accuracy_lines(runs):
    """Return a Markdown table of the test accuracies, a line a seed, and one with means and spreads."""
    if not runs:
        return []
    runs = pd.DataFrame(runs)
    points = 100 * runs[["book", "ours"]].assign(difference=runs["ours"] - runs["book"])
    lines = ["| gpt2-tiny, seed | printed loop | ours | difference | seconds: printed loop | ours |",
             "|---|--:|--:|--:|--:|--:|"]
    for run, (book, ours, difference) in zip(runs.itertuples(), points.to_numpy()):
        lines.append(f"| {run.seed} | {book:.2f} % | {ours:.2f} % | {difference:+.2f} "
                     f"| {run.book_seconds:.0f} | {run.ours_seconds:.0f} |")
    if len(runs) > 1:
        cells = [f"{points[name].mean():.2f} ± {points[name].std():.2f}" for name in points]
        seconds = [f"{runs[name].mean():.0f}" for name in ("book_seconds", "ours_seconds")]
        lines.append("| mean ± standard deviation | " + " | ".join(cells + seconds) + " |")
    return [*lines, ""]


def plot(report, path):
    """Save a bar chart of every measurement's ratio to the book's loop (log scale)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if "times_book" in row and row["side"] in ("ours", "hf")]
    whats = list(dict.fromkeys(row["what"] for row in rows))
    fig, ax = plt.subplots(figsize=(7, 0.45 * len(whats) + 1.2), layout="constrained")
    for offset, (side, colour) in enumerate((("ours", "tab:blue"), ("hf", "tab:orange"))):
        chosen = [row for row in rows if row["side"] == side]
        places = [whats.index(row["what"]) + 0.4 * offset for row in chosen]
        bars = ax.barh(places, [row["times_book"] for row in chosen], 0.38, label=NAMES[side], color=colour)
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    ax.set_yticks([place + 0.2 for place in range(len(whats))], whats)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.margins(x=0.12, y=0.02)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("times better than the book's loop")
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def weight_shapes(config):
    """Names and shapes of the tensors in Hugging Face's GPT-2 file."""
    width = config["emb_dim"]
    yield "wte.weight", (config["vocab_size"], width)
    yield "wpe.weight", (config["context_length"], width)
    for layer in range(config["n_layers"]):
        for name, n_in, n_out in (
            ("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1),
        ):
            yield f"h.{layer}.{name}.weight", (n_in * width, n_out * width)
            yield f"h.{layer}.{name}.bias", (n_out * width,)
        for norm in ("ln_1", "ln_2"):
            yield f"h.{layer}.{norm}.weight", (width,)
            yield f"h.{layer}.{norm}.bias", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def weight_bytes(config):
    return 4 * sum(int(np.prod(shape)) for _, shape in weight_shapes(config))


def write_weights(folder, config):
    """Write random weights as a folder that both `gpt_download.load_gpt2` and transformers read."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in weight_shapes(config):
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(123)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in weight_shapes(config):
            file.write(rng.standard_normal(shape, dtype=np.float32).tobytes())
    keys = {"n_embd": "emb_dim", "n_head": "n_heads", "n_layer": "n_layers"}
    sizes = {key: config[ours] for key, ours in keys.items()}
    hparams = {"n_vocab": config["vocab_size"], "n_ctx": config["context_length"], **sizes}
    (folder / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
    hf = {"vocab_size": config["vocab_size"], "n_positions": config["context_length"], **sizes}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **hf}), encoding="utf-8")

"""The plots of chapter 4's numbers. The arguments are tensors, arrays or sequences of numbers."""

import matplotlib.pyplot as plt

KINDS = {  # kind of part: what the names of its parameters contain
    "token embedding": "tok_emb", "position embedding": "pos_emb", "attention": ".att.",
    "feed-forward": ".ff.", "layer norms": "norm", "output head": "out_head",
}


def normalised_tokens(before, after):
    """Left: histograms of three tokens' 768 values, with different centres and widths. Right: after layer
    normalisation the three histograms lie on top of each other, with mean 0 and variance 1."""
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for ax, title, values in zip(axes, ("before", "after layer normalisation"), (before, after)):
        for number, row in enumerate(values, start=1):
            ax.hist(row.tolist(), bins=40, alpha=0.55, label=f"token {number}")
        ax.set(title=title, xlabel="value", yticks=[])
    axes[0].legend()
    return fig


def gradients(without, with_shortcuts):
    """Pairs of bars on a logarithmic axis, the mean gradient of five layers. Without shortcuts it falls from
    0.005 in layer 5 to 0.0002 in layer 1; with them it is above 0.2 in every layer."""
    fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    layers = range(1, len(without) + 1)
    ax.bar([layer - 0.2 for layer in layers], without, width=0.4, label="without shortcuts")
    ax.bar([layer + 0.2 for layer in layers], with_shortcuts, width=0.4, label="with shortcuts")
    ax.set(yscale="log", ylim=(5e-5, 5), xlabel="layer", ylabel="mean |gradient|")
    ax.legend(ncols=2, loc="upper left")
    return fig


def attention_weights(words, weights):
    """A grid of attention weights, a row for each token of the text, a column for each token that it may
    look at. The part above the diagonal is masked; each row adds up to 1."""
    fig, ax = plt.subplots(figsize=(4.2, 3.3), layout="constrained")
    visible = [
        [weight if column <= row else float("nan") for column, weight in enumerate(line)]
        for row, line in enumerate(weights.tolist())
    ]
    ax.imshow(visible, cmap="Blues", vmin=0, vmax=2)
    for row, line in enumerate(visible):
        for column, weight in enumerate(line):
            ax.text(column, row, f"{weight:.2f}" if column <= row else "masked", ha="center", va="center")
    ax.set_xticks(range(len(words)), words)
    ax.set_yticks(range(len(words)), words)
    ax.set(xlabel="looks at", ylabel="token")
    return fig


def parameter_shares(models):
    """Stacked bars, one for each size of GPT-2: which fraction of its parameters is in each kind of part. In
    the small model the embeddings and the output head hold almost half; in the XL model attention and
    feed-forward networks hold nine tenths."""
    fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
    left = [0.0] * len(models)
    colors = ("C0", "C4", "C1", "C2", "black", "C3")
    for (kind, key), color in zip(KINDS.items(), colors):
        shares = [share_of(model, key) for model in models.values()]
        ax.barh(list(models), shares, left=left, label=kind, color=color)
        left = [start + share for start, share in zip(left, shares)]
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="share of all parameters (%)")
    fig.legend(loc="outside upper center", ncols=3)
    return fig


def share_of(model, key):
    """Return the percentage of a model's parameters whose names contain `key`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return 100 * sum(size for name, size in sizes.items() if key in name) / sum(sizes.values())


def token_confidence(tokens, probabilities, vocab_size):
    """Bars of the probability of ten tokens that greedy decoding chose, one below the other. All are near
    0.02 percent; a dashed line at 0.002 percent marks what each token would have if all were alike."""
    fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    ax.barh(range(len(tokens)), [100 * float(p) for p in probabilities], tick_label=tokens)
    ax.axvline(100 / vocab_size, ls="--", color="black", label="if all tokens were alike")
    ax.invert_yaxis()
    ax.set(xlabel="probability of the chosen token (%)", xlim=(0, 0.04))
    ax.legend()
    return fig

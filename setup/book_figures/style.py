"""The one style of all figures: colours that colour-blind readers can tell apart, text for a projector.

Importing `book_figures` applies STYLE to matplotlib.
"""

from cycler import cycler

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), without yellow, which is too light for lines.
PALETTE = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#A6559D",
    "sky": "#56B4E9",
    "amber": "#E69F00",
    "ink": "#222222",
    "grey": "#8A8A8A",
}
TINTS = {  # of the same colours, as fills under dark text
    "blue": "#D6E8F5",
    "orange": "#FBE0D1",
    "green": "#D3EFE5",
    "purple": "#EEDDF0",
    "sky": "#E1F1FB",
    "amber": "#FCEFCF",
    "grey": "#EDEDED",
    "white": "#FFFFFF",
}
LINES = [PALETTE[name] for name in ("blue", "orange", "green", "purple", "sky", "amber", "ink", "grey")]

STYLE = {
    "figure.facecolor": "white",  # opaque, so that dark text stays legible in a dark notebook
    "savefig.facecolor": "white",
    "axes.prop_cycle": cycler(color=LINES),
    "axes.edgecolor": PALETTE["ink"],
    "axes.labelcolor": PALETTE["ink"],
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["ink"],
    "ytick.color": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.cmap": "cividis",
    "svg.hashsalt": "book_figures",  # the same figure gives the same file
}

"""How much memory a training step needs, from a model's shape alone.

The model is a GPT-2 as chapter 4 prints it, trained by a plain loop (backward, AdamW's step, zero_grad).
The peak of a step is

    weights + optimizer + max(activations + temporary, gradients + scratch)

because activations are freed while gradients appear. All sizes are in bytes. They are those of tensors: on
a CPU, Python and torch take some 300 MB more, and torch's libraries keep buffers of their own.
"""

from dataclasses import dataclass

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 4.127 / 8}  # per frozen weight
WHAT_TRAINS = ("lora", "full", "last-block")
BODY = ("query", "key", "value", "projection", "mlp")
FLOAT32 = 4  # bytes, of what trains, its gradient and each of AdamW's two averages
MATRICES = {role: [(1, 1)] for role in BODY} | {"mlp": [(1, 4), (4, 1)]}  # (inputs, outputs) in widths


@dataclass(frozen=True)
class Shape:
    """A GPT-2's sizes: blocks, width D, heads, tokens in the vocabulary and in the context.

    A context of 0: there are no position embeddings, and texts may have any number of tokens.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024

    @property
    def matrices(self):
        """Return the number of weights in the linear layers of the blocks, 12 D² in each."""
        return 12 * self.layers * self.width**2

    @property
    def body(self):
        """Return the number of parameters without a head: embeddings, blocks, norms."""
        D = self.width
        return self.matrices + 13 * self.layers * D + (self.vocabulary + self.context + 2) * D


GPT2_SHAPES = {  # tiny: this repository's own
    "tiny": Shape(6, 192, 6, context=256),
    "124M": Shape(12, 768, 12),
    "355M": Shape(24, 1024, 16),
    "774M": Shape(36, 1280, 20),
    "1558M": Shape(48, 1600, 25),
}


def shape_of(parameters):
    """Return the `Shape` of about so many parameters, with heads 128 wide and as many of them as layers.

    12 · layers · D² = parameters, with D = 128 · layers, gives 33 layers, 4,224 wide, for 7e9. Raises
    ValueError for a number out of 1e8 to 1e13.
    """
    if not 1e8 <= parameters <= 1e13:
        raise ValueError(f"params must be from 1e8 to 1e13, not {parameters:g}: for less give a Shape")
    layers = round((parameters / (12 * 128**2)) ** (1 / 3))
    return Shape(layers, 128 * layers, layers, vocabulary=32000, context=0)


@dataclass(frozen=True)
class MemoryEstimate:
    """The terms of a step's peak in bytes, and how many parameters there are and train."""

    parameters: int
    trained: int
    weights: float
    optimizer: float  # AdamW's two averages
    gradients: float
    activations: float  # what the backward pass needs of the forward pass
    temporary: float  # values of the layer that is being computed
    scratch: float  # of AdamW, while it updates the largest weight

    @property
    def total(self):
        """Return the peak of a step in bytes."""
        step = max(self.activations + self.temporary, self.gradients + self.scratch)
        return self.weights + self.optimizer + step


def estimate_memory(
    shape, method="lora", rank=16, targets=BODY, base_dtype="float32", batch_size=8, tokens=120,
    classes=2, fused_attention=False, gradient_checkpointing=False,
):
    """Return the `MemoryEstimate` of a training step on `batch_size` texts of `tokens` tokens each.

    - `method`: "lora", "full" (all weights) or "last-block" (that one, the final norm and the head)
    - `rank`, `targets`: of LoRA; roles of `BODY`
    - `base_dtype`: of the frozen weights, a key of `BYTES`; what trains is in float32. In "int8" and "nf4"
      the matrices of the blocks are packed, everything else takes 2 bytes
    - `classes`: outputs of a new head, which trains in full; None: a language model, whose head is tied
    - `fused_attention`: torch's kernel, which stores no T × T weights
    - `gradient_checkpointing`: of the activations keep only the blocks' inputs

    Raises ValueError for a value out of its range.
    """
    sizes = {"rank": rank, "batch_size": batch_size, "tokens": tokens, "classes": classes or 1}
    check_sizes(shape, method, targets, base_dtype, sizes)
    frozen_bytes = BYTES[base_dtype]
    value_bytes = max(frozen_bytes, 2)
    head = 0 if classes is None else (shape.width + 1) * classes
    trained, largest = count_trained(shape, method, rank, targets, head)
    total = shape.body + head + (trained - head if method == "lora" else 0)
    packed = shape.matrices if frozen_bytes < 2 else 0
    frozen = total - trained - packed
    kept, temporary = activation_bytes(
        shape, method, rank, targets, value_bytes, tokens, fused_attention, gradient_checkpointing
    )
    outputs = shape.vocabulary if classes is None else classes
    kept += 3 * FLOAT32 * outputs  # logits' softmax, and the loss's gradient before and after it
    return MemoryEstimate(
        parameters=total, trained=trained,
        weights=FLOAT32 * trained + value_bytes * frozen + frozen_bytes * packed,
        optimizer=2 * FLOAT32 * trained, gradients=FLOAT32 * trained,
        activations=batch_size * tokens * kept, temporary=batch_size * tokens * temporary,
        scratch=2 * FLOAT32 * largest,
    )


def check_sizes(shape, method, targets, base_dtype, sizes):
    """Raise ValueError, naming the possible values, for an option out of its range."""
    for name, value, known in (("method", method, WHAT_TRAINS), ("base_dtype", base_dtype, BYTES)):
        if value not in [*known]:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if not {*targets} or {*targets} - {*BODY}:
        raise ValueError(f"targets must be some of {', '.join(BODY)}, not {', '.join(targets)}")
    if method != "lora" and BYTES[base_dtype] < 2:
        raise ValueError(f"weights in {base_dtype} cannot be trained: take the method lora or another dtype")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if sizes["tokens"] > shape.context > 0:
        raise ValueError(f"tokens must be at most {shape.context}, the model's context")


def count_trained(shape, method, rank, targets, head):
    """Return how many parameters train, those of a new `head` included, and how many the largest has."""
    D, tied = shape.width, shape.vocabulary * shape.width
    if method == "full":
        return shape.body + head, max(tied, 4 * D * D)
    if method == "last-block":
        return 12 * D * D + 15 * D + (head or tied), max(4 * D * D, head or tied)
    pairs = [pair for role in {*targets} for pair in MATRICES[role]]  # (inputs, outputs) in widths
    widths = shape.layers * sum(map(sum, pairs))
    return rank * D * widths + head, max(head, rank * D * max(map(max, pairs)))


def activation_bytes(shape, method, rank, targets, value_bytes, tokens, fused, checkpointing):
    """Return the bytes per token that are kept for the backward pass, and those of temporary values.

    Numbers kept per token and block, D wide: of two norms the input and its difference from the mean
    (4 D), queries, keys and values (3 D), for each head a row of T attention weights, GELU's input (4 D).
    What trains adds its input: the common one of query, key and value (D), the projection's (D), those of
    the MLP (D + 4 D), two norms' results (2 D); LoRA x A (rank). LoRA in half precision copies its inputs to
    float32, for query, key and value one each. Temporary are two results of the MLP's first layer, with
    LoRA three, or three tensors of attention weights. The last block's first norm keeps no input if the
    other blocks are frozen.
    """
    D, attention = shape.width, 0 if fused else shape.heads * tokens
    roles = {*targets} if method == "lora" else {*BODY}
    joint = roles & {"query", "key", "value"}
    copies = method == "lora" and value_bytes < FLOAT32
    inputs = (len(joint) if copies else bool(joint)) + ("projection" in roles) + 5 * ("mlp" in roles)
    norms = 6 if method == "full" else 4
    low = sum(rank * len(MATRICES[role]) for role in roles) if method == "lora" else 0
    block = value_bytes * ((norms + 7) * D + attention) + FLOAT32 * low
    block += (FLOAT32 if copies else value_bytes) * inputs * D
    blocks = 1 if method == "last-block" or checkpointing else shape.layers
    kept = value_bytes * shape.layers * D if checkpointing and method != "last-block" else 0
    results = 3 if method == "lora" and "mlp" in roles else 2
    temporary = max(results * 4 * D, 3 * attention)
    return kept + blocks * block, value_bytes * temporary

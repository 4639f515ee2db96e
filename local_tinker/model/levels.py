"""What a layer keeps for its backward pass. No torch.

Legend: H hidden, F intermediate, Q query width, K key width, R rank of the adapter.
"""

TILED = ("layer", "offload")  # nothing of the MLP is kept, so it may be computed in tiles of rows
TILE = 8192  # rows of such a tile where nobody chooses

# Shallowest first. Norm outputs and act(gate) * up are never kept: they cost one pass over memory to make again, which
# the backward's own kernels do on the way.
LEVELS = (
    # the input h (H); q, k and v (Q + 2K); the attention output (Q) and its log-sum-exp; the residual after attention
    # (H); gate and up (2F); each adapter's thin x A^T (R). Families with norms after the blocks: the blocks' outputs too.
    "norms",
    # gate and up are computed again; down never is
    "mlp",
    # q, k and v too, from the input; attention itself is not run again
    "attention_mlp",
    # the input alone: everything but down is computed again
    "layer",
    # the input alone, and that in pinned host memory
    "offload",
)

"""All that is said of single model types; everything else is found by looking at a model. Each has its reason."""

from __future__ import annotations

# model_type → why no way to split it is offered, though its modules look as if there were some.
REFUSED = {
    "phi3small": "mlx-lm's own model file ends the process on a CPU (MLX 0.32.4), so that it cannot be checked",
}

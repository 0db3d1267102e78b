"""All that is said of single model types; everything else is found by looking at a model. Each has its reason."""

from __future__ import annotations

from types import ModuleType

# model_type → why no way to split it is offered, though its modules look as if there were some.
REFUSED = {
    "phi3small": "mlx-lm's own model file ends the process on a CPU (MLX 0.32.4), so that it cannot be checked",
}

# model_type → why it answers one request at a time, though its caches look as if they took several rows.
ONE_ROW = {
    "afm7": "its last layers count the padding of shorter rows as tokens (mlx-lm 0.32.2)",
}


def find_own_file(model_type: object) -> ModuleType | None:
    """Return the model file that takes the place of mlx-lm's, None where there is none."""
    if model_type == "dbrx":
        # mlx-lm's loops over tokens in Python, and has a list of experts, which cannot be shared out.
        from moectl.shards.look import dbrx  # here, because mlx-lm cannot be imported with a wrong variable of the Hub

        return dbrx
    return None

"""`bigkern generate`: text from a run's language model."""

from pathlib import Path
from typing import Any

from bigkern.train.errors import UserError
from bigkern.train.saved import load_run
from bigkern.train.text import to_tokens


def generate(
    folder: Path, prompt: str, max_new_tokens: int | None = None, device: str = "auto", **how: Any
) -> None:
    """Print `prompt` and how the model of the run in `folder` goes on.

    `how` are temperature, top_k, top_p and seed of :meth:`Transformer.generate`. Raises UserError
    for a prompt or an option that it refuses.
    """
    if how.get("seed") is not None and not 0 <= how["seed"] < 2**63:
        raise UserError(f"seed must be in [0, 2**63), got {how['seed']}")
    run = load_run(folder, device)
    if not run.is_language_model:
        raise UserError(f"{folder} holds a model that classifies images, no language model")
    model = run.model
    tokens = to_tokens(prompt.encode()).long()
    if max_new_tokens is None:
        max_new_tokens = max(1, model.config.context - len(tokens))
    try:
        (text,) = model.generate([tokens], max_new_tokens, **how)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(bytes(text.tolist()).decode(errors="replace"))

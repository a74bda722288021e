"""`bigkern generate`: text from a run's language model."""

from pathlib import Path
from typing import Any

from bigkern.models import Transformer
from bigkern.train.checkpoint import CheckpointError, load_latest
from bigkern.train.config import VOCAB_SIZE, TransformerTrainConfig
from bigkern.train.errors import UserError
from bigkern.train.setup import pick_device
from bigkern.train.text import to_tokens


def load_language_model(folder: Path, device: str = "auto") -> Transformer:
    """Load the language model of the run in `folder` onto `device`. Raises UserError where there is
    none."""

    def use(path: Path, state: dict[str, Any]) -> Transformer:
        identity = state["identity"]
        model = f"{identity.get('model')} ({identity.get('objective', 'no task')})"
        if model != "Transformer (lm)":
            raise CheckpointError(path, f"its model is {model}, not Transformer (lm)")
        if identity.get("vocab_size") != VOCAB_SIZE:
            raise CheckpointError(
                path, f"its vocabulary has {identity.get('vocab_size')} tokens, not {VOCAB_SIZE}"
            )
        try:
            model = Transformer(TransformerTrainConfig(**state["config"]).model())
            model.load_state_dict(state["model"])
        except (KeyError, TypeError, RuntimeError, UserError) as error:
            raise CheckpointError(path, f"its state doesn't fit ({error})") from error
        return model

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    return load_latest(folder, use).to(pick_device(device)).eval()


def generate(
    folder: Path, prompt: str, max_new_tokens: int | None = None, device: str = "auto", **how: Any
) -> None:
    """Print `prompt` and how the model of the run in `folder` goes on.

    `how` are temperature, top_k, top_p and seed of :meth:`Transformer.generate`. Raises UserError
    for a prompt or an option that it refuses.
    """
    if how.get("seed") is not None and not 0 <= how["seed"] < 2**63:
        raise UserError(f"seed must be in [0, 2**63), got {how['seed']}")
    model = load_language_model(folder, device)
    tokens = to_tokens(prompt.encode()).long()
    if max_new_tokens is None:
        max_new_tokens = max(1, model.config.context - len(tokens))
    try:
        (text,) = model.generate([tokens], max_new_tokens, **how)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(bytes(text.tolist()).decode(errors="replace"))

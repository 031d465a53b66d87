"""What requests cost."""

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sentence_transformers_inf.reading import read_json
from sentence_transformers_inf.recipe import is_finite


class Prices:
    """US dollars per million tokens, by model.

    Args:
        file: A JSON file like the bundled ``prices.json``, whose models take precedence over it.
        overrides: ``MODEL=INPUT,OUTPUT`` as on the command line; these come first.
        factor: 0.5 for the Batch API.
        free: Everything costs nothing: a local server.

    Raises:
        ValueError: A price that cannot be read.
    """

    def __init__(
        self, file: Path | None = None, overrides: Sequence[str] = (), *, factor: float = 1.0, free: bool = False
    ) -> None:
        table = json.loads((resources.files("dataset_builder") / "prices.json").read_text(encoding="utf-8"))
        self.as_of: str = table["as_of"]
        self.factor = factor
        self.free = free
        models = table["models"]
        if file is not None:
            listed = read_json(file)
            if not isinstance(listed, dict) or not isinstance(listed.get("models"), dict):
                raise ValueError(f"{file}: expected JSON with 'models': {{name: [input, output]}}")
            models |= listed["models"]
        for item in overrides:
            name, _, price = item.rpartition("=")
            try:
                models[name] = [float(part) for part in price.split(",")]
            except ValueError:
                models[name] = []
            if not name or not _is_price(models[name]):
                expected = "MODEL=INPUT,OUTPUT in dollars per million tokens, as gpt-4o=2.5,10"
                raise ValueError(f"--price {item}: expected {expected}")
        if wrong := sorted(name for name, price in models.items() if not _is_price(price)):
            raise ValueError(
                f"{file}: the price of {wrong[0]!r} is none, expected [input, output] in dollars per million tokens"
            )
        self._models: dict[str, tuple[float, float]] = {name: (price[0], price[1]) for name, price in models.items()}

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens.

        Raises:
            ValueError: The model's price is not known.
        """
        if self.free:
            return 0.0
        price = self._models.get(model) or self._models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
        if price is None:
            raise ValueError(
                f"the price of {model!r} is not known: pass --price {model}=INPUT,OUTPUT in dollars per million tokens "
                "(0,0 for a server of your own)"
            )
        return self.factor * (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


def _is_price(value: Any) -> bool:
    """Whether this is the dollars for a million tokens of prompt and answer."""
    numbers = isinstance(value, list) and all(type(part) in (int, float) for part in value)
    return numbers and len(value) == 2 and all(is_finite(part) and part >= 0 for part in value)

"""What is known of language models by their names."""

import functools
import re
from dataclasses import dataclass, replace

THINKING_TOKENS = 4000
"""Room for the thoughts of a model that thinks before it answers, beside its answer."""

LOCAL_CONTEXT = 4096
"""Tokens of one question with its answer, of a model that is served on this machine."""


@dataclass(frozen=True)
class Model:
    """What a model can do; as it stands, a model of which nothing is known."""

    thinks: bool = False
    """Thinks before it answers, at the expense of the same limit on tokens."""
    effort: bool = False
    """Takes ``reasoning_effort``."""
    temperature: bool = True
    """Takes ``temperature``."""
    context: int = 32_768
    """Tokens of question and answer."""
    output: int = 16_384
    """Tokens of the longest answer, thoughts included."""
    batch_tokens: int = 1_000_000
    """Prompt tokens that a new account may have waiting in the Batch API."""


_O = Model(thinks=True, effort=True, temperature=False, context=200_000, output=100_000)

_MODELS = {
    r"gpt-4o-mini|gpt-4\.1-(?:mini|nano)": Model(context=128_000, batch_tokens=2_000_000),
    r"gpt-4o": Model(context=128_000, batch_tokens=90_000),
    r"gpt-4\.1": Model(context=1_000_000, output=32_768, batch_tokens=900_000),
    r"gpt-5[^/]*chat": Model(context=128_000),
    r"gpt-5": replace(_O, context=400_000, output=128_000),
    r"o\d": _O,
    r"gpt-oss": Model(thinks=True, effort=True, context=131_072, output=131_072),
    r"qwen3(?!.*(?:instruct|coder))|qwq|deepseek-r(?:1|easoner)": Model(thinks=True, output=32_768),
}
"""By a pattern at the beginning of the name; the first that fits counts."""


@functools.cache
def known(name: str) -> Model:
    """What is known of a model, whoever serves it: ``openai/o3-mini`` is ``o3-mini``."""
    plain = name.lower().rpartition("/")[2].removeprefix("ft:")
    model = next((model for pattern, model in _MODELS.items() if re.match(pattern, plain)), Model())
    if plain.endswith(".gguf"):  # served here, where there is no room to think unless it turns out that the model does
        model = replace(model, thinks=False, context=LOCAL_CONTEXT, output=LOCAL_CONTEXT)
    return model


def longest_passage(writer: str, judge: str) -> int:
    """Words of the longest passage that a build can work on with these models.

    The writer writes two passages of 1.4 times as many words, for which it is given five tokens a word; the judge reads
    three. A word that is read takes two tokens at most, and 700 are for the rest of a prompt.
    """
    writes, judges = known(writer), known(judge)
    room, judge_room = (THINKING_TOKENS * model.thinks for model in (writes, judges))
    written = min((writes.output - room - 100) // 7, (writes.context - room - 700) // 9)
    return max(1, int(min(written, (judges.context - judge_room - 700) / 8.4)))

"""What an instruction excludes: found in its words, and taken out of its query's embedding.

An embedding holds the words that a text names, denied or not: "nothing about pricing" is close to passages on pricing. So
what is excluded is encoded by itself, and a share of its embedding is subtracted from the query's (after DEO,
arXiv:2603.09185). Passages stay as they are.

:func:`find_exclusions` is a rule for English, not a parser. An instruction is cut into clauses, at punctuation and before
*but*. A clause excludes what follows a word such as *without* or *leave out*, or what stands before *is not wanted*. A
clause that denies twice ("nothing that is not official") or that only seems to deny ("not only", "no later than") is left
alone.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

_SUBJECTS = r"(?:I|we|you|he|she|they|who|nobody|someone|somebody)"
_VERBS = r"(?:want|need|wish for|like|care (?:for|about)|look for|ask for|require)"
_CUES = "|".join(
    (
        r"without|excluding|except(?:ing)?(?: for)?|(?:something |anything |everything )?(?:other|else) than|apart from|"
        r"aside from|(?:any|every)(?:thing|body| \w+) but|rather than|instead of|as opposed to|free (?:of|from)",
        r"nothing|none of|no(?= \w)|(?:^|(?<=[,;] )|(?<=and )|(?<=so )|(?<=or ))not",
        r"leav(?:e|ing) (?:out|aside|off)|skip(?:ping)?|(?:rule|ruling|screen|keep|sort) out|avoid(?:ing)?|omit(?:ting)?|"
        r"ignor(?:e|ing)|exclude|drop|spare (?:me|us|them)|stay(?:ing)? (?:away from|clear of|off)|steer(?:ing)? clear of",
        rf"(?:{_SUBJECTS} )?(?:do not|don't|would not|wouldn't) {_VERBS}",
        r"(?:^|(?<=so )|(?<=please )|(?<=and )|(?<=[,;] ))(?:do not|don't|never) \w+(?: (?:up|on|in|me|us|to|into|at))*",
        r"(?:must|should|may|can|need) ?(?:not|n't)(?: be)? \w+(?: (?:up|on|in|off|to|into|from|at))*",
    )
)
_FILLERS = r"""(?:(?:please|me|us|anything|whatever|everything|all|any|those|ones?|what|pieces?|passages?|texts?|documents?|
articles?|pages?|answers?|solutions?|advice|sources?|suggestions?|stuff|things?|mentions?|talk|discussions?|accounts?|kinds?|sorts?|
ways?|methods?|routes?|options?|built|a|an|the|is|are|has|have|deals?|that|which|who|about|on|for|of|with|in|from|by|at|
involv(?:es?|ing)|requir(?:es?|ing)|needs?|needing|mention(?:s|ing)?|cover(?:s|ing)?|describ(?:es?|ing)|concern(?:s|ing)?|
concerned|goes|go|through|uses?|using|to|do|touching|relies|rely|relying|only|just|simply|merely|limited|written|dwell|
suggests?|offers?|starts?|repeats?)\ )*""".replace("\n", "")
_AFTER = re.compile(rf"(?:^|(?<=[\s(–—-]))(?:{_CUES})\s+{_FILLERS}(?P<what>\S.*)$", re.I)
_BEFORE = re.compile(
    r"^(?P<what>.+?),? (?:(?:(?:is|are|was|were|would be|will be) ?(?:not|n't)|isn't|aren't) (?:to be )?"
    r"(?:relevant|wanted|welcome|needed|useful|acceptable|sought|included|shown|(?:of|for) |what )"
    r"|(?:is|are|would be) (?:irrelevant|unwelcome|excluded|useless|insufficient|beside the point|out of place|out$|"
    r"(?:of )?no (?:use|good|help|interest|value)|already (?:covered|known))"
    r"|(?:(?:do|does|will|would|can|should|must|may) ?(?:not|n't)|won't|can't) "
    r"(?:count|help|serve|do$|answer|qualify|suit|belong|fit|interest|be (?:sent|shown|returned|included|used|listed))"
    r"|(?:should|must|can|may|has to|have to|is to|are to) be "
    r"(?:left (?:out|aside|off)|skipped|omitted|avoided|ignored|dropped|excluded|ruled out|rejected)"
    r"|comes? too late)",
    re.I,
)
_CUE = re.compile(rf"(?<!\w)(?:{_CUES}|not|n't|never)(?!\w)", re.I)
_ONLY_SEEMS = re.compile(
    r"\b(?:not (?:only|just|merely|simply|necessarily|yet|least|all|every|more|less|later|before|until|too|matter)|"
    r"no (?:more|less|later|earlier|longer|fewer|older|matter|doubt|one|idea|wonder)|(?:whether or|if|why|or) not|"
    r"nothing (?:but|more|less)|without (?:that|it|doubt)|unless)\b",
    re.I,
)
_CLAUSES = re.compile(
    r"[.;:!?()\n]+(?=\s|$)|,? but (?=not |no |nothing |never |leave |skip )|"
    r", (?=(?:and |so |please )*"
    r"(?:not|no|nothing|without|except|leave|skip|rule|avoid|other|spare|rather|apart|don't|do not)\b)",
    re.I,
)
_POINTERS = re.compile(r"(?:those|that|this|these|them|it|there|one|ones|either|any|so|me|us|such|please|at|all|\W)*", re.I)

_LONGEST = 500
"""Characters of a clause; what is longer is no sentence of an instruction, and would take the patterns long."""


def find_exclusions(instruction: str) -> list[str]:
    """What an instruction excludes, in its own words and order.

    Args:
        instruction: In English; in another language nothing is found.

    Returns:
        The phrases, without the words that deny; empty where nothing is excluded, or only by a pronoun ("not those").
    """
    clauses = [part.strip(" ,") for part in _CLAUSES.split(instruction)]
    return [what for clause in clauses if 0 < len(clause) < _LONGEST and (what := _excluded(clause))]


def _excluded(clause: str) -> str:
    """What a clause excludes, or an empty string."""
    if _ONLY_SEEMS.search(clause):
        return ""
    if before := _BEFORE.match(clause):
        what = before["what"].rpartition(", so ")[2]
        what = "" if _CUE.search(what) else what
    else:
        after = _AFTER.search(clause) if len(_CUE.findall(clause)) == 1 else None
        what = after["what"] if after else ""
    what = re.split(r", (?:and (?:it|they)|which|as|since|because|I|we|they|it|thanks)\b", what, maxsplit=1)[0].strip(" ,")
    what = re.sub(rf"^{_FILLERS}", "", re.sub(r",? please$", "", what), flags=re.I)
    return "" if _POINTERS.fullmatch(what) else what


def compose_exclusions(modules: nn.Sequential) -> None:
    """Let the last of an encoder's modules subtract what its queries exclude; see :func:`_subtract`."""
    last: Any = modules[-1]
    if not getattr(last, "subtracts_exclusions", False):
        last.register_forward_hook(_subtract)
        last.subtracts_exclusions = True


def _subtract(module: nn.Module, args: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Subtract the last rows of a batch, which are exclusions, from the queries that they belong to.

    ``features["exclusions"]`` says which query each of the last rows belongs to, ``features["exclusion_weight"]`` how much
    of its direction is taken. An embedding keeps its length.
    """
    owners: list[int] = features.pop("exclusions", [])
    embeddings: Tensor = features["sentence_embedding"]
    if not owners:
        return features
    queries, excluded = embeddings[: -len(owners)], nn.functional.normalize(embeddings[-len(owners) :], dim=-1)
    lengths = queries.norm(dim=-1, keepdim=True)
    taken = torch.zeros_like(queries).index_add(0, torch.tensor(owners, device=queries.device), excluded)
    composed = nn.functional.normalize(queries / lengths - features["exclusion_weight"] * taken, dim=-1) * lengths
    features["sentence_embedding"] = torch.where(taken.any(dim=-1, keepdim=True), composed, queries)
    return features

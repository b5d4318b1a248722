"""What the report says of a verification, and what the parts of the verification hand to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """An input on which logits are compared."""

    name: str
    length: int
    """Tokens of each row, padding included."""
    padding: str
    """``none``, ``left`` or ``right``: a third of the row.  ``ragged``: on the left, no two rows of one length."""
    sample: int
    positions: str = "counted"
    """``counted``: of the real tokens, as Hugging Face's ``generate`` counts them.  ``packed``: the row holds two
    documents, and positions restart at 0 with the second, in the middle."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far logits are from the reference, over all real positions."""

    relative_error: float
    """||x - reference|| / ||reference||, Frobenius."""
    max_abs: float
    cosine: float
    kl: float
    """Mean over positions of KL(reference || x), in nats."""
    top1_agreement: float
    unexplained_flips: int
    """Positions whose most likely token differs although the reference's lead exceeds what rounding can turn."""


@dataclass(frozen=True)
class WorstPosition:
    """Where the candidate comes nearest to what is allowed at a position, or farthest beyond."""

    row: int
    position: int
    measure: str
    """``relative_error``, ``max_abs`` or ``kl``."""
    found: float
    allowed: float


@dataclass(frozen=True)
class WorstBlock:
    """The same among the blocks of the vocabulary."""

    first: int
    """The block's first token."""
    last: int
    relative_error: float
    allowed: float


@dataclass(frozen=True, kw_only=True)
class Judgement(Deviation):
    """A candidate's deviation beside what PyTorch's own allows."""

    tolerance: float
    """Of ``relative_error``."""
    allowed_kl: float
    positions_judged: int
    positions_failed: int
    worst_position: WorstPosition
    worst_block: WorstBlock
    passed: bool


@dataclass(frozen=True, kw_only=True)
class JudgedCase(Judgement, Case):
    """A case and how the candidate did on it."""

    yardsticks: dict[str, Deviation]
    """PyTorch at the run's precision by the name of its arithmetic; the last has the candidate's and sets what is
    allowed."""


@dataclass(frozen=True)
class Answer:
    """Greedy answers to a question, for people; nothing is judged by them."""

    question: str
    candidate: str
    """Of what was executed, see ``executed``."""
    pytorch: str
    tokens_agree: bool


@dataclass(frozen=True)
class JudgedGeneration:
    """A batch of generations, judged token by token."""

    name: str
    tokens: int
    """How many were judged, over all rows."""
    first_difference: int | None
    """The first new token, from 0, that is not PyTorch's choice in some row."""
    flips: int
    """Tokens that are not PyTorch's choice."""
    worst_gap: float
    """Of the flip that comes nearest to its limit or farthest beyond: PyTorch's logit of its choice minus that of the
    candidate's.  0 without a flip."""
    allowed_gap: float
    """What rounding explains there; without a flip, the narrowest limit of all positions."""
    passed: bool


@dataclass(frozen=True)
class Generation:
    """The generations that will be timed, judged."""

    cases: tuple[JudgedGeneration, ...]
    passed: bool


@dataclass(frozen=True)
class Outlier:
    """The worst case outside of what was assumed."""

    name: str
    relative_error: float
    max_abs: float
    cosine: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Outside:
    """What the engine does to inputs that break what was assumed: shown, not judged."""

    assumed: tuple[str, ...]
    cases: tuple[JudgedCase, ...]
    worst: Outlier


@dataclass(frozen=True)
class Verification:
    """Whether what was built computes the right thing."""

    executed: str
    """What ran: ``engine``, ``graph`` where no GPU could run one, or the rival's name."""
    arithmetic: str
    """In what it and its judge computed, in words."""
    factor: float
    """How many times PyTorch's own error is allowed."""
    cases: tuple[JudgedCase, ...]
    passed: bool
    """Every case, and every token where a generation is to be timed; false until all of them are judged."""
    answer: Answer | None = None
    generation: Generation | None = None
    outside: Outside | None = None
    stored: bool = False
    """It is that of the stored engine, made when it was built."""

    def __str__(self) -> str:
        generated = sum(case.tokens for case in self.generation.cases) if self.generation else 0
        also = f", {generated} generated tokens" if generated else ""
        return f"{len(self.cases)} cases on the {self.executed}{also}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, over what other text would have given."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GreedyTexts:
    """Greedy continuations of pieces of the text, beside those of the unquantised model."""

    texts: int
    tokens: int
    """New ones in each."""
    parted: int
    """How many texts are not the same to their end."""
    first_token: int | None
    """The earliest new token, from 0, at which one of them parts; null where none does."""
    agreed_tokens: float
    """Mean number of new tokens before a text parts."""


@dataclass(frozen=True)
class PrecisionCost:
    """The model as it was executed beside the unquantised one, on the same tokens of the same text."""

    executed: str
    """What ran: ``engine``, ``graph`` where no GPU could run one, or the rival's name, which ran eagerly."""
    reference: str
    """What it is compared with, in words."""
    text: str
    """The file, or which text every machine has."""
    text_sha256: str
    tokens: int
    """How many were predicted."""
    context: int
    """The most tokens that one of them was predicted from."""
    perplexity: Estimate
    """exp of the mean of -log p of each token, in the text's order; p is what was executed gives."""
    reference_perplexity: Estimate
    increase: Estimate
    """Of perplexity, as a share of the reference's: token by token beside it, so its interval is the narrower one."""
    kl: float
    """Mean over tokens of KL(reference || executed), in nats."""
    top1_agreement: float
    greedy: GreedyTexts


@dataclass(frozen=True)
class Quality:
    """What the precision costs on real text; whether the engine is right is another question, see ``verify``."""

    not_judged: str | None
    """Why there is nothing to judge it by."""
    cost: PrecisionCost | None
    max_increase: float | None
    """Of perplexity, as a share: what is allowed; null: any."""
    passed: bool | None
    """null where it was not judged."""

    def __str__(self) -> str:
        if self.cost is None:
            return f"quality not judged: {self.not_judged}"
        return f"perplexity {self.cost.perplexity.value:.4g}, {self.cost.increase.value:+.2%}"

"""Which source the next sample comes from: weights by tokens, which may change as tokens pass.

The choice is a smooth weighted round robin with whole numbers: every token read owes each source
its weight; the source that is owed most is read next. So after any number of samples no source is
further from its share than about a sample.
"""

from dataclasses import dataclass, field

SHARES = 2**32
"""Weights are whole numbers that add up to this."""


@dataclass(slots=True, kw_only=True)
class StageConfig:
    #: Tokens of the run from which on these weights hold.
    from_tokens: int
    #: Weight of each source; one that is not named has none.
    weights: dict[str, float]
    #: Tokens over which the weights move in a straight line from the ones before; 0: at once.
    ramp_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    #: Name of your choice; what was read so far is kept under it.
    name: str
    #: Folder of the source's prepared corpus.
    folder: str
    #: Share of the tokens that come from this source, relative to the others' weights.
    weight: float
    #: Epochs after which the source is left out (parts of one allowed); none given: never.
    max_epochs: float | None = None


@dataclass(slots=True)
class Blend:
    """Weights of sources over the tokens of a run."""

    weights: dict[str, float]
    stages: list[StageConfig] = field(default_factory=list)

    def at(self, tokens: int) -> dict[str, float]:
        """The weights when so many tokens were read; they add up to 1."""
        before = now = _normalise(self.weights, self.weights)
        share = 1.0
        for stage in self.stages:
            if tokens < stage.from_tokens:
                break
            before = _between(before, now, share)
            now = _normalise(stage.weights, self.weights)
            passed = tokens - stage.from_tokens
            share = min(passed / stage.ramp_tokens, 1.0) if stage.ramp_tokens else 1.0
        return _between(before, now, share)

    def holds_until(self, tokens: int) -> int | None:
        """How far the weights at `tokens` surely stay as they are; None: for ever."""
        for stage in self.stages:
            if tokens < stage.from_tokens:
                return stage.from_tokens
            if tokens < stage.from_tokens + stage.ramp_tokens:
                return tokens + 1
        return None


def to_shares(weights: dict[str, float]) -> dict[str, int]:
    """The weights as whole numbers that add up to SHARES; sources without weight are left out."""
    total = sum(weights.values())
    shares = {name: int(weight / total * SHARES) for name, weight in weights.items() if weight > 0}
    heaviest = max(shares, key=lambda name: shares[name])
    shares[heaviest] += SHARES - sum(shares.values())
    return shares


def check_blend(sources: list[SourceConfig], stages: list[StageConfig]) -> None:
    """Raises ValueError where sources or stages can't be read."""
    if not sources:
        raise ValueError(
            "data.sources is empty; give at least one, e.g. "
            "data.sources=[{name: web, folder: corpora/web, weight: 1}]"
        )
    names = [source.name for source in sources]
    for number, source in enumerate(sources):
        key = f"data.sources[{number}]"
        if not source.name or source.name in names[:number]:
            raise ValueError(
                f"{key}.name={source.name} is empty or another source's; give each its own"
            )
        if not source.folder:
            raise ValueError(f"{key}.folder is empty; name a prepared corpus")
        if source.weight < 0:
            raise ValueError(f"{key}.weight={source.weight} is negative; choose 0 or more")
        if source.max_epochs is not None and source.max_epochs <= 0:
            raise ValueError(
                f"{key}.max_epochs={source.max_epochs} must be positive; "
                "choose null for no limit, or weight=0 to leave the source out"
            )
    _check_weights("data.sources", {source.name: source.weight for source in sources})
    last = 0
    for number, stage in enumerate(stages):
        key = f"data.stages[{number}]"
        unknown = sorted(stage.weights.keys() - set(names))
        if unknown:
            raise ValueError(
                f"{key}.weights names {', '.join(unknown)}, data.sources has "
                f"{', '.join(names)}; name sources that exist"
            )
        if any(weight < 0 for weight in stage.weights.values()):
            raise ValueError(f"{key}.weights={stage.weights} has a negative one; choose 0 or more")
        if stage.from_tokens < last:
            raise ValueError(
                f"{key}.from_tokens={stage.from_tokens} lies before {last}, where the stage "
                "before it begins; put the stages in order"
            )
        if stage.ramp_tokens < 0:
            raise ValueError(f"{key}.ramp_tokens={stage.ramp_tokens} is negative; choose 0 or more")
        _check_weights(key, stage.weights)
        last = stage.from_tokens


def _check_weights(key: str, weights: dict[str, float]) -> None:
    if not sum(weights.values()) > 0:
        raise ValueError(f"{key} gives no source a weight above 0; give at least one")


def _normalise(weights: dict[str, float], names: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weights.get(name, 0.0) / total for name in sorted(names)}


def _between(before: dict[str, float], now: dict[str, float], share: float) -> dict[str, float]:
    return {name: before[name] + (now[name] - before[name]) * share for name in now}

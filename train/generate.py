"""Text from a run's model, as the continuation of prompts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from model.decoding import Pass, write_tokens, write_tokens_with_drafts
from model.sampling import SamplingConfig, check_sampling
from train.checkpoint.restore import restore
from train.ema import Weights
from train.ranks import alone


@dataclass(slots=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    #: Folder of the run whose model writes.
    run_dir: str
    #: Step of the checkpoint; null takes the newest.
    step: int | None = None
    #: Its weights as trained, or their moving average (ema).
    weights: Weights = Weights.trained
    #: Texts to be continued; `prompt=TEXT` adds one, taken as it is, and may be given repeatedly.
    prompts: list[str] = field(default_factory=list)
    #: File of prompts instead: one a line, or in a .jsonl file one a line's object as "prompt".
    prompts_file: str | None = None
    #: Prompts that are continued at a time.
    batch_size: int = 8
    #: Tokens to write at most; the end of the document comes earlier if the model says so.
    max_new_tokens: int = 128
    #: Whether MTP guesses a token ahead, so that a pass may give two: same text, fewer passes.
    draft: bool = False


@dataclass(slots=True)
class Effort:
    """What writing took; passes and tokens are counted per row."""

    passes: int = 0
    tokens: int = 0
    drafts: int = 0
    accepted: int = 0

    def add(self, done: Pass) -> None:
        self.passes += sum(map(bool, done.tokens))
        self.tokens += sum(map(len, done.tokens))
        self.drafts += done.drafts
        self.accepted += done.accepted

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were right; 0 without any."""
        return self.accepted / max(self.drafts, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one forward pass of the model gave a row."""
        return self.tokens / max(self.passes, 1)


class Writer:
    """A run's model that continues prompts, and the effort of it so far."""

    def __init__(self, config: GenerateConfig) -> None:
        """Raises ValueError: see `check_generate`, `read_prompts` and `restore`; or drafts are
        asked of a model without MTP."""
        check_generate(config)
        self.config = config
        self.prompts = read_prompts(config)
        self.effort = Effort()
        restored = restore(
            Path(config.run_dir), ranks=alone(), step=config.step, weights=config.weights
        )
        self._model, self._tokenizer = restored.model, restored.tokenizer
        if config.draft and not self._model.mtp:
            raise ValueError(
                f"draft=true, but the model of {config.run_dir} has no MTP "
                "(model.mtp.depth=0); set draft=false, or train one with model.mtp.depth=1"
            )

    def stream(self, prompt: str) -> Iterator[str]:
        """The continuation in pieces as they come; together they are its text."""
        shown, written = "", list[int]()
        for [new] in self._passes([prompt]):
            written += new
            text = self._tokenizer.decode(written)
            if not text.endswith("\ufffd"):  # a character's bytes may come in several tokens
                yield text[len(shown) :]
                shown = text
        yield self._tokenizer.decode(written)[len(shown) :]

    def write(self) -> Iterator[str]:
        """The continuation of each of the config's prompts, in their order."""
        for start in range(0, len(self.prompts), self.config.batch_size):
            prompts = self.prompts[start : start + self.config.batch_size]
            written = [list[int]() for _ in prompts]
            for tokens in self._passes(prompts):
                for row, new in zip(written, tokens, strict=True):
                    row += new
            yield from map(self._tokenizer.decode, written)

    def _passes(self, prompts: list[str]) -> Iterator[list[list[int]]]:
        """Each prompt's new tokens, pass by pass."""
        bos_id, eos_id = self._tokenizer.bos_id, self._tokenizer.eos_id
        write = write_tokens_with_drafts if self.config.draft else write_tokens
        for done in write(
            self._model,
            [[bos_id, *self._tokenizer.encode(prompt)] for prompt in prompts],
            sampling=self.config,
            max_new_tokens=self.config.max_new_tokens,
            eos_id=eos_id,
            vocab_size=self._tokenizer.size,
        ):
            self.effort.add(done)
            yield done.tokens


def check_generate(config: GenerateConfig) -> None:
    """Refuse, with a ValueError, settings under which nothing can be written."""
    check_sampling(config)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.prompts and config.prompts_file is not None:
        raise ValueError(
            f"prompts_file={config.prompts_file} and {len(config.prompts)} prompts on the command "
            "line exclude each other; give one or the other"
        )


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts given, or the file's (blank lines left out), or one empty prompt.

    Raises:
        ValueError: The file holds no prompt, or a line of a .jsonl file isn't one.
        OSError: There is no such file.
    """
    if config.prompts_file is None:
        return config.prompts or [""]
    path = Path(config.prompts_file)
    lines = list(enumerate(path.read_text(encoding="utf-8").split("\n"), start=1))
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f"prompts_file={path} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_read_object(line, place=f"{path}:{number}") for number, line in lines]


def _read_object(line: str, *, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(
            f"{place} is no prompt; a line of a .jsonl file must be an object such as "
            '{"prompt": "def "}'
        )
    return prompt

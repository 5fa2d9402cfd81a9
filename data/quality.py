"""Quality filters of published corpora, by datatrove. Imported only when one is asked for."""

import re

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

from data.select import Filter, FilterConfig

FILTERS: dict[Filter, type[BaseFilter]] = {
    Filter.gopher_quality: GopherQualityFilter,
    Filter.gopher_repetition: GopherRepetitionFilter,
    Filter.fineweb_quality: FineWebQualityFilter,
}
NO_WORDS = "no_words"

# A letter of a script without spaces is a word, so is a run of any other letters and digits, so is
# a punctuation mark. datatrove's own choice, spaCy, took six times as long (0.8 against 4.6 MB/s of
# shingles on one core), and is a large thing to install.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]"
)


class Words(WordTokenizer):
    """Words of any language by a regular expression; a line is a sentence."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(simple_span_tokenize(text, self.sent_tokenize(text)))


class QualityFilters:
    """The filters that were asked for, in their order.

    Raises:
        ValueError: An option that a filter does not have.
    """

    def __init__(self, configs: list[FilterConfig]) -> None:
        self._filters: list[tuple[Filter, BaseFilter]] = []
        for config in configs:
            try:
                quality = FILTERS[config.name](**{"language": Words(), **config.options})
            except TypeError as error:
                raise ValueError(
                    f"data.select.filters: {config.name} cannot be made with {config.options} "
                    f"({error}); its options are the parameters of datatrove's "
                    f"{FILTERS[config.name].__name__}"
                ) from error
            self._filters.append((config.name, quality))

    def find_fault(self, text: str) -> str | None:
        """Filter and rule that the text breaks first, such as `gopher_quality/short_doc`."""
        if self._filters and _WORD.search(text) is None:
            return f"{self._filters[0][0]}/{NO_WORDS}"  # most rules divide by the number of words
        document = Document(text=text, id="")
        for name, quality in self._filters:
            result = quality.filter(document)
            passed, rule = result if isinstance(result, tuple) else (result, "other")
            if not passed:
                return f"{name}/{rule.removeprefix('gopher_')}"
        return None

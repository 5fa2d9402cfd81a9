"""The prepared corpora of a run, as this node reads them: in their folders, or copied from URLs.

A mixture keeps nothing of its own: what it is follows from its sources, wherever each node has
them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.blend import SourceConfig
from data.config import DataConfig, MixtureData, Verify, find_folder, list_sources
from data.documents import MappedIndex
from data.manifest import FileRecord, Manifest, Split, read_manifest
from data.mirror import is_remote
from data.remote import RemoteCorpus, open_remote


class PreparedCorpus(NamedTuple):
    """A finished corpus; of a remote one, `folder` is that of its copies."""

    name: str
    folder: Path
    manifest: Manifest
    remote: RemoteCorpus | None

    def find(self, record: FileRecord) -> Path:
        """A file of the corpus, copied here if it lies elsewhere.

        Raises:
            OSError: It can't be copied.
        """
        return self.folder / record.name if self.remote is None else self.remote.bring_file(record)

    def open_index(self, split: Split) -> MappedIndex:
        """Where the documents of a split lie."""
        record = self.manifest.split(split)
        prompts = None if record.prompts is None else self.find(record.prompts)
        return MappedIndex(self.find(record.index), prompts)


def open_corpora(config: DataConfig) -> list[PreparedCorpus]:
    """The corpora of a run, in the config's order. Of remote ones only the manifest is fetched.

    Raises:
        ValueError: One is not prepared, or of another tokenizer than the first.
        OSError: A URL can't be reached, and there is no copy.
    """
    corpora = [open_corpus(source, config) for source in list_sources(config)]
    _refuse_two_tokenizers(corpora)
    return corpora


def open_corpus(source: SourceConfig, config: DataConfig) -> PreparedCorpus:
    """One of them.

    Raises:
        ValueError: It is not prepared.
        OSError: Its URL can't be reached, and there is no copy.
    """
    remote = open_remote(source.folder, config) if is_remote(source.folder) else None
    folder = find_folder(source)
    try:
        manifest = read_manifest(folder) if remote is None else remote.bring_manifest()
    except ValueError as error:
        if not isinstance(config, MixtureData):
            raise
        raise ValueError(f"the source {source.name}: {error}") from error
    return PreparedCorpus(source.name, folder, manifest, remote)


def open_verified(config: DataConfig) -> list[PreparedCorpus]:
    """The same, after a look at the local copies of remote ones as `data.verify` wants it.

    Raises:
        ValueError: Likewise; a copy is damaged.
        OSError: Likewise.
    """
    corpora = open_corpora(config)
    verify_copies(corpora, config.verify)
    return corpora


def verify_copies(corpora: Sequence[PreparedCorpus], verify: Verify) -> None:
    """Hashes the local copies of remote corpora if they are to be verified in full.

    Raises:
        ValueError: One is damaged.
    """
    for corpus in corpora:
        if corpus.remote is not None and verify is Verify.full:
            corpus.remote.verify_copies(corpus.manifest)


def bring_here(corpora: Sequence[PreparedCorpus]) -> None:
    """Local copies of the small files and the held-out text of all that lies behind a URL.

    Raises:
        ValueError: See `RemoteCorpus.bring`.
        OSError: Likewise.
    """
    for corpus in corpora:
        if corpus.remote is not None:
            corpus.remote.bring_files(corpus.manifest)


def find_tokenizer(config: DataConfig) -> Path:
    """The file of the tokenizer that all the corpora of a run have; nothing else is copied.

    Raises:
        ValueError: See `open_corpus`.
        OSError: Likewise.
    """
    first = open_corpus(list_sources(config)[0], config)
    return first.find(first.manifest.tokenizer.file)


def _refuse_two_tokenizers(corpora: Sequence[PreparedCorpus]) -> None:
    first, *others = corpora
    for other in others:
        if other.manifest.tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            given = first.find(first.manifest.tokenizer.file)
            raise ValueError(
                f"the sources {first.name} and {other.name} were made with different tokenizers; "
                f"prepare {other.name} again with data.tokenizer.path={given}"
            )

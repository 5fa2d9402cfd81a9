"""All nodes read the same shards of what lies behind a URL, also those that never read them before.

Ranges of a shard can't be checked by its hash, but a server's tag of it tells whether it is the
one that was read before. Each node notes tags beside its copies (`data/remote.py`); here the first
rank's are told to all.
"""

from collections.abc import Callable, Sequence

from data.prepared_corpus import PreparedCorpus
from data.remote import Tags
from train.ranks import Ranks
from train.read import refuse_failures


def agree_on_shards(corpora: Sequence[PreparedCorpus], ranks: Ranks) -> None:
    """From now on all ranks read only the shards that the first one finds.

    Raises:
        DataError: A shard is not what its corpus' manifest says, or what some node has read
            before; on all ranks.
    """
    remotes = {one.name: (one.remote, one.manifest) for one in corpora if one.remote is not None}
    if not remotes:
        return
    found: dict[str, Tags] = {}

    def find() -> None:
        if ranks.is_first:
            for name, (remote, manifest) in remotes.items():
                found[name] = remote.find_tags(manifest)

    def expect() -> None:
        for name, tags in told.items():
            remotes[name][0].expect(tags)

    _do_together(find, ranks)
    told = ranks.gather(found)[0]
    _do_together(expect, ranks)


def _do_together(act: Callable[[], None], ranks: Ranks) -> None:
    failure = None
    try:
        act()
    except OSError as error:
        failure = str(error)
    refuse_failures(failure, ranks, is_saved=False)

"""Where the documents of a corpus come from, read through Hugging Face `datasets`.

Local sources are read by our own generators, which can say where in a file an error lies, and
need neither network nor a copy on disk; the hub is left to `datasets`.
"""

import glob
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.config import DataConfig, FilesData, HubData, StdlibData, TokenizedData
from data.datatrove_index import SUFFIX as DATATROVE
from data.datatrove_index import mask_path
from data.document import Document
from data.file_readers import Example, Fields, read_files, read_python_source
from data.shards import bin_path, idx_path

TEST_FOLDERS = {"test", "tests", "idle_test"}
NO_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def find_sources(config: DataConfig) -> list[Path]:
    """The files that the corpus is read from, in order; none for a data set on the hub.

    Raises:
        ValueError: A glob matches no file, or there is no source of the standard library.
    """
    match config:
        case StdlibData():
            return _find_stdlib(config.include_tests)
        case FilesData():
            return _find_files(config.paths)
        case TokenizedData():
            prefixes = find_token_files(config.paths, key="data.paths")
            prefixes += find_token_files(config.validation_paths, key="data.validation_paths")
            files = {path(prefix) for prefix in prefixes for path in (bin_path, idx_path)}
            masks = map(mask_path, files)
            return sorted(files | {mask for mask in masks if mask.is_file()})
        case HubData() if Path(config.name).is_dir():
            return sorted(path for path in Path(config.name).rglob("*") if path.is_file())
        case _:
            return []


def read_documents(config: DataConfig) -> Iterator[Document]:
    """The documents in a fixed order; a null is an empty one.

    Raises:
        ValueError: See `read_files`; a data set without the split, subset or column; text that
            UTF-8 cannot hold.
    """
    for example in read_examples(config):
        text = (example["text"] or "").encode()
        prompt = (example["prompt"] or "").encode() if "prompt" in example else None
        yield Document(text, prompt, example.get("left_out"))


def read_examples(config: DataConfig) -> Iterable[Example]:
    """Each document's `text` and, where there are prompts, `prompt`."""
    import datasets  # its import takes longer than most commands, which read no text

    match config:
        case StdlibData():
            paths = [str(path) for path in find_sources(config)]
            return datasets.IterableDataset.from_generator(
                read_python_source, gen_kwargs={"paths": paths}
            )
        case FilesData():
            options = {
                "paths": [str(path) for path in find_sources(config)],
                "format": config.format,
                "text_column": config.text_column,
                "template": config.template,
                "prompt_template": config.prompt_template,
                "damaged": config.damaged,
            }
            return datasets.IterableDataset.from_generator(read_files, gen_kwargs=options)
        case HubData():
            return _read_hub(config)
        case _:
            raise AssertionError(f"no reader for {type(config).__name__}")


def _find_stdlib(include_tests: bool) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = NO_LIBRARY if include_tests else NO_LIBRARY | TEST_FOLDERS
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if left_out.isdisjoint(path.relative_to(root).parts) and path.is_file()
    ]
    if not found:
        raise ValueError(
            f"this Python has no source of its standard library in {root}; "
            "use another Python or data=files"
        )
    return found


def find_token_files(patterns: list[str], *, key: str) -> list[Path]:
    """What `Shard` opens, absolute and in order: .bin files without the suffix, .ds files with it.

    Raises:
        ValueError: No such file; a .bin without its .idx.
    """
    found = [path.absolute() for path in _find_files(patterns, key=key)]
    prefixes = [path.with_suffix("") for path in found if path.suffix == ".bin"]
    prefixes += [path for path in found if path.suffix == DATATROVE]
    if not prefixes:
        raise ValueError(f"{key}: {', '.join(patterns)} matches no .bin or .ds file; mend it")
    for prefix in prefixes:
        if not idx_path(prefix).is_file():
            raise ValueError(
                f"{bin_path(prefix)} has no {idx_path(prefix).name} beside it, so its documents' "
                f"borders are unknown; fetch it too, or take the file out of {key}"
            )
    return sorted(prefixes)


def _find_files(patterns: list[str], *, key: str = "data.paths") -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        matches = {
            path
            for path in map(Path, glob.iglob(str(Path(pattern).expanduser()), recursive=True))
            if path.is_file()
        }
        if not matches:
            raise ValueError(
                f"{key}: {pattern} matches no file (seen from {Path.cwd()}); "
                "mend the pattern or take it out"
            )
        found |= matches
    return sorted(found)


def _read_hub(config: HubData) -> Iterator[Example]:
    import datasets

    where = f"data.name={config.name}"
    try:
        dataset = datasets.load_dataset(
            config.name,
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{where} cannot be loaded ({error}); check data.name, data.subset and data.split, "
            "and that this machine reaches the hub"
        ) from error
    fields = Fields(config.text_column, config.template, config.prompt_template)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for column, key in fields.columns.items():
        if column not in columns:
            raise ValueError(
                f"{where} has no {key}={column}, its columns are "
                f"{', '.join(columns)}; name the one that holds the text"
            )
    for number, row in enumerate(dataset.select_columns(list(fields.columns))):
        yield fields.take(row, f"{where}, document {number}")

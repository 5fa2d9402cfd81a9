"""Where the documents of a corpus come from, as a Hugging Face data set with a column `text`.

Local sources are read by our own generators, which can say where in a file an error lies, and
need neither network nor a copy on disk; the hub is left to `datasets`.
"""

import glob
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import datasets

from data.config import DataConfig, FilesData, HubData, StdlibData
from data.file_readers import read_files, read_python_source

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
        case HubData() if Path(config.name).is_dir():
            return sorted(path for path in Path(config.name).rglob("*") if path.is_file())
        case _:
            return []


def read_documents(config: DataConfig) -> Iterator[bytes]:
    """The text of each document as UTF-8, in a fixed order; a null is an empty document.

    Raises:
        ValueError: See `read_files`; a data set without the split, subset or column; text that
            UTF-8 cannot hold.
    """
    for number, example in enumerate(open_dataset(config)):
        text = example["text"]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"document {number}: its text should be a string, found {type(text).__name__}; "
                "choose another data.text_column"
            )
        try:
            yield (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"document {number} holds half a surrogate pair at character {error.start}, "
                "which no UTF-8 text can; mend its \\u escape or leave the document out"
            ) from error


def open_dataset(config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """The corpus with the single column `text`."""
    match config:
        case StdlibData():
            paths = [str(path) for path in find_sources(config)]
            return datasets.IterableDataset.from_generator(
                read_python_source, gen_kwargs={"paths": paths}
            )
        case FilesData():
            paths = [str(path) for path in find_sources(config)]
            options = {"format": config.format, "text_column": config.text_column}
            return datasets.IterableDataset.from_generator(
                read_files, gen_kwargs={"paths": paths, **options}
            )
        case HubData():
            return _open_hub(config)
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


def _find_files(patterns: list[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        matches = {
            path
            for path in map(Path, glob.iglob(str(Path(pattern).expanduser()), recursive=True))
            if path.is_file()
        }
        if not matches:
            raise ValueError(
                f"data.paths: {pattern} matches no file (seen from {Path.cwd()}); "
                "mend the pattern or take it out"
            )
        found |= matches
    return sorted(found)


def _open_hub(config: HubData) -> datasets.Dataset | datasets.IterableDataset:
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
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if config.text_column not in columns:
        raise ValueError(
            f"{where} has no data.text_column={config.text_column}, its columns are "
            f"{', '.join(columns)}; name the one that holds the text"
        )
    dataset = dataset.select_columns([config.text_column])
    if config.text_column == "text":
        return dataset  # `datasets` refuses to rename a column to its own name
    return dataset.rename_column(config.text_column, "text")

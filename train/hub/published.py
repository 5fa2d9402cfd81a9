"""What an imported run keeps of its published folder: all that training does not change.

RUN/published/config.json  generation_config.json  tokenizer.json  tokenizer_config.json ...
"""

import shutil
from pathlib import Path

from train.hub.config import FILE
from train.hub.tokenizer import JSON, MODEL, copy_companions

FOLDER = "published"
GENERATION = "generation_config.json"
TOKENIZERS = (JSON, MODEL)  # the first that is there counts


def keep_published(published: Path, run_dir: Path) -> None:
    """Copy the folder's small files into the run's."""
    kept = run_dir / FOLDER
    kept.mkdir(parents=True, exist_ok=True)
    copy_companions(published, kept)
    for name in (FILE, GENERATION, *TOKENIZERS):
        if (published / name).is_file():
            shutil.copyfile(published / name, kept / name)


def find_published_tokenizer(published: Path) -> Path:
    """The folder's tokenizer.json, or its tokenizer.model.

    Raises:
        ValueError: There is neither.
    """
    for name in TOKENIZERS:
        if (published / name).is_file():
            return published / name
    raise ValueError(
        f"{published} holds neither {' nor '.join(TOKENIZERS)}; give one with data.tokenizer.path"
    )

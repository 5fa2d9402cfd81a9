"""`thrifty import from=FOLDER run_dir=RUN`: a run that starts from a published model."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from data.atomic_file import hash_file
from launch.compose import Job, run_jobs, to_config, worst
from launch.config import LaunchedRun, check_launched
from launch.run_folder import hold_folder, prepare_folder
from train.config import RunConfig, model_schema
from train.export import PUBLISHED
from train.import_hub import (
    describe_model,
    find_published_tokenizer,
    import_weights,
    keep_published,
)
from train.outcome import ExitCode

log = logging.getLogger(__name__)

FROM = "from="  # a word that Python keeps for itself, so the key has another name
KEY = "published"
OPTIONS = "configs"  # folder of the run with its own options of `model` and `data`
OPTION = "imported"


@dataclass(slots=True, kw_only=True)
class ImportedRun(LaunchedRun):
    #: Folder of the published model; `from=FOLDER` on the command line.
    published: str


def main() -> ExitCode:
    """Import the folder that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folders = [text.removeprefix(FROM) for text in sys.argv[1:] if text.startswith(FROM)]
    sys.argv[1:] = [text for text in sys.argv[1:] if not text.startswith(FROM)]
    if folders:
        sys.argv.append(f"{KEY}={folders[-1]!r}")
        try:
            _register_model(Path(folders[-1]).expanduser())
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return ExitCode.MISTAKE
    elif not {"--help", "-h"} & set(sys.argv[1:]):
        print("from=FOLDER is missing: the folder of the published model", file=sys.stderr)
        return ExitCode.MISTAKE
    return worst(run_jobs(import_job, schema=ImportedRun, config_name="import"))


def import_job(job: Job) -> ExitCode:
    """Import one folder and say how the run goes on."""
    published = Path(job.values[KEY]).expanduser()
    run_dir = Path(job.values.run_dir)
    data = job.values.data
    has_own_tokenizer = data.tokenizer.path is None
    if has_own_tokenizer:
        data.tokenizer.path = str(find_published_tokenizer(published))
    if not any(override.startswith("data.folder=") for override in job.overrides):
        # Another tokenizer makes another corpus of the same text.
        data.folder = f"{data.folder}-{hash_file(Path(data.tokenizer.path))[:8]}"
    config = to_config(job.values, ImportedRun)
    check_launched(config)
    with hold_folder(run_dir):
        keep_published(published, run_dir)
        if has_own_tokenizer:
            config.data.tokenizer.path = str(find_published_tokenizer(run_dir / PUBLISHED))
        imported = import_weights(published, config)
        prepare_folder(config)
        write_options(config, run_dir / OPTIONS)
    print(f"imported          {published}, {imported.num_tensors} tensors")
    print(f"parameters        {imported.parameters}")
    print(f"checkpoint        {imported.step_folder}")
    print(f"continue with     {_continuation(config)}")
    return ExitCode.FINISHED


def write_options(config: RunConfig, folder: Path) -> None:
    """The run's model and data as options that `--config-dir` makes known to `thrifty train`."""
    for group, section in (("model", config.model), ("data", config.data)):
        (folder / group).mkdir(parents=True, exist_ok=True)
        defaults = f"defaults:\n  - {section.kind}_schema\n  - _self_\n\n"
        values = OmegaConf.to_yaml(OmegaConf.structured(section))
        (folder / group / f"{OPTION}.yaml").write_text(defaults + values)


def _register_model(published: Path) -> None:
    """Let Hydra compose the folder's model as if it were an option of ours."""
    model = describe_model(published)
    schema = model_schema(model.kind)
    node = OmegaConf.merge(schema, OmegaConf.structured(model))
    ConfigStore.instance().store(name=OPTION, node=OmegaConf.create({"model": node}))


def _continuation(config: RunConfig) -> str:
    words: list[Any] = ["thrifty train", f"--config-dir {config.run_dir}/{OPTIONS}"]
    words += [f"model={OPTION}", f"data={OPTION}", f"run_dir={config.run_dir}"]
    return " ".join([*words, f"seed={config.seed}"] if config.seed else words)


if __name__ == "__main__":
    sys.exit(main())

"""`thrifty import from=FOLDER run_dir=RUN`: a run that starts from a published model."""

import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from data.atomic_file import hash_file
from launch.run_folder import hold_folder, prepare_folder
from launch.settings.compose import Job, run_jobs, to_config, worst
from launch.settings.config import LaunchedRun, check_launched
from train.config import model_schema
from train.hub.import_weights import describe_model, import_weights
from train.hub.published import FOLDER, find_published_tokenizer, keep_published
from train.outcome import ExitCode

log = logging.getLogger(__name__)

FROM = "from="  # a word that Python keeps for itself, so the key has another name
KEY = "published"
OPTION = "imported"


@dataclass(slots=True, kw_only=True)
class ImportedRun(LaunchedRun):
    #: Folder of the published model; `from=FOLDER` on the command line.
    published: str


def main() -> ExitCode:
    """Import the folder that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:]
    folders = [text.removeprefix(FROM) for text in arguments if text.startswith(FROM)]
    sys.argv[1:] = [
        f"{KEY}={text.removeprefix(FROM)!r}" if text.startswith(FROM) else text
        for text in arguments
    ]
    if folders:
        try:
            _register_model(Path(folders[-1]).expanduser())
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return ExitCode.MISTAKE
    elif not {"--help", "-h"} & set(arguments):
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
            config.data.tokenizer.path = str(find_published_tokenizer(run_dir / FOLDER))
        imported = import_weights(published, config)
        prepare_folder(
            LaunchedRun(**{f.name: getattr(config, f.name) for f in fields(LaunchedRun)})
        )
    print(f"imported          {published}, {imported.num_tensors} tensors")
    print(f"parameters        {imported.parameters}")
    print(f"checkpoint        {imported.step_folder}")
    print(f"continue with     thrifty train run_dir={config.run_dir}")
    return ExitCode.FINISHED


def _register_model(published: Path) -> None:
    """Let Hydra compose the folder's model as if it were an option of ours."""
    model = describe_model(published)
    schema = model_schema(model.kind)
    node = OmegaConf.merge(schema, OmegaConf.structured(model))
    ConfigStore.instance().store(name=OPTION, node=OmegaConf.create({"model": node}))


if __name__ == "__main__":
    sys.exit(main())

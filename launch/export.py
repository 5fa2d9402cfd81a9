"""`thrifty export`: a checkpoint as a Hugging Face folder, checked by transformers."""

import logging
import sys

from launch.run_folder import default_to_newest
from launch.settings.compose import Job, run_jobs, to_config, worst
from train.hub.export import ExportConfig, export
from train.hub.gate import GateError
from train.outcome import ExitCode


def main() -> ExitCode:
    """Export the checkpoints that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return worst(run_jobs(export_job, schema=ExportConfig, config_name="export"))


def export_job(job: Job) -> ExitCode:
    """Export one checkpoint and say what the gate found; without run_dir, of the newest run."""
    default_to_newest(job.values)
    config = to_config(job.values, ExportConfig)
    try:
        exported = export(config)
    except GateError as error:
        print(f"the gate failed, {config.out} was left as it is: {error}", file=sys.stderr)
        return ExitCode.FAILED
    print(f"run               {config.run_dir}, step {exported.step}")
    print(f"folder            {config.out}")
    print(f"weights           {exported.num_bytes / 1e9:.3f} GB in {exported.num_files} files")
    if exported.tokenizer_note:
        print(f"tokenizer         {exported.tokenizer_note}")
    if exported.gate.num_tensors:
        print(f"gate, files       {exported.gate.num_tensors} tensors equal")
    if exported.gate.difference is None:
        print(f"gate, logits      NOT compared: {exported.gate.skipped}")
    else:
        print(f"gate, logits      equal to {exported.gate.difference:.1e} of the largest")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())

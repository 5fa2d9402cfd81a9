"""`thrifty generate`: a run's model continues a text."""

import sys

from omegaconf import OmegaConf

from launch.compose import Job, run_jobs, to_config, worst
from launch.run_folder import newest_run
from train.generate import GenerateConfig, generate
from train.outcome import ExitCode

PROMPT = "prompt="


def main() -> ExitCode:
    """Print the continuation as it comes. The prompt is taken as it is, without Hydra's syntax."""
    prompts = [argument for argument in sys.argv[1:] if argument.startswith(PROMPT)]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith(PROMPT)]

    def generate_job(job: Job) -> ExitCode:
        if OmegaConf.is_missing(job.values, "run_dir"):
            job.values.run_dir = newest_run()
        config = to_config(job.values, GenerateConfig)
        for prompt in prompts[-1:]:
            config.prompt = prompt.removeprefix(PROMPT)
        print(config.prompt, end="", flush=True)
        for piece in generate(config):
            print(piece, end="", flush=True)
        print()
        return ExitCode.FINISHED

    return worst(run_jobs(generate_job, schema=GenerateConfig, config_name="generate"))


if __name__ == "__main__":
    sys.exit(main())

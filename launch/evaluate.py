"""`thrifty evaluate`: how well a run's model predicts its validation split."""

import sys

from launch.run_folder import default_to_newest
from launch.settings.compose import Job, run_jobs, to_config, worst
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.outcome import ExitCode


def main() -> ExitCode:
    """Evaluate the checkpoints that the command line asks for."""
    return worst(run_jobs(evaluate_job, schema=EvaluateConfig, config_name="evaluate"))


def evaluate_job(job: Job) -> ExitCode:
    """Print one checkpoint's evaluation; without run_dir, of the newest run."""
    default_to_newest(job.values)
    config = to_config(job.values, EvaluateConfig)
    evaluation = evaluate_run(config)
    print(f"run               {config.run_dir}")
    print(f"loss              {evaluation.loss:.4f} nats per token")
    print(f"unigram entropy   {evaluation.unigram_entropy:.4f} nats per token")
    print(f"perplexity        {evaluation.perplexity:.2f}")
    print(f"bits per byte     {evaluation.bits_per_byte:.4f}")
    print(f"tokens predicted  {evaluation.targets}")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())

"""`thrifty generate`: a run's model continues texts."""

import json
import sys

from launch.run_folder import default_to_newest
from launch.settings.compose import Job, run_jobs, to_config, worst
from train.generate import Effort, GenerateConfig, Writer
from train.outcome import ExitCode

PROMPT = "prompt="


def main() -> ExitCode:
    """Print one prompt's continuation as it comes, or several as lines of JSON.

    The prompts are taken as they are, without Hydra's syntax.
    """
    arguments = sys.argv[1:]
    prompts = [text.removeprefix(PROMPT) for text in arguments if text.startswith(PROMPT)]
    sys.argv[1:] = [text for text in arguments if not text.startswith(PROMPT)]

    def generate_job(job: Job) -> ExitCode:
        default_to_newest(job.values)
        config = to_config(job.values, GenerateConfig)
        config.prompts += prompts
        writer = Writer(config)
        if len(writer.prompts) == 1:
            print_stream(writer, writer.prompts[0])
        else:
            print_lines(writer)
        if config.draft:
            print(describe_effort(writer.effort), file=sys.stderr)
        return ExitCode.FINISHED

    return worst(run_jobs(generate_job, schema=GenerateConfig, config_name="generate"))


def print_stream(writer: Writer, prompt: str) -> None:
    """The prompt, and its continuation piece by piece."""
    print(prompt, end="", flush=True)
    for piece in writer.stream(prompt):
        print(piece, end="", flush=True)
    print()


def print_lines(writer: Writer) -> None:
    """One object a line for each prompt, in their order."""
    for prompt, text in zip(writer.prompts, writer.write(), strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)


def describe_effort(effort: Effort) -> str:
    """What drafts were worth."""
    return (
        f"drafts accepted {effort.acceptance_rate:.1%} ({effort.accepted} of {effort.drafts}), "
        f"{effort.tokens_per_pass:.2f} tokens per forward pass"
    )


if __name__ == "__main__":
    sys.exit(main())

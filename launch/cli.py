"""`thrifty VERB [settings]`: the one door to all commands.

Each verb is a module with a `main` of its own (`python -m launch.train` is `thrifty train`).
"""

import sys
from difflib import get_close_matches
from importlib import import_module

from train.outcome import ExitCode

VERBS = {
    "train": ("launch.train", "train a run, or continue it; -m sweeps over settings"),
    "launch": ("launch.launch", "a run on one node or many, checked before and kept alive"),
    "doctor": ("launch.doctor", "are the nodes fit for a launch?"),
    "status": ("launch.status", "how a run stands and what happened to it"),
    "prepare": ("launch.prepare", "make a corpus ready: tokenizer, shards, manifest"),
    "data": ("launch.data", "show the samples of any step; statistics of what a run reads"),
    "plan": ("launch.plan", "parameters and FLOPs of a model, per component"),
    "verify": ("launch.verify", "whether a layout trains the same model as one process"),
    "evaluate": ("launch.evaluate", "a checkpoint's loss on held-out text"),
    "generate": ("launch.generate", "let a checkpoint continue a text"),
    "import": ("launch.import_", "start a run from a published Hugging Face folder"),
    "grow": ("launch.grow", "a run goes on with other expert counts or more layers"),
    "checkpoints": ("launch.checkpoints", "list, show, verify, compare or average checkpoints"),
    "export": ("launch.export", "a checkpoint as a Hugging Face folder, checked by transformers"),
}


def main() -> int:
    """Run the verb; its exit code, or 2 where there is no such verb."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(describe_verbs())
        return ExitCode.FINISHED
    verb = sys.argv[1]
    if verb not in VERBS:
        nearest = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(VERBS)}"
        print(f"thrifty {verb}: there is no such verb; {hint}", file=sys.stderr)
        return ExitCode.MISTAKE
    sys.argv = [f"thrifty {verb}", *sys.argv[2:]]
    code: int = import_module(VERBS[verb][0]).main()
    return code


def describe_verbs() -> str:
    """The verbs, one line each."""
    lines = [f"  {verb:12} {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join(
        [
            "usage: thrifty VERB [key=value ...]",
            "",
            *lines,
            "",
            "thrifty VERB --help shows the verb's settings.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

"""As a user does it: a published model is imported, trained further, exported and served."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers

from data.tokenizer import load_tokenizer
from launch import cli
from tests.command import thrifty
from tests.train.hub.families import FAMILIES, GROUPED, moe
from tests.train.random_run import random_run
from tests.train.tiny import tiny_model, tiny_run
from train.hub.config import to_hub_config
from train.hub.tokenizer import export_tokenizer


@pytest.fixture(scope="module")
def published(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V3 that transformers has made and saved, with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    values = to_hub_config(tiny_model(moe=moe(GROUPED)), max_seq_len=64)
    (folder / "config.json").write_text(json.dumps(values))
    settings = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    data = tiny_run(folder).data
    data.folder = str(corpus)
    assert export_tokenizer(data, folder, max_seq_len=64) == ""
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["thrifty", *arguments])
    return cli.main()


@pytest.mark.slow
def test_a_published_model_is_imported_trained_exported_and_served(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(
        monkeypatch,
        *("import", f"from={published}", "run_dir=run"),
        *("data=files", f"data.paths=[{Path(__file__).parents[1]}/*.py]", "data.folder=corpus"),
        *("data.seq_len=16", "data.validation_fraction=0.3", "data.processes=1"),
        "model.moe.router.bias_update_speed=0.01",
    )
    printed = capsys.readouterr().out
    assert code == 0
    command = printed.partition("continue with     thrifty ")[2].splitlines()[0]

    code, output = thrifty(
        *shlex.split(command),
        *("schedule=constant", "schedule.steps=3", "schedule.batch_size=8"),
        *("schedule.warmup_steps=0", "parallel.micro_batch_size=4", "evaluation.max_sequences=8"),
        cwd=tmp_path,
    )
    assert code == 0, output
    assert "resumed from run/checkpoints/step-00000000" in output
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "evaluation"] == [3]

    assert run(monkeypatch, "export", "run_dir=run", "out=hub") == 0
    printed = capsys.readouterr().out
    assert "run               run, step 3" in printed
    assert "gate, logits      equal to" in printed

    ours = load_tokenizer(Path("hub/tokenizer.json"))
    pipeline = transformers.pipeline("text-generation", model="hub", dtype=torch.float32)
    prompt = "def f(a,  b):\n    return"
    assert pipeline.tokenizer(prompt)["input_ids"] == [ours.bos_id, *ours.encode(prompt)]
    served = pipeline(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)
    tokens = torch.tensor([[ours.bos_id, *ours.encode(prompt)]])
    with torch.no_grad():
        for _ in range(8):
            token = pipeline.model(tokens).logits[0, -1].argmax()
            tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
    assert served[0]["generated_text"] == ours.decode(tokens[0, -8:].tolist())

    assert run(monkeypatch, "export", "run_dir=run", "out=hub") == 2
    assert "out=hub is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_s_recipe_fine_tunes_an_imported_model(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = FAMILIES["qwen2"]
    base = random_run(tmp_path / "base", corpus, model=model)
    assert run(monkeypatch, "export", f"run_dir={base.run_dir}", "out=hub", "gate=false") == 0
    texts = ["data=files", f"data.paths=[{Path(__file__).parents[1]}/*.py]"]
    imported = ["import", "from=hub", "run_dir=imported", *texts, "model.tie_embedding=false"]
    assert run(monkeypatch, *imported) == 0, capsys.readouterr().err
    sizes = [
        *(f"model.{key}={getattr(model, key)}" for key in ("vocab_size", "dim", "num_layers")),
        *(f"model.num_dense_layers={model.num_layers}", f"model.ffn_dim={model.ffn_dim}"),
        *("model.attention.num_heads=4", "model.attention.num_kv_heads=2"),
        *("model.attention.head_dim=12", "model.norm_eps=1e-5", "model.rope.theta=1e6"),
    ]
    code, output = thrifty(
        *("train", "experiment=recipe_r1_distill_qwen_1b5", "init_from=imported"),
        *("run_dir=student", *texts, *sizes, "precision=fp32", "logging.every=1"),
        *("data.tokenizer.path=imported/published/tokenizer.json", "data.folder=corpus"),
        *("data.seq_len=16", "data.validation_fraction=0.3", "data.processes=1"),
        *("schedule.steps=2", "schedule.batch_size=4", "evaluation.max_sequences=8"),
        cwd=tmp_path,
    )
    assert code == 0, output
    records = [json.loads(line) for line in Path("student/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    assert steps[0]["lr"] == 1e-4
    assert "starting from the weights in imported/checkpoints/step-00000000" in output


def test_a_failed_gate_leaves_the_folder_and_says_what_differs(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = random_run(tmp_path, corpus, model=tiny_model())
    out = tmp_path / "hub"
    exact = ["export", f"run_dir={config.run_dir}", f"out={out}", "tolerance=1e-30"]
    assert run(monkeypatch, *exact) == 1
    printed = capsys.readouterr().err
    assert f"the gate failed, {out} was left as it is" in printed
    assert "transformers' logits differ from ours" in printed
    assert (out / "model.safetensors").is_file()


def test_an_import_s_config_is_printed_with_the_folder_s_model(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"from={published}", "model.moe.balance_loss_weight=0.5"]
    assert run(monkeypatch, "import", *overrides, "--cfg", "job") == 0
    printed = capsys.readouterr().out
    assert "balance_loss_weight: 0.5" in printed
    assert "num_experts: 8" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run_dir=run"], "from=FOLDER is missing: the folder of the published model"),
        (["from=nowhere", "run_dir=run"], "nowhere holds no config.json"),
    ],
)
def test_an_import_that_names_no_model_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "import", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

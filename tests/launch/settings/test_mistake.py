from pathlib import Path

import pytest

from tests.command import compose

REFUSED = [
    (["model.moe.typo=1"], "there is no key model.moe.typo"),
    (["+model.moe.typo=1"], "there is no key model.moe.typo"),
    (["model.num_experts=8"], "did you mean model.moe.num_experts?"),
    (["modle=tiny"], "did you mean model?"),
    (["top_k=2"], "did you mean model.moe.top_k?"),
    (["model.moe.top_k=abc"], "model.moe.top_k=abc: model.moe.top_k must be int"),
    (["precision.dtype=fp7"], "precision.dtype must be fp32 | bf16"),
    (["model.moe=3"], "model.moe is a section"),
    (["model=huge"], "model=huge: there is no such option; choose one of coder_1b3, "),
    (["experiment=none_such"], "choose one of demo, extend_128k, "),
    (["data=files"], "data.paths has no default and must be given (list of str)"),
    (["schedule=constant", "schedule.final_ratio=0"], "only with schedule=cosine or schedule=wsd"),
    (["schedule.kind=wsd"], "schedule.kind=wsd can't be set by itself; choose schedule=NAME"),
    (["run_dir=${nowhere}"], "run_dir=${nowhere}: Interpolation key 'nowhere' not found"),
    (["model.moe.top_k=1,2"], "add -m for one run each"),
    (["a b"], "a b: this can't be read as key=value"),
    (["model.moe.top_k=17"], "model.moe.top_k=17 exceeds model.moe.num_experts=16"),
    (["model.moe.router.num_groups=3"], "model.moe.router.num_groups=3"),
    (["launch.processes=2", "parallel.expert=3"], "parallel.expert=3 does not divide the 2 ranks"),
    (
        ["launch.processes=3", "parallel=expert", "schedule.batch_size=24"],
        "model.moe.num_experts=16 is not divisible by parallel.expert=3",
    ),
    (["launch.processes=0"], "launch.processes=0 must be at least 1"),
    (["launch.kind=slurm"], "launch.kind=slurm can't be set by itself; choose launch=NAME"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_message_and_exit_code_2(
    overrides: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compose(*overrides)
    captured = capfd.readouterr()
    assert ended.value.code == 2
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="exceeds model"):
        compose("model.moe.top_k=17")


def test_a_config_file_that_is_no_yaml_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("dim: 1\ndim: 2\n")
    with pytest.raises(SystemExit):
        compose(f"--config-dir={tmp_path}", "model=mine")
    assert "model/mine.yaml" in capfd.readouterr().err

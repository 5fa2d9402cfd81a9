"""`thrifty plan`, as a user sees it."""

import re
import sys
from pathlib import Path

import pytest

from launch import cli
from model.cost import count_parameters, flops_per_token
from model.memory import routed_peak
from model.recompute import Recompute
from tests.command import compose
from train.layout.memory import activations


def plan(
    *overrides: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code of `thrifty plan OVERRIDES`, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["thrifty", "plan", *overrides])
    code = cli.main()
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def read_rows(printed: str) -> dict[str, list[str]]:
    """The table's numbers by the name of their row."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {name: numbers for name, *numbers in cells if len(numbers) == 5}


def test_the_table_of_v3_adds_up_to_its_published_counts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed = plan("model=v3", "data.seq_len=4096", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    rows = read_rows(printed)
    del rows["component"]
    total, mtp, both = rows.pop("total"), rows.pop("MTP, depth 1"), rows.pop("with MTP")
    assert list(rows) == [
        "embedding",
        "norms",
        "attention",
        "router",
        "shared experts",
        "routed experts",
        "dense feed-forward",
        "head",
    ]
    assert total[0] == "671,026,404,352"  # and 14,848 routing biases, which are no parameters
    for column in (0, 2):
        numbers = [int(row[column].replace(",", "")) for row in rows.values()]
        assert sum(numbers) == int(total[column].replace(",", ""))
    assert int(both[0].replace(",", "")) == 671_026_404_352 + int(mtp[0].replace(",", ""))
    flops = flops_per_token(compose("model=v3").model, seq_len=4096)
    assert both[3] == f"{flops / 1e9:,.3f}"
    assert sum(float(row[1].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=0.05)
    assert "at 4,096 tokens" in printed


def test_the_page_of_models_shows_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    command, shown = re.search(r"\$ thrifty plan (.+)\n([^`]+)```", page).groups()
    _, printed = plan(*command.split(), monkeypatch=monkeypatch, capfd=capfd)
    assert [line.rstrip() for line in printed.strip().splitlines()] == [
        line.rstrip() for line in shown.strip().splitlines()
    ]


def test_a_dense_model_has_no_rows_of_experts_or_mtp(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed = plan("model=llm_7b", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    assert {"router", "routed experts", "shared experts", "with MTP"}.isdisjoint(read_rows(printed))


def test_the_convention_follows_a_tied_embedding(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed = plan("model.tie_embedding=true", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    assert "the embedding because it is the head" in " ".join(printed.split())
    active = count_parameters(compose("model.tie_embedding=true").model).active
    assert read_rows(printed)["total"][2] == f"{active:,}"


def test_the_bound_on_experts_memory_is_stated_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, printed = plan("model=v2_lite", monkeypatch=monkeypatch, capfd=capfd)
    assert "GiB at most" not in printed
    overrides = ("model=v2_lite", "data.seq_len=4096", "parallel.micro_batch_size=1")
    limit = "model.moe.max_tokens_per_chunk=30000"
    _, printed = plan(*overrides, limit, "precision=fp32", monkeypatch=monkeypatch, capfd=capfd)
    moe = compose(*overrides, limit).model.moe
    elements = routed_peak(moe, dim=2048, tokens=4096, num_local=64)
    assert f"{elements * 4 / 2**30:,.2f} GiB at most on a rank" in printed
    assert limit in printed


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_page_of_memory_shows_what_is_planned_in_each_precision(precision: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    (shown,) = re.findall(rf"\| `precision={precision}` \| (.+) \| (.+) \| (.+) \|", page)
    run = compose("experiment=recipe_v2_lite", f"precision={precision}")
    for size, mode in zip(shown, Recompute, strict=True):
        run.parallel.recompute = mode
        assert f"{activations(run) / 2**30:.1f}" == size


def test_a_plan_of_what_cannot_be_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed = plan("model=v3", "model.moe.top_k=300", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2
    assert printed == (
        "model.moe.top_k=300 exceeds model.moe.num_experts=256; choose top_k <= num_experts\n"
    )


def test_many_experts_are_planned_by_a_sweep(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("plan"))
    code, printed = plan("-m", "model.moe.num_experts=8,16", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 0
    assert printed.count("routed experts ") >= 2

"""What each kind of growth preserves, against whole models; and that the grown run trains on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.gqa import GQAConfig
from model.moe import MoEConfig
from model.router import GroupScore, RouterConfig, Score
from model.transformer import Transformer
from tests.train.random_run import random_run
from tests.train.tiny import tiny_model, tiny_run
from train.checkpoint.restore import restore
from train.checkpoint.stored_tensors import open_checkpoint
from train.config import RunConfig
from train.grow.config import GrowChoices, GrownMoments, Growth, Order, Repeat, Shrink
from train.grow.experts import plan_experts
from train.grow.measure import compare, run_model
from train.grow.run import check, fill_from, grow
from train.grow.tensors import GrownTensors
from train.ranks import alone

TEXT = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(1))
EXACT = 1e-5


def moe(router: RouterConfig | None = None, **changes: Any) -> MoEConfig:
    values = {"num_experts": 8, "top_k": 2, "expert_dim": 16} | changes
    return MoEConfig(**values, router=router or RouterConfig(scale=1.7))


def grown(old: ModelConfig, new: ModelConfig, corpus: Path, folder: Path, **choices: Any) -> float:
    """How far the logits of `new`, grown from a random `old`, are from those of `old`."""
    config = random_run(folder, corpus, model=old)
    stored = open_checkpoint(Path(config.run_dir), step=None)
    before = run_model(old, fill_from(stored), TEXT)

    def use(prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        load = next(load for name, load in before.load.items() if prefix.startswith(name))
        name = f"weight/{prefix}ffn.router.weight"
        return load, stored.read(name, start=0, shape=stored.manifest.tensors[name].shape)

    growth = Growth(old=old, new=new, seed=0, choices=GrowChoices(**choices))
    tensors = GrownTensors(growth, stored, use=use)
    difference = compare(before, run_model(new, fill_from(tensors), TEXT))
    return max(difference.relative, *difference.mtp_relative, 0.0)


ROUTERS = {
    "sigmoid, renormalised": RouterConfig(scale=1.7),
    "sigmoid": RouterConfig(scale=1.7, renormalise=False),
    "softmax, renormalised": RouterConfig(score=Score.softmax),
    "softmax": RouterConfig(score=Score.softmax, renormalise=False, scale=2.0),
    "in groups": RouterConfig(num_groups=2, top_groups=1),
    "in groups by their best": RouterConfig(num_groups=2, top_groups=1, group_score=GroupScore.max),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (16, 4), (24, 4), (32, 8), (12, 2)])
def test_cloning_experts_preserves_the_function(
    corpus: Path, tmp_path: Path, router: str, num_experts: int, top_k: int
) -> None:
    old_router = ROUTERS[router]
    new_router = old_router
    copies, rest = divmod(num_experts, 8)
    if old_router.num_groups > 1 and top_k > 2:  # whole groups are cloned
        new_router = replace(old_router, num_groups=2 * copies, top_groups=top_k // 2)
    old = tiny_model(moe=moe(old_router))
    new = tiny_model(moe=moe(new_router, num_experts=num_experts, top_k=top_k))
    change = grown(old, new, corpus, tmp_path)
    if router.startswith("softmax") and rest:
        assert change > EXACT, "docs/grow.md says that this one is not preserved"
    else:
        assert change <= EXACT


def test_v2s_router_without_a_bias_can_clone_only_with_top_k(corpus: Path, tmp_path: Path) -> None:
    router = RouterConfig(score=Score.softmax, renormalise=False, bias=False)
    old = tiny_model(moe=moe(router))
    for top_k, is_preserved in ((4, True), (2, False)):
        new = tiny_model(moe=moe(router, num_experts=16, top_k=top_k))
        change = grown(old, new, corpus, tmp_path / str(top_k))
        assert (change <= EXACT) == is_preserved


@pytest.mark.parametrize("before", [0, 1])
def test_further_shared_experts_preserve_the_function(
    corpus: Path, tmp_path: Path, before: int
) -> None:
    old = tiny_model(moe=moe(num_shared_experts=before))
    new = tiny_model(moe=moe(num_shared_experts=3))
    assert grown(old, new, corpus, tmp_path) <= EXACT


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(("num_layers", "num_dense_layers"), [(5, 1), (6, 2), (4, 1)])
def test_repeated_layers_preserve_the_function_until_they_train(
    corpus: Path, tmp_path: Path, order: Order, num_layers: int, num_dense_layers: int
) -> None:
    new = tiny_model(num_layers=num_layers, num_dense_layers=num_dense_layers)
    assert grown(tiny_model(), new, corpus, tmp_path / "a", order=order) <= EXACT
    plain = grown(tiny_model(), new, corpus, tmp_path / "b", order=order, repeat=Repeat.copy)
    assert plain > EXACT


def dense_model(kind: str) -> ModelConfig:
    values: dict[str, Any] = {"num_dense_layers": 3, "moe": None, "ffn_dim": 48}
    if kind == "gqa":
        values["attention"] = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    return tiny_model(**values)


UPCYCLED = {
    "copies": {"num_experts": 4, "top_k": 2, "expert_dim": 48},
    "three pieces": {"num_experts": 12, "top_k": 3, "expert_dim": 16},
    "two replicas of two pieces": {"num_experts": 8, "top_k": 4, "expert_dim": 24},
}


@pytest.mark.parametrize("router", [name for name in ROUTERS if "groups" not in name])
@pytest.mark.parametrize("cut", UPCYCLED)
def test_a_dense_network_becomes_experts_without_a_change(
    corpus: Path, tmp_path: Path, cut: str, router: str
) -> None:
    old = dense_model("mla")
    experts = moe(ROUTERS[router], num_shared_experts=1, **UPCYCLED[cut])
    new = replace(old, moe=experts, num_dense_layers=1)
    assert grown(old, new, corpus, tmp_path) <= EXACT


def test_the_last_dense_layer_of_a_model_with_experts_becomes_one_of_them(
    corpus: Path, tmp_path: Path
) -> None:
    """At once: layer 0 cut into three pieces per network, deeper, and more shared experts."""
    old = tiny_model(moe=moe(num_experts=9, top_k=3))
    new = tiny_model(
        moe=moe(num_experts=9, top_k=3, num_shared_experts=2), num_dense_layers=0, num_layers=5
    )
    assert grown(old, new, corpus, tmp_path) <= EXACT


def test_noise_moves_the_clones_and_only_them(corpus: Path, tmp_path: Path) -> None:
    old, new = tiny_model(), tiny_model(moe=moe(RouterConfig(), num_experts=16, top_k=4))
    config = random_run(tmp_path, corpus, model=old)
    stored = open_checkpoint(Path(config.run_dir), step=None)
    growth = Growth(old=old, new=new, seed=0, choices=GrowChoices(noise=0.01))
    tensors = GrownTensors(growth, stored)
    place = list(tensors.places_of("layers.1.ffn.experts.gate"))
    originals = stored.read("weight/layers.1.ffn.experts.gate", start=0, shape=(8, 16, 32))
    for expert in range(16):
        difference = tensors.read("weight/", place[expert]) - originals[expert % 8]
        relative = (difference.std() / originals[expert % 8].std()).item()
        assert relative == pytest.approx(0.01 if expert >= 8 else 0.0, rel=0.2)


def test_pruning_keeps_the_most_used_and_merging_averages_the_others_into_the_nearest() -> None:
    old, new = moe(), moe(num_experts=6)
    load = torch.tensor([5, 90, 80, 70, 60, 50, 40, 0])
    rows = torch.eye(8)
    rows[0], rows[7] = rows[2] * 3.0, rows[4] + 0.1 * rows[1]
    pruned = plan_experts(old, new, shrink=Shrink.prune, load=load, rows=rows)
    assert [source.shares for source in pruned.sources] == [{e: 1.0} for e in range(1, 7)]
    merged = plan_experts(old, new, shrink=Shrink.merge, load=load, rows=rows)
    assert merged.sources[1].shares == {2: 81 / 87, 0: 6 / 87}
    assert merged.sources[3].shares == {4: 61 / 62, 7: 1 / 62}
    assert merged.sources[0].shares == {1: 1.0}


@pytest.mark.parametrize("shrink", Shrink)
def test_fewer_experts_undo_cloning_without_loss(
    corpus: Path, tmp_path: Path, shrink: Shrink
) -> None:
    """8 experts dormant-cloned to 16 and back: the clones are the least used."""
    config = random_run(tmp_path, corpus, model=tiny_model())
    wide = replace(config, model=tiny_model(moe=moe(RouterConfig(), num_experts=16)))
    wide.run_dir = str(tmp_path / "wide")
    silent = {"report": lambda difference: None}
    grow(Path(config.run_dir), config, wide, GrowChoices(), **silent)
    narrow = replace(wide, model=config.model, run_dir=str(tmp_path / "narrow"))
    changes = []
    grow(Path(wide.run_dir), wide, narrow, GrowChoices(shrink=shrink), report=changes.append)
    if shrink is Shrink.prune:
        assert changes[0].relative <= EXACT


def test_the_streamed_function_is_the_models(corpus: Path, tmp_path: Path) -> None:
    model = tiny_model()
    config = random_run(tmp_path, corpus, model=model)
    stored = open_checkpoint(Path(config.run_dir), step=None)
    whole = restore(Path(config.run_dir), ranks=alone()).model
    assert isinstance(whole, Transformer)
    got = run_model(model, fill_from(stored), TEXT)
    torch.testing.assert_close(got.logits[0], whole.logits(TEXT).detach(), rtol=0, atol=1e-5)
    assert [int(load.sum()) for load in got.load.values()] == [2 * 72, 2 * 72, 2 * 72]


def test_moments_follow_their_weights_gradients(corpus: Path, tmp_path: Path) -> None:
    """Against autograd: gradients of the grown model, times the factor, are the old model's."""
    old = tiny_model(moe=moe(RouterConfig(renormalise=False)))
    new = tiny_model(moe=moe(RouterConfig(renormalise=False), num_experts=16, top_k=4))
    config = random_run(tmp_path, corpus, model=old)
    stored = open_checkpoint(Path(config.run_dir), step=None)
    tensors = GrownTensors(Growth(old=old, new=new, seed=0), stored)
    gradients = []
    for model_config, source in ((old, stored), (new, tensors)):
        model = Transformer(model_config)
        fill = fill_from(source)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                fill(name, tensor)
        positions = torch.arange(24).expand_as(TEXT)
        model(TEXT, TEXT, positions, TEXT >= 0, segments=[24] * 3).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})

    class OldGradients:
        manifest = stored.manifest

        def read(self, name: str, *, start: int, shape: tuple[int, ...]) -> torch.Tensor:
            kind, _, rest = name.partition("/")
            assert kind == "exp_avg"
            found = gradients[0][rest].flatten()  # type: ignore[union-attr]
            return found[start : start + torch.Size(shape).numel()].view(shape)

    moved = GrownTensors(Growth(old=old, new=new, seed=0), OldGradients())  # type: ignore[arg-type]
    for place in moved.places():
        if place.name.startswith("mtp"):
            continue
        expected = gradients[1][place.name]
        assert expected is not None
        expected = expected if place.expert is None else expected[place.expert]
        got = moved.read("exp_avg/", place)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, place


def test_moments_of_zero_are_zero_and_second_moments_scale_by_the_square(
    corpus: Path, tmp_path: Path
) -> None:
    old, new = tiny_model(), tiny_model(moe=moe(RouterConfig(), num_experts=16, top_k=4))
    config = random_run(tmp_path, corpus, model=old)
    stored = open_checkpoint(Path(config.run_dir), step=None)

    class Ones:
        manifest = stored.manifest

        def read(self, name: str, *, start: int, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.ones(shape)

    for moments, expected in ((GrownMoments.copy, 0.25), (GrownMoments.zero, 0.0)):
        growth = Growth(old=old, new=new, seed=0, choices=GrowChoices(moments=moments))
        tensors = GrownTensors(growth, Ones())  # type: ignore[arg-type]
        place = next(iter(tensors.places_of("layers.1.ffn.experts.gate")))
        assert tensors.read("exp_avg_sq/", place).eq(expected).all()


REFUSED: dict[str, tuple[Callable[[ModelConfig], ModelConfig], str]] = {
    "width": (lambda m: replace(m, dim=64), "can't change model.dim"),
    "expert width": (
        lambda m: replace(m, moe=moe(expert_dim=8)),
        "can't change model.moe.expert_dim",
    ),
    "nothing": (lambda m: m, "nothing grows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_grow_is_refused_by_its_key(tmp_path: Path, case: str) -> None:
    old: RunConfig = tiny_run(tmp_path, model=tiny_model(moe=moe()))
    change, message = REFUSED[case]
    new = replace(old, model=change(old.model), run_dir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=message):
        check(old, new, GrowChoices())


REFUSED_PLANS = {
    "fewer layers": ({"num_layers": 2}, "takes none away"),
    "experts to dense": ({"num_dense_layers": 2}, "has no room|dense layers of ones"),
    "half a group": (
        {"moe": moe(RouterConfig(num_groups=4, top_groups=2), num_experts=8)},
        "keep the 1 groups",
    ),
    "fewer shared": ({"moe": moe(num_shared_experts=1)}, "can't become less"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_models_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path, case: str) -> None:
    changes, message = REFUSED_PLANS[case]
    with pytest.raises(ValueError, match=message):
        grown(
            tiny_model(moe=moe(num_shared_experts=2)),
            tiny_model(**{"moe": moe(num_shared_experts=2), **changes}),
            corpus,
            tmp_path,
        )

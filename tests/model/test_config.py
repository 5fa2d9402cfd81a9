import pytest

from model.config import check_model
from tests.model.small import small_config


def test_the_small_model_is_allowed() -> None:
    check_model(small_config(mtp_depth=2))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_size", 0, r"model\.vocab_size=0 must be at least 1"),
        ("num_layers", 0, r"model\.num_layers=0 must be at least 1"),
        ("num_dense_layers", 3, r"model\.num_dense_layers=3 must lie between 0 and .*num_layers=2"),
        ("mtp.depth", -1, r"model\.mtp\.depth=-1 .* must not be negative"),
        ("attention.num_heads", 0, r"model\.attention\.num_heads=0 must be positive"),
        ("attention.q_lora_rank", 0, r"model\.attention\.q_lora_rank=0 must be positive"),
        ("attention.v_head_dim", 11, r"v_head_dim=11 exceeds the query's width 10"),
        ("attention.rope_head_dim", 3, r"model\.attention\.rope_head_dim=3 is odd"),
        ("rope.factor", 2.0, r"model\.rope\.factor=2\.0 has no effect"),
        ("moe.top_k", 9, r"model\.moe\.top_k=9 exceeds model\.moe\.num_experts=8"),
        ("moe.router.num_groups", 3, r"num_groups=3 does not divide model\.moe\.num_experts=8"),
        (
            "moe.device_balance_loss_weight",
            0.05,
            r"device_balance_loss_weight=0\.05 has nothing to balance in .*num_groups=1",
        ),
        (
            "moe.communication_balance_loss_weight",
            -1.0,
            r"communication_balance_loss_weight=-1\.0 must not be negative",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(path: str, value: float, message: str) -> None:
    config = small_config()
    *nodes, field = path.split(".")
    node: object = config
    for name in nodes:
        node = getattr(node, name)
    setattr(node, field, value)
    with pytest.raises(ValueError, match=message):
        check_model(config)

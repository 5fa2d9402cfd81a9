"""FlashAttention 3 or 4 in place of the flash attention that torch has: in torch's own dispatcher.

Once active, `varlen_attn` and flash's part of `scaled_dot_product_attention` run on it, forward and
backward (torch.nn.attention.activate_flash_attention_impl). torch calls both prototypes.
"""

from importlib.util import find_spec

from torch.nn import attention

MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface"}  # as torch imports


def is_installed(version: str) -> bool:
    """Whether the package of `fa3` or `fa4` is there."""
    try:
        return find_spec(MODULES[version]) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def activate(version: str | None) -> None:
    """Take `fa3` or `fa4` from now on, in the whole process; with None torch's own again.

    Raises:
        ValueError: It is not installed.
    """
    global _active
    if version == _active:
        return
    if version is None:
        attention.restore_flash_attention_impl()
    elif is_installed(version):
        attention.activate_flash_attention_impl(version.upper())
    else:
        raise ValueError(
            f"kernels.attention={version} needs {MODULES[version]}, which is not installed; "
            "choose kernels.attention=auto"
        )
    _active = version


_active: str | None = None

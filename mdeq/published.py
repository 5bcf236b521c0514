"""The authors' published checkpoints under our names, strictly: every name is used, or known to repeat another.

Both releases are read. The older one holds f_theta up to four times: `fullstage` and, the same tensors, `deq.func`; and
the copies that its backward pass used, `fullstage_copy` and `deq.func_copy`, which may lag a step behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_COPIES = ("fullstage_copy.", "deq.func_copy.")

_RENAMES = [
    (r"downsample\.", "backbone.stem."),
    (r"stage0\.", "backbone.stage0."),
    (r"fullstage\.branches\.(\d+)\.blocks\.0\.conv([12])\.weight_([gv])", r"backbone.f.blocks.\1.conv\2.\3"),
    (r"fullstage\.branches\.(\d+)\.blocks\.0\.conv([12])\.weight$", r"backbone.f.blocks.\1.conv\2.v"),
    (r"fullstage\.branches\.(\d+)\.blocks\.0\.gn([123])\.", r"backbone.f.blocks.\1.norm\2."),
    (r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.weight", r"backbone.f.fusion.\1.\2.conv.v"),
    (r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.", r"backbone.f.fusion.\1.\2.norm."),
    (r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.weight", r"backbone.f.fusion.\1.\2.layers.\3.conv.v"),
    (r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.", r"backbone.f.fusion.\1.\2.layers.\3.norm."),
    (r"fullstage\.post_fuse_layers\.(\d+)\.conv\.weight_([gv])", r"backbone.f.post.\1.conv.\2"),
    (r"fullstage\.post_fuse_layers\.(\d+)\.conv\.weight$", r"backbone.f.post.\1.conv.v"),
    (r"fullstage\.post_fuse_layers\.(\d+)\.gnorm\.", r"backbone.f.post.\1.norm."),
    (r"incre_modules\.(\d+)\.0\.downsample\.", r"head.increase.\1.shortcut."),
    (r"incre_modules\.(\d+)\.0\.conv([123])\.", r"head.increase.\1.conv\2."),
    (r"incre_modules\.(\d+)\.0\.bn([123])\.", r"head.increase.\1.norm\2."),
    (r"downsamp_modules\.(\d+)\.", r"head.merge.\1."),
    (r"final_layer\.", "head.final."),
    (r"classifier\.", "head.classifier."),
    (r"last_layer\.", "head.layers."),
]


def state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The published state dict in what a published file holds: bare or wrapped; `module.` removed."""
    state = checkpoint.get("state_dict", checkpoint)
    return {name.removeprefix("module."): value for name, value in state.items()}


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict, of either release, under the names of `mdeq.model.Network`.

    Raises:
        KeyError: for names that no published MDEQ has, all of them listed.
        ValueError: if `deq.func` is not the `fullstage` that it repeats.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        if name.startswith(_COPIES):
            continue
        ours = _ours(re.sub(r"^deq\.func\.", "fullstage.", name))
        if ours is None:
            unknown.append(name)
        elif ours in renamed and not torch.equal(renamed[ours], value):
            raise ValueError(f"{name}: differs from the tensor that it should repeat ({ours} here)")
        else:
            renamed[ours] = value
    if unknown:
        raise KeyError(f"not names of a published MDEQ: {', '.join(unknown)}")
    return renamed


def _ours(name: str) -> str | None:
    for pattern, replacement in _RENAMES:
        ours, hits = re.subn("^" + pattern, replacement, name)
        if hits:
            return ours
    return None

"""The authors' published checkpoints under our names, strictly: no name is dropped silently.

Both releases and both tasks are read. The older release holds f_theta up to four times:
`fullstage` and, the same tensors, `deq.func`; and the copies that its backward pass used,
`fullstage_copy` and `deq.func_copy`, which may lag a step behind. The segmentation trainer puts
`model.` before each name, and its loss's class weights beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = ("fullstage_copy.", "deq.func_copy.", "loss.criterion.")

RENAMES = {
    r"downsample\.": "backbone.stem.",
    r"stage0\.": "backbone.stage0.",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.conv([12])\.": r"backbone.f.blocks.\1.conv\2.",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.gn([123])\.": r"backbone.f.blocks.\1.norm\2.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.": r"backbone.f.fusion.\1.\2.layers.\3.",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.": r"backbone.f.fusion.\1.\2.",
    r"fullstage\.post_fuse_layers\.(\d+)\.": r"backbone.f.post.\1.",
    r"incre_modules\.(\d+)\.0\.downsample\.": r"head.increase.\1.shortcut.",
    r"incre_modules\.(\d+)\.0\.conv([123])\.": r"head.increase.\1.conv\2.",
    r"incre_modules\.(\d+)\.0\.bn([123])\.": r"head.increase.\1.norm\2.",
    r"downsamp_modules\.(\d+)\.": r"head.merge.\1.",
    r"final_layer\.": "head.final.",
    r"classifier\.": "head.classifier.",
    r"last_layer\.": "head.layers.",
}

ENDINGS = {  # inside f_theta
    r"gnorm\.(weight|bias)$": r"norm.\1",
    r"(conv\d?)\.weight_([gv])$": r"\1.\2",
    r"(conv\d?)\.weight$": r"\1.v",
}


def convert(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a `mdeq.model.Network` from what a published file holds, and what is ignored.

    Args:
        checkpoint: A state dict of either release, bare or beside an optimizer's state and the
            like; `module.` and `model.` may precede its names, in any order.

    Raises:
        ValueError: It holds names that no published MDEQ has (all are listed), something other
            than tensors, or a `deq.func` that is not the `fullstage` that it repeats.
    """
    state, ignored = checkpoint, []
    if isinstance(checkpoint.get("state_dict"), Mapping):
        state = checkpoint["state_dict"]
        ignored = [str(name) for name in checkpoint if name != "state_dict"]
    found: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        bare = re.sub(r"^((module|model)\.)+", "", str(name))
        ours = _ours(re.sub(r"^deq\.func\.", "fullstage.", bare))
        if bare.startswith(IGNORED):
            ignored.append(name)
        elif ours is None:
            unknown.append(str(name))
        elif not isinstance(value, Tensor):
            raise ValueError(f"{name}: must be a tensor, not {type(value).__name__}")
        elif ours in found and not torch.equal(found[ours], value):
            raise ValueError(f"{name}: differs from the tensor that it should repeat ({ours} here)")
        else:
            found[ours] = value
    if unknown:
        raise ValueError(f"not names of a published MDEQ: {', '.join(unknown)}")
    return found, ignored


def _ours(name: str) -> str | None:
    for pattern, replacement in RENAMES.items():
        ours, hits = re.subn("^" + pattern, replacement, name)
        if not hits:
            continue
        if ours.startswith("backbone.f."):
            for ending, short in ENDINGS.items():
                ours = re.sub(ending, short, ours)
        return ours
    return None

"""The authors' published state dicts, renamed to ours; strictly: every name is known and every name is used."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under the names of `mdeq.model.Network`.

    Raises:
        KeyError: for names that no published MDEQ has, all of them listed.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        for pattern, replacement in _RENAMES:
            ours, hits = re.subn("^" + pattern, replacement, name)
            if hits:
                renamed[ours] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise KeyError(f"not names of a published MDEQ: {', '.join(unknown)}")
    return renamed

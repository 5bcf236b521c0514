"""Cityscapes' official evaluation, csEvalPixelLevelSemanticLabeling, beside any NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as tool

from pipeline.data.cityscapes import LABEL_END
from pipeline.data.manifest import fault


def official_evaluation(predictions: Path, truths: Path) -> dict[str, Any]:
    """The official tool's scores of predictions.

    The tool needs `np.in1d`, which NumPy 2.4 no longer has; it is put back while the tool runs.

    Args:
        predictions: The folder that `cityscapes.write_prediction` wrote to.
        truths: The ground truth of a split, as gtFine/val, with labelIds and instanceIds.

    Returns:
        Fractions, among them `averageScoreClasses` (mIoU) and `classScores` (each class's IoU).

    Raises:
        UserError: A picture is missing, or the tool stops for another reason.
    """
    wanted = sorted(truths.glob(f"*/*{LABEL_END}"))
    if not wanted:
        raise fault(truths, f"no city folder with *{LABEL_END} in it")
    found = []
    for path in wanted:
        found.append(predictions / f"{path.name.removesuffix(LABEL_END)}_pred_labelIds.png")
        if not found[-1].is_file():
            raise fault(found[-1], "no such prediction; evaluate the whole split (limit: null)")
    pairs = [str(path) for path in found], [str(path) for path in wanted]
    quiet = patch.multiple(tool.args, JSONOutput=False, quiet=True, evalInstLevelScore=True)
    with patch.object(np, "in1d", np.isin, create=True), quiet:
        try:
            return tool.evaluateImgLists(*pairs, tool.args)
        except SystemExit:  # it has said why
            raise fault(truths, "the official tool stopped; its reason stands above") from None

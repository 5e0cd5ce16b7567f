"""What a person reads at the terminal."""

from __future__ import annotations

import pytest

from cosa_ray.cli.output import heading
from cosa_ray.config.schema import Config


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("seed", ["seed"]),
        ("losses.cam_to_seg", ["losses.", "cam_to_seg"]),
        ("dynamic_threshold.tolerance", ["dynamic_", "threshold.", "tolerance"]),
        ("model.backbone_args.embed_dim", ["model.", "backbone_", "args.", "embed_dim"]),
    ],
)
def test_a_setting_heads_a_narrow_column(key: str, lines: list[str]) -> None:
    assert heading(key).split("\n") == lines


def test_no_letter_of_any_setting_is_lost() -> None:
    keys = [
        f"{section}.{name}"
        for section, value in Config().model_dump().items()
        if isinstance(value, dict)
        for name in value
    ]
    assert len(keys) > 50
    for key in keys:
        assert heading(key).replace("\n", "") == key
        assert max(map(len, heading(key).split("\n"))) <= 14

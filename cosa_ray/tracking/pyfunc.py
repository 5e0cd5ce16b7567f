"""A registered model as `mlflow.pyfunc` loads it: pictures in, palette masks out; Ray is not needed.

MLflow finds `_load_pyfunc` here by the name of this module.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from cosa_ray.config.protocol import NetworkName, in_run_protocol
from cosa_ray.data.pictures import decode_rgb
from cosa_ray.evaluation.description import is_model
from cosa_ray.evaluation.inference import autocast_dtype
from cosa_ray.evaluation.prediction import Segmenter, mask_png
from cosa_ray.evaluation.trained import load_trained

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

DATA = "cosa_model"
_NETWORKS: dict[str, NetworkName | None] = {"better": None, "assignment": "assignment", "online": "online"}


def signature() -> ModelSignature:
    """Inputs: `image`, an encoded picture, and optionally `labels`, the names of its classes, to which the mask is then
    restricted. Outputs: `mask`, a palette PNG of the picture's size, the `classes` in it, `height` and `width`.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(Array(DataType.string), "labels", required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.binary, "mask"),
                ColSpec(Array(DataType.string), "classes"),
                ColSpec(DataType.long, "height"),
                ColSpec(DataType.long, "width"),
            ]
        ),
        params=ParamSchema(
            [ParamSpec("network", DataType.string, "better"), ParamSpec("presence", DataType.double, 0.0)]
        ),
    )


def example() -> pd.DataFrame:
    """A picture of 48 x 32 pixels: a colour gradient."""
    import pandas as pd

    rows, columns = np.mgrid[0:32, 0:48]
    pixels = np.stack([rows * 8, columns * 5, 255 - rows * 8], -1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return pd.DataFrame({"image": [stream.getvalue()]})


class MaskModel:
    """A trained model behind MLflow's interface, on the GPU where there is one."""

    def __init__(self, folder: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trained = load_trained(folder, device)
        self.protocol = in_run_protocol(self.trained.config)
        self.device = device

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """See `signature`; `params["network"]`: better (when the checkpoint was written), assignment or online;
        `params["presence"]`: leave out classes that the classifier gives less than this probability.

        Raises ValueError for a picture that cannot be decoded, an unknown class or network, and no probability.
        """
        import pandas as pd

        network = self._network((params or {}).get("network", "better"))
        presence = (params or {}).get("presence", 0.0)
        if not 0 <= presence < 1:
            raise ValueError(f"params.presence is {presence}; use a probability from 0 to below 1")
        autocast = autocast_dtype(self.trained.config, self.device)
        segment = Segmenter(self.trained, self.protocol, network, "segmentation", self.device, autocast, presence)
        pictures = [self._picture(row, data) for row, data in enumerate(model_input["image"])]
        named = model_input["labels"] if "labels" in model_input else [None] * len(pictures)
        found = segment(pictures, [self._labels(names) for names in named])
        names = ("background", *self.trained.classes)
        return pd.DataFrame(
            {
                "mask": [mask_png(each.mask, self.trained.card.palette) for each in found],
                "classes": [[names[value] for value in np.unique(each.mask) if value > 0] for each in found],
                "height": [each.mask.shape[0] for each in found],
                "width": [each.mask.shape[1] for each in found],
            }
        )

    def _picture(self, row: int, data: bytes) -> Image.Image:
        try:
            return decode_rgb(bytes(data))
        except Exception as error:
            raise ValueError(f"the picture of row {row} cannot be decoded ({error})") from None

    def _labels(self, names: Sequence[str] | None) -> np.ndarray | None:
        # A column that one row fills and another does not holds NaN there.
        if names is None or isinstance(names, float):
            return None
        unknown = [name for name in names if name not in self.trained.classes]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}; the model knows {', '.join(self.trained.classes)}")
        return np.array([name in names for name in self.trained.classes], np.float32)

    def _network(self, name: str) -> NetworkName | None:
        if name not in _NETWORKS:
            raise ValueError(f"params.network is {name!r}; use {', '.join(_NETWORKS)}")
        return _NETWORKS[name]


def _load_pyfunc(path: str) -> MaskModel:
    """What MLflow calls with the path of the model's data."""
    where = Path(path)
    return MaskModel(where if is_model(where) else where / DATA)

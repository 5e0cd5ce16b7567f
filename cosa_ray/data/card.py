"""The card of a dataset, dataset.json: all that tells one dataset from another."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from cosa_ray.data.remote import NotThere, Place
from cosa_ray.errors import UserError

CARD = "dataset.json"
FORMAT = "cosa-ray dataset"
VERSIONS = (1, 2)  # 2 has subsets; without them 1 is written, which earlier versions of this package read
SUBSETS = "subsets"  # folder inside the dataset's, of the lists that say which images a subset has

Count = Annotated[int, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # of a split or subset: part of files' and metrics' names


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardCard(_Part):
    """One Arrow IPC file of a split."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", description="File name inside the dataset's folder.")
    images: Count
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PutAside(_Part):
    """A sample of the source that could not be used, by name."""

    id: str
    reason: str


class SplitCard(_Part):
    """Counts and shards of one split."""

    images: Count
    masks: Count = Field(description="Images that have a mask.")
    images_per_class: tuple[Count, ...] = Field(description="Images whose labels name each class.")
    without_labels: Count = Field(0, description="Images of the source left out because no class is in them.")
    put_aside: tuple[PutAside, ...] = ()
    shards: tuple[ShardCard, ...] = ()


class SubsetCard(_Part):
    """Some images of a split under a name of their own; which ones is in a list beside the card, one id a line."""

    of: str = Field(description="Split whose images they are.")
    ids_file: str = Field(pattern=rf"^{SUBSETS}/[A-Za-z0-9_-]+\.txt$", description="The list, in the dataset's folder.")
    images: Annotated[int, Field(ge=1)]
    masks: Count = Field(description="Images that have a mask.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the list.")
    origin: str = Field(description="How the images were chosen.")


class Origin(_Part):
    """The import that made the dataset."""

    kind: str = Field(description="Importer: voc, coco, folder, shapes.")
    source: str | None = Field(description="Folder or URI that was imported; null for generated pictures.")
    options: dict[str, Any] = Field(default_factory=dict)


class DatasetCard(_Part):
    """What a dataset folder holds; written last, so that a folder with a card is complete."""

    format: Literal["cosa-ray dataset"] = "cosa-ray dataset"
    version: Literal[1, 2] = 1
    classes: tuple[str, ...] = Field(min_length=1, description="Class names, background left out (mask values 1..C).")
    palette: tuple[tuple[Byte, Byte, Byte], ...] = Field(description="RGB of background and of every class.")
    labels_from: str = Field(description="Where the image-level labels came from.")
    masks_from: str = Field(description="Where the masks came from.")
    origin: Origin
    splits: dict[Name, SplitCard]
    subsets: dict[Name, SubsetCard] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> DatasetCard:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        if len(self.palette) != len(self.classes) + 1:
            raise ValueError(f"{len(self.palette)} palette colours for background and {len(self.classes)} classes")
        for name, split in self.splits.items():
            if len(split.images_per_class) != len(self.classes):
                raise ValueError(f"split {name} counts {len(split.images_per_class)} of {len(self.classes)} classes")
            if split.images != sum(shard.images for shard in split.shards):
                raise ValueError(f"split {name} says {split.images} images and its shards say otherwise")
        for name, subset in self.subsets.items():
            if subset.of not in self.splits:
                raise ValueError(f"subset {name} is of a split {subset.of}, which is not there")
            if name in self.splits:
                raise ValueError(f"{name} is a split and a subset")
        if self.subsets and self.version < 2:
            raise ValueError(f"format {self.version} has no subsets")
        return self

    @model_serializer(mode="wrap")
    def _as_its_format_says(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        if not self.subsets:
            content.pop("subsets", None)  # which format 1 does not know
        return content


def read_card(folder: Place) -> DatasetCard:
    """The card of a dataset folder. Raises NotThere without one, UserError when it is damaged or of another version."""
    try:
        text = folder.child(CARD).read()
    except FileNotFoundError:
        unfinished = " (an import into it was interrupted: run the same import again to finish it)"
        hint = unfinished if folder.child("_import").exists() else ""
        hint += "" if folder.local else ", or it cannot be reached"  # over HTTP these look the same
        raise NotThere(
            f"no dataset at {folder.uri}{hint}: make one with `cosa-ray data import shapes|voc|coco|folder ...`"
        ) from None
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{folder.uri}/{CARD} is not the card of a {FORMAT}: import the data again")
        if content.get("version") not in VERSIONS:
            raise UserError(
                f"{folder.uri} has dataset format {content.get('version')}, this version reads "
                f"{' and '.join(map(str, VERSIONS))}: use the cosa-ray that wrote it, or import the data again"
            )
        return DatasetCard.model_validate(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder.uri}/{CARD} is damaged ({error}): import the data again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        raise UserError(f"{folder.uri}/{CARD} is damaged ({where}: {first['msg']}): import the data again") from None


def write_card(card: DatasetCard, folder: Place) -> None:
    """Write the card, atomically where the file system can."""
    folder.child(CARD).write((card.model_dump_json(indent=1) + "\n").encode())

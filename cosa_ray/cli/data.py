"""`cosa-ray data`: make datasets, check them, look at them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosa_ray.cli.output import count_bar, json_only, say, table
from cosa_ray.errors import UserError

if TYPE_CHECKING:
    from cosa_ray.data.card import DatasetCard, SubsetCard
    from cosa_ray.data.check import CheckReport
    from cosa_ray.data.importing import Progress

app = typer.Typer(no_args_is_help=True, help="Make datasets, check them, look at them.")
import_ = typer.Typer(
    no_args_is_help=True,
    help="Make a dataset folder. Runs in parallel on Ray; an interrupted import goes on where it stopped when the same "
    "command is run again. Folders may be URIs (s3://...).",
)
app.add_typer(import_, name="import")

Out = Annotated[str, typer.Argument(metavar="OUT", help="Dataset folder or URI to make.")]
From = Annotated[str, typer.Argument(metavar="SRC", help="Folder or URI to import.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first broken image or mask, naming it.")]
Local = Annotated[bool, typer.Option("--local", help="Import in this process, without Ray.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Dataset folder or URI.")]

NAMED = 20  # broken samples and disagreements that are listed; JSON has them all


@import_.command()
def shapes(
    out: Out,
    variant: Annotated[
        str, typer.Option(help="plain, or coexist: three classes mostly stand on a background of their own.")
    ] = "plain",
    train: Annotated[int, typer.Option(help="Training images.")] = 2000,
    val: Annotated[int, typer.Option(help="Validation images.")] = 200,
    size: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 96,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the pictures.")] = 0,
    strict: Strict = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Draw the embedded data set: textured shapes of 5 classes, with exact masks.

    Example: cosa-ray data import shapes datasets/shapes
    """
    options = {"variant": variant, "train": train, "val": val, "size": size, "seed": seed}
    _import("shapes", None, out, options, strict, local, as_json)


@import_.command()
def voc(
    source: From,
    out: Out,
    labels: Annotated[str, typer.Option(help="Image-level labels: auto, xml, masks or json.")] = "auto",
    strict: Strict = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Import PASCAL VOC 2012 (VOCdevkit/VOC2012), with train_aug where SegmentationClassAug is there.

    Example: cosa-ray data import voc VOCdevkit datasets/voc
    """
    _import("voc", source, out, {"labels": labels}, strict, local, as_json)


@import_.command()
def coco(
    source: From,
    out: Out,
    masks: Annotated[str, typer.Option(help="Masks: auto, json (rasterised), png or none.")] = "auto",
    year: Annotated[str, typer.Option(help="Year in the folder and annotation names.")] = "2014",
    val_part: Annotated[
        str | None,
        typer.Option(
            help="List of the images of val that the subset val_part names \\[default: SRC/val_part.txt, if any]."
        ),
    ] = None,
    strict: Strict = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Import MS COCO: {train,val}2014, annotations/instances_*2014.json, SegmentationClass/*2014 if there.

    The published runs evaluate on 5,000 images of val while they train. Their list comes with the authors' code, not
    with this package; `cosa-ray data subset OUT val_random --random 5000` names as many, but not the same images.

    Example: cosa-ray data import coco coco datasets/coco --val-part val_part.txt
    """
    from cosa_ray.data.coco import val_part_list

    listed = val_part_list(source, val_part)
    _import("coco", source, out, {"masks": masks, "year": year}, strict, local, as_json, listed)


@import_.command()
def folder(
    source: From,
    out: Out,
    labels: Annotated[str | None, typer.Option(help="Label file in SRC \\[default: labels.csv, labels.json].")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the images for val, when no split is given.")] = 0.0,
    strict: Strict = False,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Import a folder of your own: SRC/images, SRC/labels.csv or .json, and optionally SRC/masks and SRC/classes.txt.

    labels.csv: columns image, labels (names with ; between), optionally split - or one column of 0 and 1 a class.
    labels.json: {image: \\[class, ...]} or {split: {image: \\[class, ...]}}. Masks: PNG of class indices (0 background,
    255 ignored) or of the colours in classes.txt (one class a line: name r g b).

    Example: cosa-ray data import folder photos datasets/photos --val-fraction 0.1
    """
    _import("folder", source, out, {"labels": labels, "val_fraction": val_fraction}, strict, local, as_json)


def _import(
    kind: str,
    source: str | None,
    out: str,
    options: dict[str, Any],
    strict: bool,
    local: bool,
    as_json: bool,
    val_part: str | None = None,
) -> None:
    from cosa_ray.data.importing import import_dataset
    from cosa_ray.data.subsets import add_subset

    started = time.monotonic()
    with json_only(as_json) as emit, import_progress(kind) as progress:
        try:
            card = import_dataset(kind, source, out, strict=strict, local=local, progress=progress, **options)
        except KeyboardInterrupt:
            say(f"cosa-ray: stopped; run the same command again to finish {out}")
            raise
        if val_part is not None:
            try:
                card = add_subset(out, "val_part", of="val", ids=val_part)
            except UserError as error:
                raise UserError(
                    f"{out} is imported, without its subset val_part, which `data subset` can still make: {error}"
                ) from None
        aside = [(split, item) for split, part in card.splits.items() for item in part.put_aside]
        for split, item in aside[:NAMED]:
            say(f"put aside: {split} {item.id}: {item.reason}")
        if len(aside) > NAMED:
            say(f"put aside: {len(aside) - NAMED} more, all listed in {out}/dataset.json")
        emit({"dataset": out, "seconds": round(time.monotonic() - started, 2), "card": card.model_dump(mode="json")})
    if not as_json:
        _print_card(card, out)


def _print_card(card: DatasetCard, out: str) -> None:
    rows = [
        [name, str(split.images), str(split.masks), str(split.without_labels), str(len(split.put_aside))]
        for name, split in card.splits.items()
    ]
    table(out, ["split", "images", "masks", "left out, no label", "put aside"], rows)
    for name, subset in card.subsets.items():
        say(_subset_line(name, subset, card.splits[subset.of].images))
    say(f"labels: {card.labels_from}; masks: {card.masks_from}")


def _subset_line(name: str, subset: SubsetCard, images: int) -> str:
    chosen = f"{subset.images} of the {images} images of {subset.of}, {subset.masks} with a mask"
    return f"subset {name}: {chosen} ({subset.origin}); listed in {subset.ids_file}"


@app.command()
def subset(
    dataset: Dataset,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the subset, used wherever a split's is.")],
    of: Annotated[str, typer.Option(help="Split whose images they are.")] = "val",
    ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="List of images, the id or file name of one a line.")
    ] = None,
    first: Annotated[int | None, typer.Option(metavar="N", help="The split's first N images.")] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="N images drawn with --seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of --random.")] = 0,
    rest_of: Annotated[
        str | None, typer.Option(metavar="SUBSET", help="The images that another subset of the split leaves out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Name some images of a split, copying none; the name then serves as a split: data.val_split, --split, metrics.

    COCO's val_part of the published runs is the list of 5,000 names that comes with the authors' code. --random 5000
    names as many, but not the same images: give it another name.

    Example: cosa-ray data subset datasets/coco val_part --of val --ids val_part.txt
    """
    from cosa_ray.data.subsets import add_subset

    with json_only(as_json) as emit:
        if sum(choice is not None for choice in (ids, first, random, rest_of)) != 1:
            raise UserError("`data subset` needs one of --ids, --first, --random and --rest-of: give exactly one")
        card = add_subset(dataset, name, of=of, ids=ids, first=first, random=random, seed=seed, rest_of=rest_of)
        made = card.subsets[name]
        say(_subset_line(name, made, card.splits[made.of].images))
        emit({"dataset": dataset, "name": name, **made.model_dump(mode="json")})


@app.command()
def check(dataset: Dataset, as_json: AsJson = False) -> None:
    """Count a dataset's classes and pixels, verify its checksums, and list where labels and masks disagree.

    Exit code 1 when anything is damaged.
    """
    from cosa_ray.data.check import check_dataset

    with json_only(as_json) as emit:
        with count_bar("check") as show:
            report = check_dataset(dataset, lambda done, total: show(done, total, 0))
        emit(report.model_dump(mode="json"))
    if not as_json:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: CheckReport) -> None:
    print(f"{report.dataset}: labels from {report.labels_from}; masks from {report.masks_from}")
    rows = []
    for name, split in report.splits.items():
        height, width = ("-".join(str(side) for side in sides[::2]) or "-" for sides in (split.height, split.width))
        counts = (split.images, split.masks, split.without_labels, split.left_out_without_labels, len(split.put_aside))
        rows.append([name, *map(str, counts), height, width, f"{split.bytes / 1e6:.1f} MB"])
    columns = ["split", "images", "masks", "no label", "left out", "put aside", "height", "width", "size"]
    table("splits", columns, rows)
    if report.subsets:
        columns = ["subset", "of", "images", "masks", "not in the split", "chosen by"]
        named = report.subsets.items()
        rows = [[n, s.of, str(s.images), str(s.masks), str(len(s.missing)), s.origin] for n, s in named]
        table("subsets", columns, rows)
    rows = []
    for index, name in enumerate(["background", *report.classes]):
        row = [name, report.palette[index]]
        for split in report.splits.values():
            pixels = sum(split.pixels_per_class)
            share = f"{100 * split.pixels_per_class[index] / pixels:.2f} %" if pixels else "-"
            row += [str(split.images_per_class[index - 1]) if index else "-", share]
        rows.append(row)
    table("classes", ["class", "colour", *(f"{s}: {w}" for s in report.splits for w in ("images", "pixels"))], rows)
    for name, split in report.splits.items():
        for item in split.put_aside[:NAMED]:
            print(f"{name}: put aside {item.id}: {item.reason}")
        labels = sum(bool(item.only_in_labels) for item in split.disagreements)
        masks = sum(bool(item.only_in_mask) for item in split.disagreements)
        if split.disagreements:
            print(f"{name}: labels name a class that the mask lacks in {labels} images, the other way round in {masks}")
        for difference in split.disagreements[:NAMED]:
            only = [f"only in labels: {', '.join(difference.only_in_labels)}"] if difference.only_in_labels else []
            only += [f"only in mask: {', '.join(difference.only_in_mask)}"] if difference.only_in_mask else []
            print(f"  {difference.id}: {'; '.join(only)}")
        if len(split.disagreements) > NAMED:
            print(f"  ... {len(split.disagreements) - NAMED} more, see --json")
    for damage in report.damage:
        print(f"DAMAGED: {damage}")
    if report.ok:
        lists = f" and {len(report.subsets)} lists of subsets" if report.subsets else ""
        print(f"all {report.shards} shards{lists} have the checksums of the card")


@app.command()
def show(
    dataset: Dataset,
    out: Annotated[str, typer.Argument(metavar="OUT.png", help="Picture to write.")],
    split: Annotated[str, typer.Option(help="Split or subset to show.")] = "train",
    images: Annotated[int, typer.Option(min=1, help="Images to show.")] = 8,
    config: Annotated[str | None, typer.Option(help="Experiment whose views are shown, by name or path.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the draw \\[default: the experiment's, else 0].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a contact sheet: images, masks, labels, and the weak and strong views as training sees them."""
    from cosa_ray.config.load import load_config
    from cosa_ray.config.schema import Config
    from cosa_ray.data.dataset import open_dataset
    from cosa_ray.data.show import contact_sheet

    with json_only(as_json) as emit:
        settings = Config() if config is None else load_config(config, [])
        drawn = settings.seed if seed is None else seed
        opened, batch = open_dataset(dataset), settings.training.batch_size
        sheet = contact_sheet(
            opened,
            split,
            views=settings.views,
            seed=drawn,
            images=images,
            batch_size=batch,
            sampling=settings.data.sampling,
        )
        try:
            sheet.save(out, "PNG")
        except OSError as error:
            raise UserError(f"cannot write {out} ({error.strerror}): choose another file") from None
        say(f"wrote {out}")
        emit({"picture": out, "width": sheet.width, "height": sheet.height})


@contextlib.contextmanager
def import_progress(kind: str) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows how far an import is."""
    with count_bar(f"import {kind}") as show:
        yield lambda at: show(at.done, at.total, at.put_aside)

"""A folder of one's own, as people really have it: names, label files, classes and colours that do not quite fit."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image
from tiny_sets import index_png, photo, regions

from cosa_ray.data.dataset import open_dataset
from cosa_ray.data.folder import folder_source
from cosa_ray.data.importing import import_dataset, write_dataset
from cosa_ray.data.pictures import voc_palette
from cosa_ray.errors import UserError


@pytest.fixture
def own(tmp_path):
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "images/a.jpg").write_bytes(photo(seed=1))
    (root / "images/b.jpg").write_bytes(photo(seed=2))
    (root / "labels.csv").write_text("image,labels\na.jpg,cat\nb.jpg,dog\n")
    return root


def imported(source, out, **options):
    import_dataset("folder", str(source), str(out), local=True, **options)
    return open_dataset(str(out))


def test_two_images_of_one_stem_are_told_apart_by_their_full_names(own, tmp_path):
    png = photo(seed=3, kind="PNG")
    (own / "images/a.png").write_bytes(png)
    (own / "labels.csv").write_text("image,labels\na.jpg,cat\na.png,dog\nimages/b.jpg,dog\n")
    (own / "masks/a.jpg.png").write_bytes(index_png(regions(0, 1)))
    (own / "masks/a.png.png").write_bytes(index_png(regions(2)))
    train = imported(own, tmp_path / "out").split("train")
    assert train.ids() == ["a.jpg", "a.png", "b"]
    assert [train[0].image, train[1].image] == [photo(seed=1), png]
    assert np.array_equal(train[0].decode_mask(), regions(0, 1))
    assert np.array_equal(train[1].decode_mask(), regions(2))
    # Only one of the two is listed: it is that one, whichever comes first in the folder.
    (own / "labels.csv").write_text("image,labels\na.png,dog\nb,cat\n")
    assert imported(own, tmp_path / "one").split("train")[0].image == png
    (own / "labels.csv").write_text("image,labels\na,dog\n")
    with pytest.raises(UserError, match=r"names a, and there are a.jpg and a.png: write the full name"):
        folder_source(str(own))


def test_a_mask_that_may_belong_to_two_images_is_refused(own):
    (own / "images/a.png").write_bytes(photo(kind="PNG"))
    (own / "masks/a.png").write_bytes(index_png(regions(0, 1)))
    (own / "labels.csv").write_text("image,labels\na.jpg,cat\na.png,dog\n")
    with pytest.raises(
        UserError, match=r"the mask a.png may belong to a.jpg or to a.png: name the masks a.jpg.png and"
    ):
        folder_source(str(own))


def test_hidden_files_are_no_images_and_no_masks(own, tmp_path):
    (own / "images/._b.jpg").write_bytes(b"of a Mac")
    (own / "masks/.b.png").write_bytes(b"of a Mac")
    dataset = imported(own, tmp_path / "out")
    assert len(dataset.split("train")) == 2
    assert dataset.card.masks_from == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,labels\na.jpg,cat,dog\n", r"line 2 has more cells .*'dog' is one too many"),
        ("image,cat,dog\nb.jpg,0,1\na.jpg,1,0,1\n", r"line 3 has more cells"),
        ("image,cat,,dog\na.jpg,1,0,1\n", "column 3 has no name"),
        ("image,cat,cat\na.jpg,1,0\n", "names the column 'cat' twice"),
        ("image,labels,split\na.jpg,cat,träin\n", "names the split 'träin'"),
        ("image,labels\na.jpg,Background\n", "has a class 'Background': leave it out"),
        ("image," + ",".join(f"c{i}" for i in range(255)) + "\na.jpg,1\n", "has 255 classes, .* room for 254"),
    ],
)
def test_label_files_that_would_lose_something_are_refused(own, tmp_path, content, message):
    (own / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        imported(own, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_empty_cells_at_the_end_of_a_spreadsheets_lines_are_nothing(own, tmp_path):
    (own / "labels.csv").write_text("image,labels,,\na.jpg,cat;,,\nb.jpg,dog,,\n")
    assert imported(own, tmp_path / "out").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.jpg": ["cat", " "]}', "a label of a.jpg is empty"),
        ('{"a.jpg": ["cat"], "a.jpg": ["dog"]}', "names a.jpg twice"),
        ('{"train": {}}', "it names no image"),
    ],
)
def test_json_label_files_that_would_lose_something_are_refused(own, content, message):
    (own / "labels.csv").unlink()
    (own / "labels.json").write_text(content)
    with pytest.raises(UserError, match=message):
        folder_source(str(own))


def test_json_labels_are_stripped_as_those_of_csv_are(own):
    (own / "labels.csv").unlink()
    (own / "labels.json").write_text(json.dumps({"a.jpg": [" cat"], "b.jpg": ["cat"]}))
    assert folder_source(str(own)).classes == ("cat",)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ("Background\ncat\ndog\n", ("cat", "dog")),
        ("1 cat\n2 dog\n", ("cat", "dog")),
        ("0 BACKGROUND 0 0 0\n1 cat 9 9 9\n2 dog\n", ("cat", "dog")),
        ("\ufeffcat\ndog\n", ("cat", "dog")),
        ("1 cat\n3 dog\n", ("1 cat", "3 dog")),  # no numbering: names that begin with numbers
    ],
)
def test_classes_files_of_many_kinds(own, classes, names):
    (own / "classes.txt").write_text(classes, encoding="utf-8")
    assert folder_source(str(own)).classes == names


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (b"cat\ndog\ncat\n", "classes.txt names the class 'cat' twice"),
        (b"cat\nbackground\n", "has a class 'background'"),
        (b"background\n", "names no class"),
        (b"\n".join(b"c%d" % i for i in range(255)), "has 255 classes"),
        ("café\n".encode("latin-1"), "classes.txt is not UTF-8 text: save it as UTF-8"),
        (b"cat 1 2 3\ndog 1 2 3\n", "gives cat and dog the colour 1 2 3: give each its own"),
        (b"background 1 2 3\ndog 1 2 3\n", "gives background and dog the colour 1 2 3"),
    ],
)
def test_classes_files_that_cannot_be_used(own, classes, message):
    (own / "classes.txt").write_bytes(classes)
    with pytest.raises(UserError, match=message):
        folder_source(str(own))


def test_default_colours_are_those_of_voc_that_no_class_was_given(own):
    voc = voc_palette(255)
    (own / "classes.txt").write_text("cat 0 128 0\ndog\ncow 0 0 0\nfox\n")  # dog's and the background's own are taken
    palette = folder_source(str(own)).palette
    assert (palette[1], palette[3], palette[4]) == ((0, 128, 0), (0, 0, 0), voc[4])
    assert len(set(palette)) == 5
    assert set(palette) <= set(voc)
    full = "\n".join(f"c{i} {r} {g} {b}" for i, (r, g, b) in enumerate(reversed(voc[2:130])))
    (own / "classes.txt").write_text(full + "\n" + "\n".join(f"d{i}" for i in range(126)))
    assert len(set(folder_source(str(own)).palette)) == 255


def test_a_palette_mask_is_read_by_the_colours_of_the_classes_file(own, tmp_path):
    (own / "classes.txt").write_text("cat 200 0 0\ndog 0 200 0\n")
    image = Image.fromarray(regions(0, 1, 2))
    image.putpalette([0, 200, 0, 0, 0, 0, 200, 0, 0])  # dog, background, cat
    image.save(own / "masks/a.png")
    mask = imported(own, tmp_path / "out").split("train")[0].decode_mask()
    assert np.array_equal(mask, np.array([2, 0, 1])[regions(0, 1, 2)])


def test_what_cannot_be_read_is_a_sentence(own, tmp_path):
    with pytest.raises(UserError, match=r"own/images is a folder: give the label file"):
        folder_source(str(own), labels="images")
    (own / "labels.csv").write_bytes("image,labels\na.jpg,cat\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"labels.csv is not UTF-8 text"):
        folder_source(str(own))
    (own / "labels.csv").write_bytes("image,labels\na.jpg,cat\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"labels.csv is not UTF-8 text"):
        folder_source(str(own))
    (own / "labels.csv").write_text("image,labels\na.jpg,cat\n")
    with open(os.fsencode(own / "images") + b"/caf\xe9.jpg", "wb"):
        pass
    with pytest.raises(UserError, match=r"images holds a name that is not UTF-8 \(caf\\xe9.jpg\): rename"):
        folder_source(str(own))


def test_an_unreadable_file_is_put_aside_and_a_failing_disk_ends_the_import(own, tmp_path, monkeypatch):
    from cosa_ray.data import remote
    from cosa_ray.errors import RunFailed

    real = remote.Place.read

    def refuse(number):
        def read(self):
            if self.path.endswith("a.jpg"):
                raise OSError(number, os.strerror(number))
            return real(self)

        return read

    source = folder_source(str(own))
    monkeypatch.setattr(remote.Place, "read", refuse(13))
    card = write_dataset(source, str(tmp_path / "out"), local=True)
    assert [(item.id, item.reason) for item in card.splits["train"].put_aside] == [
        ("a", "the image a.jpg cannot be read (Permission denied)")
    ]
    monkeypatch.setattr(remote.Place, "read", refuse(12))
    with pytest.raises(RunFailed, match="Cannot allocate memory"):
        write_dataset(source, str(tmp_path / "other"), local=True)

"""Objects from COCO JSON, Pascal VOC XML and tables: what is read, what is dropped, and what is refused by name."""

from __future__ import annotations

import copy
import json
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pycocotools.mask
import pytest
from faster_coco_eval.core import mask as rle
from PIL import Image
from rich.console import Console

from e3va_peft.data.examples import Split
from e3va_peft.data.formats import load_splits
from e3va_peft.data.objects import decode_mask
from e3va_peft.data.verify import verify_split
from e3va_peft.errors import UserError
from e3va_peft.training.config import parse_config
from e3va_peft.training.run import verify

WIDTH, HEIGHT = 20, 10
POLYGON = [2.0, 1.0, 12.0, 1.0, 12.0, 7.0, 2.0, 7.0]
COCO: dict[str, Any] = {
    "images": [
        {"id": 5, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 90, "bbox": [2, 1, 10, 6], "area": 55, "segmentation": [POLYGON]},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(path: Path, width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path, **options)
    return path


def load(kind: str, **data: Any) -> tuple[Split, Split | None]:
    task = "object-detection" if kind == "boxes" else "instance-segmentation"
    config = parse_config({"task": task, "model": "m", "output": "o", "data": data})
    return load_splits(config.data, kind)


def coco(folder: Path, kind: str = "boxes", content: Any = COCO, **data: Any) -> tuple[Split, Split | None]:
    for name in ("a.png", "b.png"):
        if not (folder / "images" / name).exists():
            picture(folder / "images" / name)
    file = folder / "objects.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load(kind, images=str(folder / "images"), annotations=str(file), **data)


def changed(part: str, index: int = 0, **values: Any) -> dict[str, Any]:
    """COCO's file with some fields of one entry changed; a field that is None is taken out."""
    content = copy.deepcopy(COCO)
    entry = content[part][index]
    entry.update(values)
    content[part][index] = {key: value for key, value in entry.items() if value is not None}
    return content


def notes(split: Split) -> list[str]:
    found: list[str] = []
    verify_split(split, note=found.append)
    return found


# --- COCO ------------------------------------------------------------------------------------------------------------


def test_coco_numbers_classes_by_their_ids_whatever_the_gaps(tmp_path):
    split, none = coco(tmp_path)
    assert none is None and split.labels == ("cat", "dog") and len(split) == 2
    image, objects = split[0]
    assert image.size == (WIDTH, HEIGHT) and objects.size == (HEIGHT, WIDTH) and objects.image_id == 5
    assert objects.boxes.tolist() == [[2, 1, 12, 7]] and objects.labels.tolist() == [1]
    assert objects.areas.tolist() == [55] and objects.masks is None and not objects.crowd.any()


def test_an_image_without_objects_stays(tmp_path):
    for kind in ("boxes", "instances"):
        split, _ = coco(tmp_path, kind)
        objects = split[1][1]
        assert len(objects) == 0 and objects.boxes.shape == (0, 4) and objects.image_id == 9
        assert objects.masks == (() if kind == "instances" else None)
    assert verify_split(split).tolist() == [0, 1]


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path):
    compressed = rle.merge(rle.frPyObjects([POLYGON], HEIGHT, WIDTH))
    mask = rle.decode(compressed).astype(bool)
    runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 0])).tolist()
    counts = np.diff([0, *runs, mask.size]).tolist()
    forms = [[POLYGON], {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
             {"size": [HEIGHT, WIDTH], "counts": counts}]  # fmt: skip
    for form in forms:
        split, _ = coco(tmp_path, "instances", changed("annotations", segmentation=form))
        (found,) = split[0][1].masks
        np.testing.assert_array_equal(decode_mask(found), mask)


def test_several_polygons_are_one_mask_as_pycocotools_draws_it(tmp_path):
    random = np.random.default_rng(0)
    for _ in range(10):
        polygons = [(random.random((6, 2)) * [WIDTH, HEIGHT]).round(2).ravel().tolist() for _ in range(3)]
        (found,) = coco(tmp_path, "instances", changed("annotations", segmentation=polygons))[0][0][1].masks
        reference = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, HEIGHT, WIDTH))
        np.testing.assert_array_equal(decode_mask(found), decode_mask(reference))


def test_crowds_are_marked_and_boxes_and_areas_come_from_masks_where_there_are_none(tmp_path):
    content = changed("annotations", iscrowd=1, bbox=None, area=None)
    objects = coco(tmp_path, "boxes", content)[0][0][1]
    assert objects.crowd.tolist() == [True] and objects.boxes.tolist() == [[2, 1, 12, 7]]
    assert objects.areas.tolist() == [60]


@pytest.mark.parametrize(("flag", "crowd"), [(0, False), ("0", False), ("False", False), (1.0, True), ("true", True)])
def test_flags_may_be_text(flag, crowd, tmp_path):
    split, _ = coco(tmp_path, content=changed("annotations", iscrowd=flag))
    assert split[0][1].crowd.tolist() == [crowd]
    assert verify_split(split).tolist() == [0, int(not crowd)], "crowds are not trained on"


def test_the_splits_of_a_pattern_are_those_that_have_a_file(tmp_path):
    for split in ("train", "val"):
        for name in ("a.png", "b.png"):
            picture(tmp_path / f"{split}2017" / name)
        (tmp_path / f"instances_{split}2017.json").write_text(json.dumps(COCO))
    train, evaluation = load(
        "boxes", images=str(tmp_path / "{split}2017"), annotations=str(tmp_path / "instances_{split}2017.json")
    )
    assert evaluation is not None and "val" in evaluation.name and len(train) == len(evaluation) == 2


def test_a_share_of_one_file_can_be_set_aside(tmp_path):
    train, evaluation = coco(tmp_path, eval_fraction=0.5)
    assert evaluation is not None and (len(train), len(evaluation)) == (1, 1)


@pytest.mark.parametrize(
    ("box", "clipped"), [([-5, 1, 10, 6], [0, 1, 5, 7]), ([15, 5, 50, 50], [15, 5, 20, 10])], ids=str
)
def test_a_box_that_leaves_its_image_is_clipped_and_counted(box, clipped, tmp_path):
    split, _ = coco(tmp_path, content=changed("annotations", bbox=box))
    assert split[0][1].boxes.tolist() == [clipped]
    assert any("1 of the 1 boxes" in note and "annotation 1" in note for note in notes(split))


@pytest.mark.parametrize("box", [[30, 1, 5, 5], [2, 1, 0, 6], [2, 1, 5, 0], [-9, 0, 4, 4]], ids=str)
def test_a_box_without_area_in_its_image_is_dropped_and_counted(box, tmp_path):
    split, _ = coco(tmp_path, content=changed("annotations", bbox=box))
    assert len(split[0][1]) == 0
    assert any("1 objects" in note and "annotation 1" in note for note in notes(split))


@pytest.mark.parametrize(
    "empty",
    [{"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, [[1, 2, 3, 4]], [[], [1, 2], [1, 2, 3, 4]]],
    ids=["RLE", "line", "nothing, point and line"],
)
def test_an_empty_mask_is_dropped_and_counted(empty, tmp_path):
    split, _ = coco(tmp_path, "instances", changed("annotations", segmentation=empty))
    assert len(split[0][1]) == 0 and any("annotation 1" in note for note in notes(split))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (changed("annotations", bbox=[9, 1, -4, 6]), ["annotation 1", "negative width"]),
        (changed("annotations", bbox=[9, 1, 4]), ["annotation 1", "four numbers"]),
        (changed("annotations", bbox=[9, 1, 4, float("nan")]), ["annotation 1", "four numbers"]),
        (changed("annotations", bbox=[9, 1, float("inf"), 6]), ["annotation 1", "four numbers"]),
        (changed("annotations", bbox=[-float("inf"), 1, 4, 6]), ["annotation 1", "four numbers"]),
        (changed("annotations", bbox=[9, 1, 4, 10**400]), ["annotation 1", "four numbers"]),
        (changed("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ["annotation 1", "polygon of 7"]),
        (changed("annotations", segmentation=None), ["annotation 1", "no segmentation"]),
        (
            changed("annotations", segmentation={"size": [20, 20], "counts": [400]}),
            ["annotation 1", "[20, 20]", "[10, 20]"],
        ),
        (
            changed("annotations", segmentation={"size": [HEIGHT, WIDTH], "counts": [7]}),
            ["annotation 1", "broken RLE"],
        ),
        (
            changed("annotations", segmentation={"size": [HEIGHT, WIDTH], "counts": "zzz"}),
            ["annotation 1", "broken RLE"],
        ),
        (changed("annotations", segmentation=[[1e9, 2, 3, 4, 5, 6]]), ["annotation 1", "far away"]),
        (changed("annotations", segmentation=7), ["annotation 1", "polygons nor an RLE"]),
        (changed("annotations", area=-3), ["annotation 1", "area"]),
        (changed("annotations", iscrowd="maybe"), ["annotation 1", "'maybe' for crowd"]),
        (changed("images", width=21), ["a.png", "21 x 10", "20 x 10"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_malformed_entry_is_named_when_the_data_is_checked(content, parts, tmp_path):
    split, _ = coco(tmp_path, "instances", content)
    with pytest.raises(UserError) as error:
        verify_split(split)
    assert all(part in str(error.value) for part in [*parts, "1 of 2 examples"]), error.value


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["not valid JSON"]),
        ([], ["is a list", "images, annotations and categories"]),
        ({"images": [], "annotations": []}, ["has no categories"]),
        ({**COCO, "categories": [*COCO["categories"], {"id": 3, "name": "x"}]}, ["'x', id 3, twice"]),
        ({**COCO, "images": [COCO["images"][0]] * 2}, ["'a.png'", "id 5"]),
        ({**COCO, "annotations": COCO["annotations"] * 2}, ["annotation 1", "there before"]),
        ({**COCO, "annotations": [{"segments_info": [], "image_id": 5}]}, ["panoptic"]),
        (changed("annotations", category_id=4), ["annotation 1", "category_id 4", "[3, 90]"]),
        (changed("annotations", image_id=4), ["annotation 1", "image 4", "not in images"]),
        (changed("annotations", category_id="dog"), ["annotation 1", "'dog'", "whole number"]),
        (changed("categories", name=None), ["categories[0]", "name None"]),
        (changed("images", file_name=None), ["images[0]", "file_name None"]),
        (changed("images", height="10"), ["'a.png'", "height '10'"]),
        ({**COCO, "annotations": [7]}, ["annotations[0] is 7"]),
        ({**COCO, "annotations": []}, ["2 images and no annotation"]),
        (changed("annotations", image_id=True), ["annotation 1", "image_id True"]),
        (changed("categories", name=" "), ["categories[0]", "name ' '"]),
        (changed("images", file_name="a" * 5000), ["1 of its 2 images", "aaa", "data.images"]),
        (changed("images", file_name="../outside.png"), ["1 of its 2 images", "../outside.png", "data.images"]),
        (changed("images", file_name="b.png"), ["b.png", "more than one id"]),
        (changed("images", file_name="c.png"), ["1 of its 2 images", "c.png", "data.images"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_a_file_that_is_no_coco_detection_file_is_refused(content, parts, tmp_path):
    with pytest.raises(UserError) as error:
        coco(tmp_path, content=content)
    message = str(error.value)
    assert all(part in message for part in [*parts, "objects.json"]), message


def test_an_image_outside_of_the_folder_is_read_by_no_name(tmp_path):
    outside = picture(tmp_path / "outside.png")
    climbing = f"{tmp_path.absolute()}/images/../outside.png"
    for name in ("../outside.png", str(outside), "..\\outside.png", climbing):
        with pytest.raises(UserError, match=r"1 of its 2 images"):
            coco(tmp_path, content=changed("images", file_name=name))
    inside = picture(tmp_path / "images" / "deep" / "c.png")
    for name in ("deep/c.png", str(inside)):
        coco(tmp_path, content=changed("images", file_name=name))
    (tmp_path / "images" / "link.png").symlink_to(outside)  # the user's own
    coco(tmp_path, content=changed("images", file_name="link.png"))


def test_images_that_are_trained_on_are_not_evaluated_on(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    for split, images in (("train", COCO["images"]), ("val", COCO["images"][:1])):
        (tmp_path / f"{split}.json").write_text(json.dumps({**COCO, "images": images}))
    with pytest.raises(UserError, match=r"data.eval_split='val': 1 of its 1 images are trained on"):
        load("boxes", images=str(tmp_path / "images"), annotations=str(tmp_path / "{split}.json"))


def test_other_categories_in_the_evaluation_file_are_refused(tmp_path):
    for split in ("train", "val"):
        for name in ("a.png", "b.png"):
            picture(tmp_path / split / name)
        categories = COCO["categories"] if split == "train" else [{"id": 90, "name": "wolf"}, {"id": 3, "name": "cat"}]
        (tmp_path / f"{split}.json").write_text(json.dumps({**COCO, "categories": categories}))
    with pytest.raises(UserError, match=r"val\.json.*dog.*wolf"):
        load("boxes", images=str(tmp_path / "{split}"), annotations=str(tmp_path / "{split}.json"))


def test_annotations_may_have_no_ids_and_are_then_named_by_their_place(tmp_path):
    split, _ = coco(tmp_path, content=changed("annotations", id=None, bbox=[30, 1, 5, 5]))
    assert any("annotations[0]" in note for note in notes(split))


def test_names_of_the_config_replace_those_of_the_file_in_the_order_of_its_ids(tmp_path):
    split, _ = coco(tmp_path, labels=["Katze", "Hund"])
    assert split.labels == ("Katze", "Hund") and split[0][1].labels.tolist() == [1]
    with pytest.raises(UserError, match=r"data\.labels: .*3.*2"):
        coco(tmp_path, labels=["a", "b", "c"])
    for labels, said in (
        (["dog", "cat"], "0 'dog'.* 1"),
        (["dog", "wolf"], "0 'dog'.* 1"),
        (["bird", "cat"], "1 'cat'.* 0"),
    ):
        with pytest.raises(UserError, match=rf"data\.labels: calls class {said}"):
            coco(tmp_path, labels=labels)


def test_categories_of_the_evaluation_file_are_matched_by_name_not_by_id(tmp_path):
    for split in ("train", "val"):
        for name in ("a.png", "b.png"):
            picture(tmp_path / split / name)
    swapped = [{"id": 3, "name": "dog"}, {"id": 90, "name": "cat"}]
    (tmp_path / "train.json").write_text(json.dumps(COCO))
    (tmp_path / "val.json").write_text(json.dumps({**COCO, "categories": swapped}))
    train, evaluation = load("boxes", images=str(tmp_path / "{split}"), annotations=str(tmp_path / "{split}.json"))
    assert train[0][1].labels.tolist() == [1] and evaluation[0][1].labels.tolist() == [0]


def many(boxes: list[list[float]], **fields: Any) -> dict[str, Any]:
    objects = [{**COCO["annotations"][0], **fields, "id": i, "bbox": box} for i, box in enumerate(boxes)]
    return {**COCO, "annotations": objects}


@pytest.mark.parametrize("wrong", [[15, 5, 19, 9], [50, 5, 9, 9]], ids=["clipped", "dropped"])
def test_a_split_most_of_whose_boxes_leave_their_images_is_refused(wrong, tmp_path):
    split, _ = coco(tmp_path / "half", content=many([wrong] * 5 + [[1, 1, 5, 5]] * 5))
    assert any("annotation 0" in note for note in notes(split))
    split, _ = coco(tmp_path / "most", content=many([wrong] * 6 + [[1, 1, 5, 5]] * 4))
    with pytest.raises(UserError, match=r"6 of the 10 .*annotation 0.*box_format"):
        notes(split)


def test_boxes_between_0_and_1_are_refused_as_pixels(tmp_path):
    split, _ = coco(tmp_path, content=many([[0.5, 0.5, 0.2, 0.2]] * 10))
    with pytest.raises(UserError, match=r"10 .*data\.box_format: cxcywh"):
        notes(split)


def test_empty_masks_do_not_speak_against_their_boxes(tmp_path):
    split, _ = coco(tmp_path, "instances", many([[1, 1, 5, 5]] * 10, segmentation=[[1, 2, 3, 4]]))
    assert any("10 objects" in note for note in notes(split))


def test_a_line_beside_a_polygon_adds_nothing(tmp_path):
    polygon = [2, 1, 6, 1, 6, 7, 2, 7]
    masks = [
        coco(tmp_path / name, "instances", changed("annotations", segmentation=polygons))[0][0][1].masks[0]
        for name, polygons in {"alone": [polygon], "beside": [[1, 2, 3, 4], polygon]}.items()
    ]
    assert masks[0] == masks[1]


def test_dropped_objects_are_warned_of_once_for_a_split(tmp_path):
    objects = [{**COCO["annotations"][0], "id": i, "bbox": [30, 1, 5, 5]} for i in range(3)]
    said = StringIO()
    verify(coco(tmp_path, content={**COCO, "annotations": objects}), Console(file=said, width=999))
    assert said.getvalue().count("are left out") == 1 and "3 objects" in said.getvalue()
    assert "annotation 0, ..." in said.getvalue()


def test_a_folder_of_images_or_a_pattern_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"\['train'"):
        load("boxes", images=str(tmp_path), annotations=str(tmp_path / "{split}.json"))
    (tmp_path / "objects.json").write_text(json.dumps(COCO))
    with pytest.raises(UserError, match=r"data\.images=.*nowhere"):
        load("boxes", images=str(tmp_path / "nowhere"), annotations=str(tmp_path / "objects.json"))


def test_annotations_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.annotations=.*none\.json"):
        load("boxes", images=str(tmp_path), annotations=str(tmp_path / "none.json"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_any_mode_become_rgb(mode, tmp_path):
    file = "a.tif" if mode in ("CMYK", "I;16") else "a.png"
    picture(tmp_path / "images" / file, mode=mode)
    split, _ = coco(tmp_path, content=changed("images", file_name=file))
    assert split[0][0].mode == "RGB"


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_an_image_that_exif_turns_without_changing_its_size_is_refused(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "images" / "a.jpg", exif=exif)
    split, _ = coco(tmp_path, content=changed("images", file_name="a.jpg"))
    with pytest.raises(UserError, match=r"(?s)image 'a\.jpg'.*a\.jpg.*EXIF"):
        split[0]


def test_an_image_that_exif_rotates_away_from_its_boxes_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when it is shown
    picture(tmp_path / "images" / "a.jpg", exif=exif)
    split, _ = coco(tmp_path, content=changed("images", file_name="a.jpg"))
    with pytest.raises(UserError, match=r"(?s)a\.jpg.*EXIF"):
        split[0]
    upright = changed("images", file_name="a.jpg", width=HEIGHT, height=WIDTH)  # boxes of what is seen
    assert coco(tmp_path, content=upright)[0][0][0].size == (HEIGHT, WIDTH)


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def voc(folder: Path, name: str = "a", objects: str = "", size: str | None = None) -> Path:
    picture(folder / "JPEGImages" / f"{name}.jpg")
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>" if size is None else size
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return folder


def thing(name: str = "dog", box: tuple[Any, ...] = (3, 2, 12, 7), more: str = "") -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


@pytest.mark.parametrize(
    ("head", "part"),
    [
        ('<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]>', "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname">', "DOCTYPE"),
        ('<?xml version="1.0" encoding="nope"?>', "nope"),
    ],
)
def test_xml_with_a_document_type_or_an_unknown_encoding_is_refused_by_its_file(head, part, tmp_path):
    file = voc(tmp_path, "a", thing()) / "Annotations" / "a.xml"
    file.write_text(head + file.read_text())
    with pytest.raises(UserError, match=rf"a\.xml: cannot be read as XML \(.*{part}"):
        load("boxes", source=str(lists(tmp_path, train="a")))


def lists(folder: Path, **names: str) -> Path:
    for split, text in names.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
    return folder


def test_voc_names_that_end_like_marks_of_one_class_are_names(tmp_path):
    for name in ("frame 0", "frame 1"):
        voc(tmp_path, name, thing())
    assert len(load("boxes", source=str(lists(tmp_path, train="frame 0\nframe 1\n")))[0]) == 2


def test_voc_boxes_are_pixels_counted_from_one_and_difficult_ones_are_marked(tmp_path):
    voc(tmp_path, "a", thing(more="<difficult>1</difficult>") + thing("cat", (1, 1, WIDTH, HEIGHT)))
    voc(tmp_path, "b")
    train, evaluation = load("boxes", source=str(lists(tmp_path, train="a\n", val="b\n", dog_train="a  1\n")))
    objects = train[0][1]
    assert objects.boxes.tolist() == [[2, 1, 12, 7], [0, 0, WIDTH, HEIGHT]]
    assert objects.difficult.tolist() == [True, False] and objects.areas.tolist() == [60, 200]
    assert train.labels[objects.labels[0]] == "dog" and len(train.labels) == 20, "VOC's own classes"
    assert evaluation is not None and len(evaluation[0][1]) == 0


@pytest.mark.parametrize(("flag", "difficult"), [("0", False), ("", False), (" 1 ", True), ("True", True)])
def test_difficult_may_be_a_word(flag, difficult, tmp_path):
    voc(tmp_path, "a", thing(more=f"<difficult>{flag}</difficult>"))
    split, _ = load("boxes", source=str(lists(tmp_path, train="a")))
    assert split[0][1].difficult.tolist() == [difficult]


def test_a_devkit_joins_its_years(tmp_path):
    for year, name in (("VOC2007", "a"), ("VOC2012", "b")):
        lists(voc(tmp_path / year, name, thing("x")), trainval=name, test="")
    voc(tmp_path / "VOC2007", "t", thing("y"))
    lists(tmp_path / "VOC2007", test="t")
    train, evaluation = load(
        "boxes",
        source=str(tmp_path),
        train_split="VOC2007/trainval+VOC2012/trainval",
        eval_split="VOC2007/test",
        labels=["x", "y"],
    )
    assert len(train) == 2 and evaluation is not None and evaluation[0][1].labels.tolist() == [1]


@pytest.mark.parametrize(
    ("objects", "parts"),
    [
        ("<object>", ["a.xml", "XML"]),
        ("<object><name>dog</name></object>", ["a.xml", "object 1 of 1", "bndbox/xmin"]),
        (thing(box=("x", 1, 2, 3)), ["object 1 of 1", "xmin 'x'"]),
        (thing(box=(1, 1, "inf", 3)), ["object 1 of 1", "xmax 'inf'"]),
        (thing(box=(9, 2, 3, 7)), ["object 1 of 1", "negative width"]),
        (thing(name=""), ["object 1 of 1", "no name"]),
        (thing(more="<difficult>hard</difficult>"), ["object 1 of 1", "'hard' for difficult"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_malformed_xml_is_named(objects, parts, tmp_path):
    with pytest.raises(UserError) as error:
        verify_split(load("boxes", source=str(lists(voc(tmp_path, "a", objects), train="a")))[0])
    assert all(part in str(error.value) for part in parts), error.value


def test_voc_that_does_not_match_its_folder_is_refused(tmp_path):
    lists(voc(tmp_path, "a", thing()), train="a\nb")
    with pytest.raises(UserError, match=r"1 of 2 .*b\.xml"):
        load("boxes", source=str(tmp_path))
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation></annotation>")
    with pytest.raises(UserError, match=r"1 of 2 .*JPEGImages.b"):
        load("boxes", source=str(tmp_path))
    for name in ("a" * 5000, "../a"):
        lists(tmp_path, train=f"a\n{name}")
        with pytest.raises(UserError, match=rf"split 'train': 1 of 2 images .*{name[-4:]}.*ImageSets/Main"):
            load("boxes", source=str(tmp_path))


def test_voc_of_another_size_than_its_image_is_refused(tmp_path):
    voc(tmp_path, "a", thing(), "<size><width>21</width><height>10</height></size>")
    with pytest.raises(UserError, match=r"a\.xml.*21 x 10"):
        verify_split(load("boxes", source=str(lists(tmp_path, train="a")))[0])


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_voc_may_leave_its_size_open(size, tmp_path):
    voc(tmp_path, "a", thing(), size)
    assert verify_split(load("boxes", source=str(lists(tmp_path, train="a")))[0]).sum() == 1


def test_voc_has_no_masks_and_says_so(tmp_path):
    with pytest.raises(UserError, match=r"masks.*object-detection"):
        load("instances", source=str(lists(voc(tmp_path, "a", thing()), train="a")))


def test_voc_without_lists_of_images_says_what_to_write(tmp_path):
    with pytest.raises(UserError, match=r"ImageSets/Main/\*\.txt.*train\.txt"):
        load("boxes", source=str(voc(tmp_path, "a", thing())))
    lists(tmp_path, dog_train="a  1\n", cat_train="a -1\n")
    with pytest.raises(UserError, match=r"ImageSets/Main"):
        load("boxes", source=str(tmp_path))


def test_voc_names_its_own_classes_and_refuses_others_than_those_trained_on(tmp_path):
    voc(tmp_path, "a", thing("wbc") + thing("rbc"))
    voc(tmp_path, "b", thing("platelet"))
    assert load("boxes", source=str(lists(tmp_path, train="a")))[0].labels == ("rbc", "wbc")
    with pytest.raises(UserError, match=r"b\.xml, object 1 of 1: .*'platelet'.*data\.labels"):
        load("boxes", source=str(lists(tmp_path, val="b")))


def test_of_two_images_of_one_name_none_is_guessed_and_other_files_do_not_matter(tmp_path):
    lists(voc(tmp_path, "a", thing()), train="a")
    (tmp_path / "JPEGImages" / "a.txt").write_text("0 0.5 0.5 1 1")
    assert len(load("boxes", source=str(tmp_path))[0]) == 1
    picture(tmp_path / "JPEGImages" / "a.png")
    with pytest.raises(UserError, match=r"a\.png: .*a\.jpg"):
        load("boxes", source=str(tmp_path))


def test_training_images_are_not_scored_on(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_split='val': 1 of its 1"):
        load("boxes", source=str(lists(voc(tmp_path, "a", thing()), trainval="a", val="a")), train_split="trainval")


# --- tables ----------------------------------------------------------------------------------------------------------


def parquet(folder: Path, objects: list[Any], **columns: list[Any]) -> str:
    images = [str(picture(folder / f"{i}.png")) for i in range(len(objects))]
    rows = datasets.Dataset.from_dict({"image": images, "objects": objects, **columns})
    rows.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


@pytest.mark.parametrize(
    "objects",
    [
        [{"bbox": [[2.0, 1.0, 10.0, 6.0]], "category": ["dog"]}],
        [[{"bbox": [2.0, 1.0, 10.0, 6.0], "label": "dog"}]],
    ],
    ids=["lists", "mappings"],
)
def test_both_common_schemas_of_the_hub_are_read(objects, tmp_path):
    split, _ = load("boxes", source=parquet(tmp_path, objects))
    assert split.labels == ("dog",) and split[0][1].boxes.tolist() == [[2, 1, 12, 7]]


@pytest.mark.parametrize(
    ("form", "box"), [("xywh", [2, 1, 10, 6]), ("xyxy", [2, 1, 12, 7]), ("cxcywh", [0.35, 0.4, 0.5, 0.6])]
)
def test_boxes_of_every_format_are_the_same(form, box, tmp_path):
    source = parquet(tmp_path, [{"bbox": [[float(v) for v in box]], "category": ["dog"]}])
    split, _ = load("boxes", source=source, box_format=form)
    np.testing.assert_allclose(split[0][1].boxes, [[2, 1, 12, 7]])


def test_boxes_of_another_format_are_refused(tmp_path):
    source = parquet(tmp_path, [{"bbox": [[2.0, 1.0, 10.0, 6.0]], "category": ["dog"]}])
    split, _ = load("boxes", source=source, box_format="cxcywh")
    with pytest.raises(UserError, match=r"row 0, object 1 of 1.*data\.box_format"):
        verify_split(split)


def test_an_image_folder_with_a_metadata_file_is_read(tmp_path):
    lines = []
    for i, name in enumerate(("a.png", "b.png")):
        picture(tmp_path / "photos" / "train" / name)
        objects = {"bbox": [[2, 1, 10, 6]] * i, "categories": [1] * i, "segmentation": [[POLYGON]] * i}
        lines.append(json.dumps({"file_name": name, "objects": objects}))
    (tmp_path / "photos" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    split, _ = load("instances", source=str(tmp_path / "photos"), labels=["cat", "dog"])
    assert len(split[0][1]) == 0 and split[1][1].labels.tolist() == [1]
    assert decode_mask(split[1][1].masks[0]).sum() == 60


def test_classes_of_a_dataset_are_matched_by_name(tmp_path):
    for name, classes in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        box = datasets.List(datasets.Value("float32"))
        inner = {"bbox": datasets.List(box), "category": datasets.List(datasets.ClassLabel(names=classes))}
        features = datasets.Features({"image": datasets.Image(), "objects": inner})
        row = {"image": [str(picture(tmp_path / "a.png"))], "objects": [{"bbox": [[2, 1, 10, 6]], "category": [0]}]}
        datasets.Dataset.from_dict(row, features=features).save_to_disk(tmp_path / "set" / name)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, evaluation = load("boxes", source=str(tmp_path / "set"))
    assert train.labels == ("cat", "dog")
    assert train[0][1].labels.tolist() == [0] and evaluation[0][1].labels.tolist() == [1]


def test_flags_areas_and_masks_of_a_table_are_read(tmp_path):
    mask = rle.merge(rle.frPyObjects([POLYGON], HEIGHT, WIDTH))
    item = {"bbox": [2, 1, 10, 6], "label": 2, "area": 7.0, "is_crowd": True, "difficult": True, "segmentation": mask}
    objects = load("instances", source=parquet(tmp_path, [[item]]))[0][0][1]
    assert objects.crowd.tolist() == objects.difficult.tolist() == [True]
    assert objects.areas.tolist() == [7] and objects.labels.tolist() == [2]
    np.testing.assert_array_equal(decode_mask(objects.masks[0]), rle.decode(mask))


@pytest.mark.parametrize(
    ("objects", "data", "parts"),
    [
        ({"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0, 1]}, {}, ["row 1", "lengths {'bbox': 1, 'label': 2}"]),
        ({"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [2]}, {"labels": ["a", "b"]}, ["row 1, object 1 of 1", "label 2"]),
        ({"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [None]}, {}, ["row 1, object 1 of 1", "has no label"]),
        ({"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0]}, {"objects_column": "x"}, ["data.objects_column='x'"]),
        ({"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0]}, {"objects_column": "image"}, ["'image'", "bboxes"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_table_that_cannot_work_is_refused_with_its_row(objects, data, parts, tmp_path):
    source = parquet(tmp_path, [{"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0]}, objects])
    with pytest.raises(UserError) as error:
        load("boxes", source=source, **data)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_row_without_objects_stays_and_a_class_in_lists_is_refused(tmp_path):
    split, _ = load("boxes", source=parquet(tmp_path, [{"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0]}, None]))
    assert len(split) == 2 and len(split[1][1]) == 0
    with pytest.raises(UserError, match="not one for each object"):
        load("boxes", source=parquet(tmp_path / "x", [{"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [[0, 1]]}]))


def test_the_size_that_a_table_states_is_checked(tmp_path):
    objects = [{"bbox": [[1.0, 1.0, 2.0, 2.0]], "label": [0]}]
    split, _ = load("boxes", source=parquet(tmp_path, objects, width=[21], height=[10]))
    with pytest.raises(UserError, match=r"row 0: .*21 x 10.* 20 x 10"):
        split[0]


def test_masks_are_needed_for_instances(tmp_path):
    source = parquet(tmp_path, [{"bbox": [[2.0, 1.0, 10.0, 6.0]], "category": ["dog"]}])
    with pytest.raises(UserError, match=r"objects.*segmentation"):
        load("instances", source=source)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"annotations": "a.json"}, ["images"]),
        ({"images": "i", "masks": "m"}, ["masks"]),
        ({"source": "s", "box_format": "yolo"}, ["box_format='yolo'", "xywh"]),
        ({"source": "s", "reduce_labels": True}, ["reduce_labels"]),
        ({"source": "s", "label_column": "c"}, ["label_column='c'", "objects_column"]),
        ({"images": "i", "annotations": "a", "box_format": "xyxy"}, ["box_format='xyxy'", "COCO"]),
        ({"images": "i/{split}", "annotations": "a.json"}, ["data.annotations", "{split}"]),
    ],
    ids=str,
)
def test_fields_that_cannot_work_together_are_refused(data, parts):
    with pytest.raises(UserError) as error:
        load("boxes", **data)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    "field", [{"annotations": "a.json"}, {"objects_column": "o"}, {"box_format": "xyxy"}], ids=str
)
@pytest.mark.parametrize("task", ["image-classification", "semantic-segmentation"])
def test_tasks_without_objects_refuse_their_fields(task, field):
    with pytest.raises(UserError, match=f"{next(iter(field))}=.*{task}"):
        parse_config({"task": task, "model": "m", "output": "o", "data": {"source": "s", **field}})

"""Objectives on data of any skeleton, and base views of framings that cut instances out."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from evaluation.truth import People
from pipeline.contracts import ImageRecord, Stored
from pipeline.objectives.heatmap_paf import HeatmapPafObjective
from pipeline.training.augment import NONE, Augmentation
from pipeline.training.shard import Material
from pipeline.training.views import Views
from posepress.errors import UserError
from posepress.framing.person_crops import PersonCrops
from posepress.framing.whole_image import WholeImage
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes, Sample
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

HAND = Skeleton(("wrist", "left_thumb", "right_thumb"), ((0, 1), (0, 2)), (0.1, 0.1, 0.1))
SIZE = Resolution(64, 96)


def network(skeleton, background=0):
    K, L = len(skeleton.names), len(skeleton.limbs)
    fields = (OutputSpec("heatmaps", 8, K + background), OutputSpec("pafs", 8, 2 * L))
    made = torch.nn.Module()
    made.spec = NetworkSpec(InputSpec("image"), fields, skeleton)
    return made


def truth(*hands):
    points = np.array(hands, np.float64)
    boxes = np.concatenate([points[..., :2].min(1), np.ptp(points[..., :2], axis=1)], axis=1)
    return People(points, boxes, boxes[:, 2:].prod(1), np.zeros(len(points), bool))


TWO = truth([(8, 8, 2), (24, 8, 2), (8, 40, 1)], [(80, 40, 2), (72, 8, 2), (0, 0, 0)])


class Data:
    """Splits of the same few images, with labels that each split can change."""

    def __init__(self, labels=HAND, images=3, found=TWO, others=None):
        self.labels, self.count, self.found, self.others = labels, images, found, others or {}

    def open(self, split):
        return Part(self.others.get(split, self.labels), self.count, self.found, split != "unlabelled")

    def __contains__(self, split):
        return True

    def digest(self, splits):
        return repr((self.labels, self.count, splits))


class Part:
    def __init__(self, labels, count, found, labelled):
        self.labels, self.count, self.found, self.labelled = labels, count, found, labelled
        self.images = [ImageRecord(str(n), f"{n}.png", SIZE) for n in range(count)]

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        pixels = np.full((SIZE.height, SIZE.width, 3), 10 * n, np.uint8)
        boxes = Boxes(self.found.boxes) if self.labelled else None
        return Sample(str(n), SIZE, lambda: pixels, self.found if self.labelled else None, boxes)


def targets(skeleton, source, background=0, flipped=False, found=TWO):
    objective, spec = HeatmapPafObjective(), network(skeleton, background).spec
    kept = objective.labels(found, Stored(SIZE, SIZE, SIZE, source), 2)
    matrix = np.array([[-1.0, 0, 95], [0, 1, 0]] if flipped else [[1.0, 0, 0], [0, 1, 0]], np.float32)
    kept |= {"matrix": matrix, "flipped": np.array(flipped), "labelled": np.array(True)}
    return objective.targets({name: torch.from_numpy(v[None]) for name, v in kept.items()}, SIZE, spec, source)


def cell(maps, channel):
    y, x = np.unravel_index(int(maps[0, channel].argmax()), maps.shape[2:])
    return int(x), int(y)


def test_any_skeleton_is_learnt_by_the_names_of_its_keypoints():
    turned = Skeleton(("right_thumb", "wrist"), ((0, 1),), (0.1, 0.1))  # another order, and a keypoint fewer
    made = targets(turned, HAND)
    assert made["heatmaps"].shape == (1, 2, 8, 12)
    assert cell(made["heatmaps"], 0) == (1, 5)
    assert made["heatmaps"][0, 1, 1, 1] > 0.7
    assert made["heatmaps"][0, 1, 5, 10] > 0.7


def test_left_and_right_of_any_skeleton_change_places_in_a_mirrored_view():
    plain, mirrored = targets(HAND, HAND), targets(HAND, HAND, flipped=True)
    left, right = 1, 2
    assert torch.allclose(mirrored["heatmaps"][:, left], plain["heatmaps"][:, right].flip(-1), atol=1e-4)
    assert torch.allclose(mirrored["heatmaps"][:, right], plain["heatmaps"][:, left].flip(-1), atol=1e-4)


def test_a_map_of_the_background_is_learnt_where_the_network_has_one():
    with_background, without = targets(HAND, HAND, background=1), targets(HAND, HAND)
    assert with_background["heatmaps"].shape[1] == 4
    assert without["heatmaps"].shape[1] == 3
    assert torch.equal(with_background["heatmaps"][:, 3], 1 - without["heatmaps"].amax(1))
    assert with_background["background"].tolist() == [[0, 0, 0, 1]]
    assert without["background"].sum() == 0
    objective = HeatmapPafObjective(foreground=4.0)
    wrong = {name: made.clone() + 0.1 for name, made in without.items() if name in ("heatmaps", "pafs")}
    spared = {name: made.clone() + 0.1 for name, made in with_background.items() if name in ("heatmaps", "pafs")}
    more = objective.loss(spared, with_background)["heatmaps"] - objective.loss(wrong, without)["heatmaps"]
    assert more == pytest.approx(0.01, rel=1e-3)  # the background's own error, without the weight of the foreground


@pytest.mark.parametrize(
    ("skeleton", "source", "message"),
    [
        (Skeleton(("wrist", "left_thum"), ((0, 1),), (0.1, 0.1)), HAND, "keypoint 'left_thum'; did you mean 'left_thumb'"),
        (Skeleton(("wrist", "neck"), ((0, 1),), (0.1, 0.1)), HAND, "name the keypoint 'neck'"),
        (
            Skeleton(tuple(f"p{n}" for n in range(30)), ((0, 1),)),
            HAND,
            r"network has 30 keypoints \(p0, .*, p19 and 10 more\), the data 3 \(wrist, left_thumb, right_thumb\); give",
        ),
        (HAND, Palette(("a",), ((0, 0, 0),)), "labels classes and no keypoints"),
    ],
)
def test_keypoints_that_the_data_does_not_label_are_named(skeleton, source, message):
    with pytest.raises(UserError, match=message):
        HeatmapPafObjective().targets({}, SIZE, network(skeleton).spec, source)


def material(folder, data=None, framing=None, augment=NONE):
    return Material(data or Data(), HeatmapPafObjective(), framing or WholeImage(), SIZE, augment, folder)


def test_splits_of_different_labels_are_not_trained_on_together(tmp_path):
    assert material(tmp_path).source(["train", "unlabelled"]) == HAND
    other = material(tmp_path, Data(others={"tune": COCO_17}))
    with pytest.raises(UserError, match=r"the labels of 'tune' \(nose, .*\) are not those of 'train' \(wrist"):
        other.source(["train", "tune"])
    with pytest.raises(UserError, match="no labels in unlabelled; training needs images with labels"):
        material(tmp_path).source(["unlabelled"])


def test_a_whole_image_has_one_base_view_and_a_crop_one_for_each_instance(tmp_path):
    whole = material(tmp_path).shard(["train"], 128)
    assert whole.rows.tolist() == [0, 1, 2]
    assert whole.places.tolist() == [0, 0, 0]
    assert not whole.cropped.any()
    crops = material(tmp_path, framing=PersonCrops(1.0)).shard(["train"], 128)
    assert crops.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert crops.places.tolist() == [0, 1, 0, 1, 0, 1]
    assert crops.cropped.all()
    assert len(crops.images) == 3  # an image is stored once, however many views it has
    few = crops.first(2)
    assert (len(few), len(few.images)) == (2, 2)
    assert few.rows.tolist() == [0, 1]


def test_a_view_of_a_crop_shows_its_instance_in_the_middle(tmp_path):
    views = Views.of(material(tmp_path, framing=PersonCrops(1.25)), ["train"], network(HAND), 0)
    host = views.host(range(len(views.shard)))
    for matrix, base, box in zip(host["matrix"], host["base"], TWO.boxes[host["base"]], strict=True):
        middle = box[:2] + (box[2:] - 1) / 2
        shown = matrix.numpy() @ [*middle, 1]
        assert shown == pytest.approx([(SIZE.width - 1) / 2, (SIZE.height - 1) / 2], abs=0.6)
        assert int(base) in (0, 1)
    turned = replace(views, augment=Augmentation(shift=0.0, rotate=0.0, scale=(1.0, 4.0), flip=0.0))
    for matrix, base in zip(turned.host(range(6))["matrix"], turned.host(range(6))["base"], strict=True):
        middle = TWO.boxes[base, :2] + (TWO.boxes[base, 2:] - 1) / 2
        assert matrix.numpy() @ [*middle, 1] == pytest.approx([47.5, 31.5], abs=2.5), "a crop is not drawn to other people"


def test_images_without_boxes_cannot_be_cut_out(tmp_path):
    with pytest.raises(UserError, match="image 0: a top-down network needs a box for each person"):
        material(tmp_path, framing=PersonCrops()).shard(["unlabelled", "train"], 128)


def test_the_box_of_each_kept_person_is_known(tmp_path):
    nobody = [(0, 0, 0), (0, 0, 0), (0, 0, 0)]
    found = truth(nobody, *TWO.keypoints.tolist())
    found = replace(found, boxes=np.concatenate([[[60, 30, 9, 9]], TWO.boxes]))
    kept = HeatmapPafObjective().labels(found, Stored(SIZE, SIZE, SIZE, HAND), 3)
    assert kept["instances"].tolist() == [1, 2, -1]
    shard = material(tmp_path, Data(found=found), PersonCrops()).shard(["train"], 128)
    assert shard.places.tolist() == [1, 2] * 3, "the person without keypoints teaches nothing"
    rows = [np.flatnonzero(shard.labels["instances"][0] == place) for place in shard.places[:2]]
    assert [row.tolist() for row in rows] == [[0], [1]]


@dataclass(frozen=True)
class Keeping(HeatmapPafObjective):
    """Keeps a number and, perhaps, a label of a name that a batch has already."""

    keep: int = 1
    name: str = "number"

    def labels(self, truth, stored, capacity):
        return {**super().labels(truth, stored, capacity), self.name: np.array(self.keep)}


def test_a_shard_follows_the_options_of_its_objective(tmp_path):
    for keep in (1, 2):
        made = replace(material(tmp_path), objective=Keeping(keep=keep)).shard(["train"], 128)
        assert made.labels["number"].tolist() == [keep] * 3
    plain = replace(material(tmp_path), objective=Keeping(name="images")).shard(["train"], 128)
    assert plain.images.shape == (3, 64, 96, 3), "labels have names of their own"
    with pytest.raises(UserError, match="Keeping: a label cannot be called 'matrix'; rename it"):
        replace(material(tmp_path), objective=Keeping(name="matrix")).shard(["train"], 128)


def test_a_teacher_of_other_outputs_teaches_nothing():
    with pytest.raises(UserError, match="the teacher has none of the student's outputs .heatmaps"):
        HeatmapPafObjective().imitation({"heatmaps": torch.zeros(1, 1, 1, 1)}, {"lines": torch.zeros(1, 1, 1)})


def test_several_views_average_maps_alone():
    line = NetworkSpec(InputSpec("image"), (OutputSpec("lines", 8, 3, axes="CX"),), HAND)
    with pytest.raises(UserError, match="average maps alone, and 'lines' is none; set 'scales=\\[1.0\\]' flip=false"):
        WholeImage(flip=True).reader(None, line)

"""Objectives of networks that see one person in each view, and of one-stage networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.models.onestage_pose import STRIDES, OneStagePose
from pipeline.models.simcc import SimCC
from pipeline.models.simplebaseline import SimpleBaseline
from pipeline.objectives.heatmaps import HeatmapObjective
from pipeline.objectives.onestage import OneStageObjective
from pipeline.objectives.simcc import SimccObjective
from pipeline.training.augment import DRAWS, NONE
from pipeline.training.shard import Material
from posepress.decoders.heatmap_argmax import TopDownDecoder
from posepress.decoders.onestage import OneStageDecoder
from posepress.decoders.simcc import SimccDecoder
from posepress.errors import UserError
from posepress.framing.person_crops import PersonCrops
from posepress.framing.whole_image import WholeImage
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes, Sample
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

IMAGE = Resolution(240, 320)
CROP = Resolution(128, 96)


def skeleton(K):
    return Skeleton(tuple(f"point_{n}" for n in range(K)), tuple((n, n + 1) for n in range(K - 1)), (0.05,) * K)


def truth(K=17, people=3, seed=0):
    draw = np.random.default_rng(seed)
    boxes = np.array([[20 + 100 * n, 30.0, 70, 160] for n in range(people)])
    points = np.zeros((people, K, 3))
    points[..., :2] = boxes[:, None, :2] + draw.uniform(0.05, 0.95, (people, K, 2)) * boxes[:, None, 2:]
    points[..., 2] = 2
    return People(points, boxes, boxes[:, 2] * boxes[:, 3] * 0.5, np.zeros(people, bool))


def batch(objective, found, views, labels, bases=None):
    """What the shard keeps of an image, for each of some views."""
    kept = objective.labels(found, Stored(IMAGE, IMAGE, IMAGE, labels), 4)
    made = {name: torch.from_numpy(np.stack([value] * len(views))) for name, value in kept.items()}
    made["matrix"] = torch.from_numpy(np.stack([view.matrix for view in views]).astype(np.float32))
    made["flipped"] = torch.tensor([view.flipped for view in views])
    made["labelled"] = torch.full((len(views),), found is not None)
    return {**made, "base": torch.tensor(range(len(views)) if bases is None else bases)}


def crops(found):
    return PersonCrops().views(IMAGE, CROP, InputSpec("image"), Boxes(found.boxes))


@pytest.mark.parametrize("K", [1, 5, 17, 21, 133])
@pytest.mark.parametrize(
    ("objective", "fields", "decoder", "limit"),
    [
        (HeatmapObjective(2.0), lambda K: (OutputSpec("heatmaps", 4, K),), TopDownDecoder, 0.1),
        (
            SimccObjective(),
            lambda K: (OutputSpec("simcc_x", 0.5, K, axes="CX"), OutputSpec("simcc_y", 0.5, K, axes="CY")),
            SimccDecoder,
            0.3,
        ),
    ],
)
def test_the_decoder_reads_from_the_targets_what_was_labelled(objective, fields, decoder, limit, K):
    labels, found = skeleton(K), truth(K)
    spec, views = NetworkSpec(InputSpec("image"), fields(K), labels), crops(found)
    targets = objective.targets(batch(objective, found, views, labels), CROP, spec, labels)
    assert targets["weight"].tolist() == [[1.0] * K] * 3
    made = {field.name: targets[field.name] for field in spec.fields}
    for poses, points in zip(decoder(spec).decode(made, views), found.keypoints, strict=True):
        scale = 1 / views[0].matrix[0, 0]
        inside = slice(None) if K < 30 else np.all(np.abs(poses.keypoints[0, :, :2] - points[:, :2]) < 2 * scale, axis=1)
        assert np.abs(poses.keypoints[0, inside, :2] - points[inside, :2]).max() < 4 * limit * scale
    losses = objective.loss(made, targets)
    assert all(float(value) == pytest.approx(0, abs=1e-5) for value in losses.values())
    worse = objective.loss({name: torch.roll(values, 9, -1) for name, values in made.items()}, targets)
    assert all(float(worse[name]) > 10 * float(losses[name]) + 1e-3 for name in losses)


@pytest.mark.parametrize("objective", [HeatmapObjective(), SimccObjective()])
def test_unlabelled_keypoints_people_and_images_do_not_count(objective):
    found = truth()
    found.keypoints[0, 3, 2] = 0  # not labelled
    found.keypoints[1, :, 2] = 0  # a person without keypoints
    fields = (
        OutputSpec("heatmaps", 4, 17),
        OutputSpec("simcc_x", 0.5, 17, axes="CX"),
        OutputSpec("simcc_y", 0.5, 17, axes="CY"),
    )
    spec = NetworkSpec(InputSpec("image"), fields, COCO_17)
    targets = objective.targets(batch(objective, found, crops(found), COCO_17), CROP, spec, COCO_17)
    weight = targets["weight"]
    assert weight[0].tolist() == [float(k != 3) for k in range(17)]
    assert weight[1].sum() == 0
    assert weight[2].sum() == 17
    nothing = objective.targets(batch(objective, None, crops(found), COCO_17), CROP, spec, COCO_17)
    assert nothing["weight"].sum() == 0
    noise = {field.name: torch.randn(3, *[17 if side is None else side for side in field.shape(CROP)]) for field in fields}
    assert all(float(value) == 0 for value in objective.loss(noise, nothing).values())
    changed = {name: values.clone() for name, values in noise.items()}
    for values in changed.values():
        values[0, 3], values[1] = 7, -7
    losses = [objective.loss(fields_, targets) for fields_ in (noise, changed)]
    assert all(float(losses[0][name]) == pytest.approx(float(losses[1][name]), rel=1e-5) for name in losses[0])


def test_points_outside_a_view_do_not_count():
    found = truth()
    views = PersonCrops(padding=0.5).views(IMAGE, CROP, InputSpec("image"), Boxes(found.boxes))
    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 17),), COCO_17)
    objective = HeatmapObjective()
    weight = objective.targets(batch(objective, found, views, COCO_17), CROP, spec, COCO_17)["weight"]
    for n, view in enumerate(views):
        at = view.to_input(found.keypoints[n, :, :2])
        inside = ((at >= -0.5) & (at < np.array([CROP.width, CROP.height]) - 0.5)).all(axis=1)
        assert weight[n].tolist() == inside.astype(float).tolist()
        assert not inside.all()


def test_a_network_with_other_maps_than_keypoints_is_refused():
    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 19),), COCO_17)
    found = truth()
    with pytest.raises(UserError, match="19 channels of 'heatmaps', but its labels name 17 keypoints"):
        HeatmapObjective().targets(batch(HeatmapObjective(), found, crops(found), COCO_17), CROP, spec, COCO_17)


INPUT = Resolution(192, 256)


def whole(found, size=INPUT, labels=COCO_17):
    objective = OneStageObjective()
    (view,) = WholeImage().views(IMAGE, size, InputSpec("image"))
    spec = OneStagePose(0.125, skeleton=labels).spec
    return objective, view, spec, objective.targets(batch(objective, found, [view], labels), size, spec, labels)


def perfect(targets, K=17):
    """The sets of a network that knows the people: each cell inside a box returns it, others nothing."""
    middles, people = targets["middles"], targets["people"][0]
    inside = ((middles[:, None] > people[:, :2]) & (middles[:, None] < people[:, 2:])).all(-1) & (people[:, 2] > people[:, 0])
    owner, there = inside.int().argmax(1), inside.any(1)
    seen = targets["seen"][0][owner]
    points = torch.cat((targets["points"][0][owner], seen[..., None]), -1).reshape(len(owner), 3 * K)
    boxes = torch.where(there[:, None], people[owner], torch.tensor([0.0, 0, 8, 8]))
    return {"boxes": boxes[None], "scores": there.float()[None, :, None] * 0.99 + 0.005, "keypoints": points[None]}


def test_a_perfect_one_stage_network_has_the_people_and_hardly_a_loss():
    found = truth()
    objective, view, spec, targets = whole(found)
    fields = perfect(targets)
    (poses,) = OneStageDecoder(spec, score_threshold=0.5).decode(fields, [view])
    order = np.argsort(poses.boxes[:, 0])
    assert np.abs(poses.keypoints[order, :, :2] - found.keypoints[..., :2]).max() < 0.01
    assert np.abs(poses.boxes[order] - found.boxes).max() < 0.01
    losses = objective.loss(fields, targets)
    assert float(losses["boxes"]) == pytest.approx(0, abs=1e-4)
    assert float(losses["keypoints"]) == pytest.approx(0, abs=1e-4)
    shifted = {**fields, "boxes": fields["boxes"] + 12, "keypoints": fields["keypoints"] + 12}
    worse = objective.loss(shifted, targets)
    assert all(float(worse[name]) > float(losses[name]) + 0.1 for name in ("boxes", "keypoints"))


def test_each_person_is_learnt_by_the_best_cells_inside_its_box():
    objective, _, _, targets = whole(truth())
    fields = perfect(targets)
    owner, wanted = objective._assigned(fields["boxes"], fields["scores"][..., 0], targets)
    middles = targets["middles"]
    for person in range(3):
        own = middles[(owner[0] == person) & (wanted[0] > 0)]
        box = targets["people"][0, person]
        assert 1 <= len(own) <= objective.candidates
        assert ((own > box[:2]) & (own < box[2:])).all()
    assert float(wanted.max()) == pytest.approx(1, abs=1e-4)
    assert len(middles) == sum(192 // s * (256 // s) for s in STRIDES)


def test_crowds_and_unlabelled_people_are_no_negatives():
    found = truth()
    found.keypoints[1, :, 2] = 0
    objective, _, _, targets = whole(found)
    box = torch.from_numpy(found.boxes[1]) * 0.8
    inside = ((targets["middles"] > box[:2] + 4) & (targets["middles"] < box[:2] + box[2:] - 4)).all(-1)
    assert inside.sum() > 10
    assert targets["counted"][0, inside].sum() == 0
    assert targets["counted"][0].mean() > 0.6
    fields = perfect(targets)
    surer = {**fields, "scores": torch.where(inside[None, :, None], 0.9, fields["scores"])}
    assert float(objective.loss(surer, targets)["scores"]) == pytest.approx(
        float(objective.loss(fields, targets)["scores"]), rel=1e-4
    )


def test_images_without_labels_and_without_people_have_finite_losses():
    for found in (None, People(np.zeros((0, 17, 3)), np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool))):
        objective, _, spec, targets = whole(found)
        network = OneStagePose(0.125)
        losses = objective.loss(network(torch.zeros(1, 3, 192, 256)), targets)
        total = torch.stack([*losses.values()]).sum()
        total.backward()
        assert torch.isfinite(total)
        assert float(losses["boxes"]) == float(losses["keypoints"]) == 0
        assert (float(losses["scores"]) == 0) == (found is None)
        assert spec.fields


def test_other_strides_than_the_networks_are_named():
    objective, _, _, targets = whole(truth())
    fields = {name: values[:, :-3] for name, values in perfect(targets).items()}
    with pytest.raises(UserError, match=r"returns 1005 entries, but objective\.strides=\[8, 16, 32\] make 1008 cells"):
        objective.loss(fields, targets)
    with pytest.raises(UserError, match=r"training_resolution=200x256: no multiple of the objective's stride 16"):
        whole(truth(), Resolution(200, 256))


@pytest.mark.parametrize(
    ("objective", "network", "size"),
    [
        (HeatmapObjective(), lambda: SimpleBaseline(18, 0.25, 64), CROP),
        (SimccObjective(), lambda: SimCC("128x96", 18, 0.25), CROP),
        (OneStageObjective(), lambda: OneStagePose(0.125), Resolution(96, 128)),
    ],
)
def test_imitation_is_least_at_the_teacher_and_reaches_the_student(objective, network, size):
    torch.manual_seed(0)
    student, teacher = network(), network().eval()
    images = torch.randn(2, 3, size.height, size.width)
    with torch.no_grad():
        expected = teacher(images)
    itself, other = objective.imitation(expected, expected), objective.imitation(student(images), expected)
    assert float(itself) < float(other)
    other.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    with pytest.raises(UserError, match="the teacher has no output"):
        objective.imitation(expected, {"other": images})


def test_crops_of_half_a_person_show_its_labelled_half(tmp_path):
    found = truth()
    found.keypoints[2, :, 2] = 0  # nothing to learn from
    pixels = np.zeros((IMAGE.height, IMAGE.width, 3), np.uint8)

    class Part:
        labels, labelled = COCO_17, True

        def __len__(self):
            return 1

        def __getitem__(self, n):
            return Sample("1", IMAGE, lambda: pixels, found, Boxes(found.boxes))

    class Data:
        def open(self, split):
            return Part()

        def digest(self, splits):
            return "d"

    augment = replace(NONE, half_body=0.5)
    material = Material(Data(), HeatmapObjective(), PersonCrops(), CROP, augment, tmp_path)
    shard = material.shard(["train"], 128)
    assert shard.places.tolist() == [0, 1], "a person without labelled keypoints has no crop"
    size = np.array([CROP.width, CROP.height])
    for n in range(2):
        points = shard.labels["keypoints"][0, n, :, :2].astype(np.float64)
        order = np.argsort(points[:, 1])
        for half, rows in enumerate((order[:8], order[8:])):
            at = points[rows] @ shard.halves[n, half][:, :2].T + shard.halves[n, half][:, 2]
            assert ((at > -0.5) & (at < size - 0.5)).all()
            assert shard.halves[n, half][0, 0] > shard.bases[n][0, 0], "a half is shown larger"
    draws = np.random.default_rng(0).random((200, DRAWS))
    rows = np.arange(200) % 2
    matrices, _, _ = augment.views(draws, shard.bases[rows], np.zeros((200, 0, 4), np.float32), CROP, shard.halves[rows])
    halves = ~np.isclose(matrices[:, 0, 0], shard.bases[rows][:, 0, 0])
    assert 0.35 < halves.mean() < 0.65
    whole, _, _ = NONE.views(draws, shard.bases[rows], np.zeros((200, 0, 4), np.float32), CROP, shard.halves[rows])
    assert np.allclose(whole, shard.bases[rows])

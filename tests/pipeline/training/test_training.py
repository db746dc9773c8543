import itertools
import math
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.objectives.heatmap_paf import HeatmapPafObjective
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import groups
from pipeline.pruning.groups import folded, normalised
from pipeline.pruning.semi_structured import is_sparse
from pipeline.pruning.sparse24 import Sparse24
from pipeline.results.fingerprint import closure
from pipeline.training import steps as steps_module
from pipeline.training.augment import NONE, Augmentation, cut
from pipeline.training.distillation import Distillation
from pipeline.training.loop import train
from pipeline.training.options import Training, learning_rate
from pipeline.training.shard import Material
from pipeline.training.sparsity import Penalty
from pipeline.training.steps import _items, loss_on
from pipeline.training.views import Views, _order, copied, uniform
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.geometry import resized
from posepress.pixels import frame, normalise
from posepress.pixels_torch import normalise as normalise_torch
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17, OPENPOSE_18

SPEC = LightweightOpenPose.spec
SIZE = Resolution(64, 80)


def person(x=40.0, crowd=False, labelled=True):
    keypoints = np.zeros((1, 17, 3))
    if labelled:
        keypoints[0, :, 0] = x + 3 * np.array([0, 1, -1, 2, -2, 4, -4, 5, -5, 6, -6, 3, -3, 3, -3, 3, -3])
        keypoints[0, :, 1] = np.array([8, 6, 6, 7, 7, 16, 16, 24, 24, 32, 32, 34, 34, 44, 44, 54, 54])
        keypoints[0, :, 2] = 2
    return People(keypoints, np.array([[x - 20, 4, 40, 54]]), np.array([900.0]), np.array([crowd]), (None,))


IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


def batch(truth, matrix=IDENTITY, flipped=False, size=SIZE):
    """What the objective gets of one image seen in one view."""
    objective = HeatmapPafObjective()
    capacity = 1 if truth is None else max(objective.capacity(truth), 1)
    kept = objective.labels(truth, Stored(size, size, size, COCO_17), capacity)
    kept |= {"matrix": np.asarray(matrix, np.float32), "flipped": np.array(flipped), "labelled": np.array(truth is not None)}
    return {name: torch.from_numpy(np.asarray(value)[None]) for name, value in kept.items()}


def fields_of(truth, **view):
    return HeatmapPafObjective().targets(batch(truth, **view), SIZE, SPEC, COCO_17)


def test_heatmaps_peak_at_the_keypoints_and_pafs_point_along_the_limbs():
    targets = {name: value[0].numpy() for name, value in fields_of(person()).items()}
    assert targets["heatmaps"].shape == (19, 8, 10)
    for k, name in enumerate(OPENPOSE_18.names):
        if name == "neck":
            continue
        point = person().keypoints[0, COCO_17.names.index(name), :2]
        i, j = np.unravel_index(targets["heatmaps"][k].argmax(), (8, 10))
        assert abs(j * 8 + 3.5 - point[0]) <= 4.01
        assert abs(i * 8 + 3.5 - point[1]) <= 4.01
    assert np.allclose(targets["heatmaps"][18], 1 - targets["heatmaps"][:18].max(0))
    thigh = OPENPOSE_18.limbs.index((8, 9))
    x, y = targets["pafs"][2 * thigh], targets["pafs"][2 * thigh + 1]
    assert y.max() == pytest.approx(1, abs=0.01)
    assert np.abs(x[y > 0.5]).max() < 0.1
    assert np.hypot(x, y).max() <= 1.0001


def test_heatmaps_are_gaussians_and_overlapping_limbs_share_their_cells():
    two = People(
        *(np.concatenate((getattr(person(), f), getattr(person(48.0), f))) for f in ("keypoints", "boxes", "areas", "crowd")),
        (None, None),
    )
    targets = {name: value[0].numpy() for name, value in fields_of(two).items()}
    nose = OPENPOSE_18.names.index("nose")
    ys, xs = np.mgrid[:8, :10]
    peaks = [np.exp(-((xs - (x - 3.5) / 8) ** 2 + (ys - (8 - 3.5) / 8) ** 2) / 2 / 0.9**2) for x in (40, 48)]
    expected = np.maximum(*peaks)
    assert np.allclose(targets["heatmaps"][nose], np.where(expected < 0.01, 0, expected), atol=1e-5)
    pafs = targets["pafs"].reshape(-1, 2, 8, 10)
    assert np.hypot(pafs[:, 0], pafs[:, 1]).max() <= 1.0001, "where limbs of a kind overlap, their mean"


def test_a_mirrored_view_swaps_left_and_right():
    mirror = np.array([[-1.0, 0, 79], [0, 1, 0]])
    plain, flipped = (fields_of(person(), **view)["heatmaps"][0] for view in ({}, {"matrix": mirror, "flipped": True}))
    order = [*OPENPOSE_18.flip, 18]
    assert torch.allclose(flipped, plain[order].flip(-1), atol=1e-4)
    right, left = OPENPOSE_18.names.index("right_wrist"), OPENPOSE_18.names.index("left_wrist")
    column = [int(flipped[k].amax(0).argmax()) for k in (right, left)]
    assert column[0] < column[1], "in a mirrored image the person's right is still on the image's left"


def test_crowds_and_people_without_labels_do_not_count():
    objective = HeatmapPafObjective()
    for truth in (person(crowd=True, labelled=False), person(labelled=False)):
        mask = fields_of(truth)["mask"][0]
        assert mask[0, 3, 4] == 0
        assert mask[0, 3, 9] == 1
    assert fields_of(person())["mask"].all()
    assert not fields_of(None)["mask"].any(), "an image without labels"
    targets = fields_of(person(labelled=False))
    wrong = {name: torch.zeros_like(targets[name]) for name in ("heatmaps", "pafs")}
    wrong["heatmaps"][:, 18] = 1
    clean = objective.loss(wrong, targets)
    wrong["pafs"][0, 5, 3, 4] = 9.0
    assert objective.loss(wrong, targets)["pafs"] == clean["pafs"] == 0
    wrong["pafs"][0, 5, 3, 9] = 9.0
    assert objective.loss(wrong, targets)["pafs"] > 1


def test_polygons_and_run_lengths_mask_the_same_cells():
    square = [[16, 16, 48, 16, 48, 48, 16, 48]]
    mask = np.zeros((64, 80), bool)
    mask[16:48, 16:48] = True
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = {"size": [64, 80], "counts": np.diff([0, *edges, flat.size]).tolist()}
    found = []
    for segmentation in (square, runs):
        truth = person(crowd=True, labelled=False)
        truth = People(truth.keypoints, truth.boxes, truth.areas, truth.crowd, (segmentation,))
        found.append(fields_of(truth)["mask"][0, 0])
    assert found[0][3:5, 3:5].sum() == found[1][3:5, 3:5].sum() == 0
    assert found[0][:, 7:].all()
    assert found[1][:, 7:].all()


def test_losses_of_all_stages_are_added():
    objective = HeatmapPafObjective()
    targets = fields_of(person())
    final = {"heatmaps": torch.zeros(1, 19, 8, 10), "pafs": torch.zeros(1, 38, 8, 10)}
    twice = {**final, "heatmaps.0": final["heatmaps"], "pafs.0": final["pafs"]}
    one, two = objective.loss(final, targets), objective.loss(twice, targets)
    assert two["pafs"] == pytest.approx(2 * float(one["pafs"]))


def drawn(count, augment=None, size=Resolution(120, 160), boxes=None, seed=0):  # noqa: B008
    """Random views of an image of one person."""
    boxes = np.tile(person().boxes[None] if boxes is None else boxes, (count, 1, 1))
    (base,) = WholeImage().bases(size, SIZE)
    bases = np.tile(base.matrix[None], (count, 1, 1))
    return (Augmentation() if augment is None else augment).views(uniform(seed, range(count)), bases, boxes, SIZE)


def test_views_stay_the_same_for_a_seed_and_vary_otherwise():
    matrices, flipped, tones = drawn(50)
    assert np.array_equal(drawn(50)[0], matrices)
    assert len({m.tobytes() for m in (*matrices, *drawn(50, seed=1)[0])}) == 100
    assert set(flipped) == {True, False}
    assert np.array_equal(np.linalg.det(matrices[:, :, :2]) < 0, flipped)
    assert tones[:, 0] == pytest.approx(1, abs=0.2)
    assert np.ptp(tones[:, 0]) > 0.3
    assert tones[:, 1] == pytest.approx(0, abs=25.5)
    assert np.ptp(tones[:, 1]) > 40


def test_a_mirrored_view_shows_the_same_place_from_left_to_right():
    as_it_is, mirrored = (drawn(50, replace(Augmentation(), flip=share)) for share in (0.0, 1.0))
    assert not as_it_is[1].any()
    assert mirrored[1].all()
    points = np.array([[40, 8, 1], [60, 54, 1], [20, 30, 1]], np.float64).T  # near the person, which is looked at
    seen, turned = as_it_is[0] @ points, mirrored[0] @ points
    target = (seen + turned)[:, 0].mean(axis=1) / 2  # of the line they are mirrored about
    assert np.allclose(seen[:, 1], turned[:, 1])
    assert np.allclose(seen[:, 0] + turned[:, 0], 2 * target[:, None])
    assert np.abs(target - 39.5).max() <= 0.25 * 80
    assert (as_it_is[0][:, 1, 1] > 0).all()  # nobody stands on the head


def test_an_item_is_drawn_alike_in_any_batch():
    whole = uniform(3, range(40))
    assert np.array_equal(uniform(3, range(17, 23)), whole[17:23])
    assert not np.array_equal(uniform(4, range(40)), whole)
    many = uniform(0, range(20_000))
    assert many.min() >= 0
    assert many.max() < 1
    assert np.allclose(many.mean(axis=0), 0.5, atol=0.01)
    assert np.abs(np.corrcoef(many.T) - np.eye(many.shape[1])).max() < 0.03


def test_views_have_the_sizes_angles_and_places_asked_for():
    augment = Augmentation(flip=0.0, scale=(0.5, 2.0), rotate=30.0, shift=0.1)
    matrices, flipped, _ = drawn(2000, augment, boxes=np.zeros((0, 4)))
    assert not flipped.any()
    zoom = np.sqrt(np.linalg.det(matrices[:, :, :2])) * 2  # the image is twice the input
    assert zoom.min() == pytest.approx(0.5, rel=0.01)
    assert zoom.max() == pytest.approx(2.0, rel=0.01)
    assert np.median(zoom) == pytest.approx(1.0, rel=0.05)
    angle = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert angle.min() == pytest.approx(-30, abs=0.5)
    assert angle.max() == pytest.approx(30, abs=0.5)
    middle = matrices @ np.array([79.5, 59.5, 1]) - [39.5, 31.5]  # of the image, from that of the input
    assert np.abs(middle).max(axis=0) == pytest.approx([8.0, 6.4], rel=0.01)


def test_an_enlarged_view_goes_towards_one_of_the_people():
    augment = Augmentation(flip=0.0, scale=(1.5, 1.5), rotate=0.0, shift=0.0)
    boxes = np.array([[10, 20, 20, 40], [100, 60, 40, 20], [0, 0, 0, 0]], np.float64)  # the last is none
    matrices, _, _ = drawn(500, augment, boxes=boxes)
    linear, offset = matrices[:, :, :2], matrices[:, :, 2:]
    looked_at = np.linalg.solve(linear, np.array([[39.5], [31.5]]) - offset)[:, :, 0]
    ways = np.array([20, 40]) - [79.5, 59.5], np.array([120, 70]) - [79.5, 59.5]
    part = np.stack([(looked_at - [79.5, 59.5]) @ way / (way @ way) for way in ways])
    off = np.stack(
        [np.linalg.norm(looked_at - [79.5, 59.5] - p[:, None] * way, axis=1) for p, way in zip(part, ways, strict=True)]
    )
    assert off.min(axis=0).max() < 1e-9  # on the line to one of them
    chosen = off.argmin(axis=0)
    assert 0.4 < chosen.mean() < 0.6
    gone = part[chosen, np.arange(500)]
    assert 0 <= gone.min() < 0.02
    assert 0.98 < gone.max() <= 1


def test_no_augmentation_is_a_centred_letterbox():
    matrices, flipped, tones = drawn(3, NONE, size=Resolution(128, 160))
    assert np.allclose(matrices, resized(Resolution(128, 160), (64, 80)))
    assert not flipped.any()
    assert np.array_equal(tones, [[1, 0]] * 3)


def test_a_shard_on_the_device_gives_the_views_of_one_on_disk(images, tmp_path):
    views, device = _views(images, tmp_path, ["train", "unlabelled"]), torch.device("cpu")
    items = range(3, 3 + len(views.shard))  # of two epochs
    image, targets = views.on(device, views.host(items))
    there = copied(views.shard, device)
    assert sum(values.nbytes for values in there.values()) == views.shard.bytes
    rows = views.host(items, rows_only=True)
    assert set(rows) == {"row", "matrix", "flipped", "tone", "base"}
    again, expected = views.on(device, rows, there)
    assert torch.equal(image, again)
    assert all(torch.equal(targets[name], expected[name]) for name in targets)
    assert sorted(views.host(range(len(views.shard)), rows_only=True)["row"]) == list(range(len(views.shard)))


@pytest.mark.parametrize("network", [LightweightOpenPose, MobileNetV2Paf])
def test_views_are_cut_as_opencv_cuts_them(network):
    import cv2

    draw = np.random.default_rng(0)
    image = cv2.GaussianBlur(draw.integers(0, 255, (90, 120, 3), np.uint8), (5, 5), 0)
    spec = network.spec.input
    for view in drawn(4, size=Resolution(90, 120))[0]:
        seen = cv2.warpAffine(image, view, (80, 64), flags=cv2.INTER_LINEAR, borderValue=(spec.pad,) * 3)
        expected = normalise(np.clip(np.rint(seen * 1.1 + 5.0), 0, 255).astype(np.uint8), spec)
        matrix, tone = torch.from_numpy(view[None].astype(np.float32)), torch.tensor([[1.1, 5.0]])
        ours = cut(torch.from_numpy(image[None]), matrix, tone, SIZE, spec)[0].numpy()
        assert ours.shape == (3, 64, 80)
        level = spec.range / np.asarray(spec.std)[0] / 255
        assert np.abs(ours - expected).mean() < 0.7 * level
        assert np.abs(ours - expected).max() < 12 * level  # OpenCV's coefficients have five bits


def test_pixels_arrive_as_the_network_wants_them():
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 255  # red
    rgb = normalise(image, SPEC.input)
    assert rgb.shape == (3, 4, 6)
    assert rgb[0].max() == pytest.approx(1)
    assert rgb[1].max() == pytest.approx(-1)

    bgr = normalise(image[None], MobileNetV2Paf.spec.input)
    assert bgr.shape == (1, 3, 4, 6)
    assert bgr[0, 2].max() == pytest.approx(255)
    assert bgr[0, 0].max() == 0


def test_framing_pads_with_the_networks_grey():
    image = np.full((100, 50, 3), 255, np.uint8)
    (view,) = WholeImage("pad_image_input").views(Resolution(100, 50), SIZE, SPEC.input)
    cut = frame(image, view, SPEC.input)
    assert cut.shape == (64, 80, 3)
    assert (cut[:, :32] == 255).all()
    assert (cut[:, 33:] == SPEC.input.pad).all()


def test_the_learning_rate_warms_up_and_falls():
    training = Training(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, training) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.01, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def _options(**changes):
    return Training(
        **{
            "steps": 12,
            "batch_size": 4,
            "warmup": 2,
            "checkpoint_every": 4,
            "lr": 5e-3,
            "precision": "32-true",
            "accelerator": "cpu",
            **changes,
        }
    )


def _network(width=0.125):
    torch.manual_seed(0)
    return LightweightOpenPose(stages=2, width=width)


def _views(images, cache, splits=("train",), **changes):
    material = Material(images, HeatmapPafObjective(), WholeImage(), SIZE, Augmentation(), cache)
    views = Views.of(material, list(splits), _network(), 0)
    return replace(views, **changes)


def _train(images, checkpoint, teacher=None, distillation=None, tune=None, network=None, **changes):
    network, views = network or _network(), _views(images, Path(images.cache))  # one shard for all
    found = train(network, views, _options(**changes), checkpoint, teacher, distillation, tune)
    return network, found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_learns(images, tmp_path):
    _, early = _train(images, tmp_path / "a.ckpt", steps=1)
    network, late = _train(images, tmp_path / "b.ckpt", steps=40)
    assert late["loss"] < 0.8 * early["loss"]
    assert not network.training


def test_a_log_says_how_fast_a_training_was(images, tmp_path, capsys):
    _train(images, tmp_path / "b.ckpt", steps=6)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("           step 6 of 6, ")]
    assert "images/s" in line
    assert "heatmaps" in line


def test_an_interrupted_training_ends_as_an_uninterrupted_one(images, tmp_path, monkeypatch, capsys):
    def dropping():
        network = _network()
        network.backbone.register_forward_hook(lambda module, _, out: torch.nn.functional.dropout(out, 0.2, module.training))
        return network

    whole_run, expected = _train(images, tmp_path / "whole.ckpt", network=dropping())
    calls = 0
    objective_loss = HeatmapPafObjective.loss

    def interrupted(self, fields, targets):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return objective_loss(self, fields, targets)

    monkeypatch.setattr(HeatmapPafObjective, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(images, tmp_path / "cut.ckpt", network=dropping())
    monkeypatch.undo()
    resumed, found = _train(images, tmp_path / "cut.ckpt", network=dropping())
    assert "training resumes at step 4 of 12" in capsys.readouterr().err
    assert found["loss"] == expected["loss"]
    assert found["curve"] == expected["curve"]
    assert same(whole_run, resumed), "bit for bit"


def test_a_finished_training_is_not_repeated(images, tmp_path):
    first, _ = _train(images, tmp_path / "a.ckpt")
    again, _ = _train(images, tmp_path / "a.ckpt")
    assert same(first, again)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_processor(images, tmp_path):
    whole, _ = _train(images, tmp_path / "a.ckpt")
    _train(images, tmp_path / "b.ckpt", steps=8, warmup=2)
    state = torch.load(tmp_path / "b.ckpt", weights_only=True)
    for group in state["optimiser"]["param_groups"]:
        group.update(fused=True, capturable=True, lr=torch.tensor(1e-3))
    torch.save(state, tmp_path / "b.ckpt")
    resumed, found = _train(images, tmp_path / "b.ckpt")
    assert found["steps"] == 12
    assert list(resumed.state_dict()) == list(whole.state_dict())


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_a_checkpoint_that_cannot_be_read_is_refused(images, tmp_path, content):
    if content is None:
        torch.save({"network": {}, "optimiser": {}}, tmp_path / "a.ckpt")
    else:
        (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt: no checkpoint of this training .*force=true"):
        _train(images, tmp_path / "a.ckpt")


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """A network that was trained for 30 steps without a penalty."""
    return _train(images, tmp_path_factory.mktemp("plain") / "a.ckpt", steps=30)[0]


@pytest.mark.parametrize(("kind", "factor"), [("l1", 0.3), ("l2", 30.0), ("group_lasso", 1.0)])
def test_penalties_make_judged_weights_smaller(images, plain, tmp_path, kind, factor):
    def size(network):
        return float(sum(importance(network, groups(network), "group_l1", None, "union")[0]))

    sparse, _ = _train(
        images, tmp_path / "b.ckpt", steps=30, clip=1e9, regularization_type=kind, kernel_regularization_factor=factor
    )
    assert size(sparse) < 0.97 * size(plain)


@pytest.mark.parametrize("options", [{"regularization_type": "l1"}, {"kernel_regularization_factor": 1e-4}])
def test_half_a_penalty_is_refused(options):
    with pytest.raises(UserError, match="one does nothing without the other; give a type and a factor above 0"):
        Training(**options)


def test_penalties_are_the_norms_they_are_called_after():
    network = _network().eval()
    found, pairs = groups(network), normalised(network)
    filters = [folded(part.layer, pairs.get(part.layer)) for group in found for part in group.producers]
    assert float(Penalty(network, "l1", 2.0)().detach()) == pytest.approx(
        2 * sum(float(w.abs().sum()) for w in filters), rel=1e-4
    )
    assert float(Penalty(network, "l2", 1.0)()) == pytest.approx(sum(float(w.square().sum()) for w in filters), rel=1e-4)
    group, norm = found[0], pairs
    squares, weights = torch.zeros(group.size), 0
    for part in group.parts:
        if part.layer not in norm.values():
            weight = folded(part.layer, norm.get(part.layer)).detach()
            rows = weight if part.outputs else weight.transpose(0, 1)
            squares[part.roots] += rows[part.channels].flatten(1).square().sum(1)
            weights += rows[part.channels].numel()
    one = Penalty(network, "group_lasso", 1.0)
    one.groups, one.counts = [group], one.counts[:1]
    assert float(one()) == pytest.approx(float(squares.sqrt().sum()) * (weights / group.size) ** 0.5, rel=1e-3)
    with pytest.raises(UserError, match="regularization_type=l3: choose null, l1, l2, group_lasso"):
        Training(regularization_type="l3", kernel_regularization_factor=1.0)


class PreActivated(torch.nn.Module):
    """A batch norm that no convolution is right before."""

    spec = SPEC

    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16)
        self.head = torch.nn.Conv2d(16, 57, 1)
        self.ignored_layers = [self.head]

    def forward(self, x):
        field = self.head(self.norm(F.relu(self.first(x))))
        return {"heatmaps": field[:, :19], "pafs": field[:, 19:]}


def test_a_batch_norm_of_its_own_is_no_weight_of_the_group_lasso():
    network = PreActivated()
    made, read = network.first.weight.flatten(1), network.head.weight.transpose(0, 1).flatten(1)
    each = torch.cat((made, read), 1)
    expected = each.norm(dim=1).sum() * each.shape[1] ** 0.5
    assert float(Penalty(network, "group_lasso", 1.0)().detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_no_steps_keep_the_weights(images, tmp_path):
    network = _network()
    train(network, _views(images, tmp_path), _options(steps=0), tmp_path / "a.ckpt")
    assert same(network, _network())
    assert not (tmp_path / "a.ckpt").exists()


def test_a_loss_that_is_not_finite_goes_back_and_then_gives_up(images, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        UserError,
        match=r"the loss is not finite after .* steps, also with lr=.*lower training.lr=1e\+30, or lower training.clip=1e\+30",
    ):
        _train(images, tmp_path / "a.ckpt", lr=1e30, clip=1e30, steps=30)
    assert capsys.readouterr().err.count("back to step") == 3
    with pytest.raises(UserError, match=r"lower training.lr=1e\+30, or give training.clip=5"):
        _train(images, tmp_path / "unclipped.ckpt", lr=1e30, clip=None, steps=30)
    capsys.readouterr()
    objective_loss, calls = HeatmapPafObjective.loss, 0

    def poisoned(self, fields, targets):
        nonlocal calls
        calls += 1
        losses = objective_loss(self, fields, targets)
        return {name: value * math.nan for name, value in losses.items()} if calls == 7 else losses

    monkeypatch.setattr(HeatmapPafObjective, "loss", poisoned)
    network, found = _train(images, tmp_path / "b.ckpt")
    assert "not finite after 8 steps: back to step 4, with 0.5 times the learning rate" in capsys.readouterr().err
    assert found["steps"] == 12
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def _seen(monkeypatch):
    """The gradients of every step, before and after they are clipped."""
    from lightning_fabric import Fabric

    real, seen = Fabric.clip_gradients, []

    def clip(self, model, *given, **more):
        before = [p.grad.clone() for p in model.parameters()]
        norm = real(self, model, *given, **more)
        seen.append((before, [p.grad.clone() for p in model.parameters()]))
        return norm

    monkeypatch.setattr(Fabric, "clip_gradients", clip)
    return seen


@pytest.mark.parametrize("penalty", [{}, {"regularization_type": "l1", "kernel_regularization_factor": 1e-3}])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(images, tmp_path, monkeypatch, penalty):
    def still(self, x):  # else it would see a part of the batch at a time
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", still)
    seen = _seen(monkeypatch)
    _train(images, tmp_path / "a.ckpt", steps=1, **penalty)
    _train(images, tmp_path / "b.ckpt", steps=1, accumulate=2, **penalty)
    (whole, _), (parts, _) = seen
    scale = max(float(grad.abs().max()) for grad in whole)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5 * scale) for one, other in zip(whole, parts, strict=True))


def test_gradients_are_clipped_or_left(images, tmp_path, monkeypatch):
    seen = _seen(monkeypatch)
    _train(images, tmp_path / "a.ckpt", steps=1, clip=0.25)
    _train(images, tmp_path / "b.ckpt", steps=1, clip=None)
    norms = [[float(torch.cat([g.flatten() for g in grads]).norm()) for grads in step] for step in seen]
    assert norms[0][0] > 0.5
    assert norms[0][1] == pytest.approx(0.25, rel=1e-3)
    assert norms[1][1] == norms[1][0] == pytest.approx(norms[0][0])


def test_the_averaged_weights_follow_the_live_ones(images, tmp_path, monkeypatch):
    save, states = torch.save, []
    monkeypatch.setattr(torch, "save", lambda state, file: states.append(deepcopy(state)) or save(state, file))
    network, _ = _train(images, tmp_path / "a.ckpt", steps=4, checkpoint_every=1, ema=0.2)
    name = next(name for name, p in network.named_parameters())
    expected = states[0]["averaged"][name]
    for step, state in enumerate(states[1:]):
        keep = min(0.2, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * state["network"][name]
        assert torch.allclose(state["averaged"][name], expected, atol=1e-6)
        assert not torch.equal(state["averaged"][name], state["network"][name])
    assert torch.equal(network.state_dict()[name], states[-1]["averaged"][name]), "they are the result"


def test_a_batch_too_large_for_the_gpu_says_what_to_do(images, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HeatmapPafObjective, "loss", full)
    with pytest.raises(UserError, match=r"batch_size=4: does not fit .*training\.accumulate=2, or choose a smaller batch_size"):
        _train(images, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"batch_size=9: does not fit .*training\.accumulate=3, or choose"):
        _train(images, tmp_path / "b.ckpt", batch_size=9)
    with pytest.raises(UserError, match="batch_size=4: does not fit into the GPU's memory; choose a smaller batch_size"):
        _train(images, tmp_path / "c.ckpt", accumulate=4)


def test_a_batch_in_parts_is_the_same_batch(images, tmp_path):
    whole, expected = _train(images, tmp_path / "a.ckpt", steps=1)
    parts, found = _train(images, tmp_path / "b.ckpt", steps=1, accumulate=2)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)  # batch norms see half of it at a time
    assert not same(whole, parts)
    items = [list(part) for part in _items(_options(batch_size=8, accumulate=2, devices=2), 1, 1)]
    assert items[:2] == [[10, 11], [14, 15]]


def test_two_devices_share_a_batch_and_learn_the_same(images, tmp_path):
    views = _views(images, tmp_path)
    found = []
    for devices in (1, 2):
        network, checkpoint = _network(), tmp_path / f"{devices}.ckpt"
        # one device sees the halves one after the other, so that its batch norms see what those of two devices see
        options = _options(steps=6, devices=devices, accumulate=2 // devices, accelerator="cpu", checkpoint_every=2)
        found.append(train(network, views, options, checkpoint)["curve"])
    assert [step for step, _ in found[0]] == [step for step, _ in found[1]] == [1, 2, 4, 6]
    for (_, one), (_, two) in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_machines_with_checkpoints_of_different_steps_are_refused():
    def run(*others):
        answers = iter(others)
        fabric = SimpleNamespace(device="cpu", all_reduce=lambda own, reduce_op: max(float(own), next(answers)))
        return SimpleNamespace(checkpoint="a.ckpt", fabric=fabric)

    assert steps_module.Run._agreed(run(3.0, -3.0), 3.0) == 3
    for others in ((4.0, -4.0), (2.0, -2.0)):
        with pytest.raises(UserError, match=r"a\.ckpt: the machines have checkpoints of different steps, or one has none"):
            steps_module.Run._agreed(run(*others), 3.0)


def test_machines_agree_on_the_checkpoint_at_the_start_and_on_its_step(images, tmp_path, monkeypatch):
    agreed, asked = [], steps_module.Run._agreed
    monkeypatch.setattr(steps_module.Run, "_agreed", lambda run, own: agreed.append(own) or asked(run, own))
    _train(images, tmp_path / "a.ckpt", steps=4)
    assert agreed == [0]
    _train(images, tmp_path / "a.ckpt", steps=4)
    assert agreed == [0, 1, 4]


def test_what_one_of_several_devices_refuses_is_an_error_without_traceback(images, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.ckpt: no checkpoint of this training .*force=true"):
        _train(images, tmp_path / "a.ckpt", devices=2, accelerator="cpu")
    assert not (tmp_path / "a.error").exists()


class Little(torch.nn.Module):
    """What is compiled in seconds."""

    spec = SPEC

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 57, 8, 8)

    def forward(self, images):
        fields = self.layer(images)
        return {"heatmaps": fields[:, :19], "pafs": fields[:, 19:]}


def test_a_compiled_network_learns_the_same(images, tmp_path, monkeypatch):
    compiled_ones, compiles = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: compiled_ones.append(network) or compiles(network, **options)
    )
    plain, expected = _train(images, tmp_path / "a.ckpt", network=Little(), steps=3, lr=1e-5)
    compiled, found = _train(images, tmp_path / "b.ckpt", network=Little(), steps=3, lr=1e-5, compile=True)
    assert compiled_ones
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="torch.compile needs a C.. compiler; install"):
        _train(images, tmp_path / "c.ckpt", network=Little(), steps=3, compile=True)


def test_training_on_a_written_shard_needs_neither_opencv_nor_numba(images, tmp_path):
    views = _views(images, tmp_path)
    script = """
import sys
from pathlib import Path
sys.modules["cv2"] = sys.modules["numba"] = None
from posepress.skeletons import COCO_17
from posepress.spec import Resolution
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.training.augment import Augmentation
from pipeline.objectives.heatmap_paf import HeatmapPafObjective
from pipeline.training.loop import Training, train
from pipeline.training.shard import Shard
from pipeline.training.views import Views
network, shard = LightweightOpenPose(stages=2, width=0.125), Shard.open(Path(sys.argv[1]))
views = Views(shard, HeatmapPafObjective(), network.spec, Resolution(64, 80), Augmentation(), 0, COCO_17)
print(train(network, views, Training(steps=2, batch_size=4, warmup=0), Path(sys.argv[2]))["steps"])
"""
    words = [sys.executable, "-c", script, str(views.shard.folder), str(tmp_path / "a.ckpt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


class Waits(LightweightOpenPose):
    def forward(self, images):
        assert float(images.mean()) < 1e9  # the device is waited for
        return super().forward(images)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def close(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4) for a, b in pairs)


@gpu
def test_recorded_steps_on_a_gpu_learn_what_steps_as_they_are_learn(images, tmp_path, capsys):
    recorded, _ = _train(images, tmp_path / "a.ckpt", accelerator="cuda")
    assert "not recorded" not in capsys.readouterr().err
    plain, _ = _train(images, tmp_path / "b.ckpt", accelerator="cuda", cuda_graph=False)
    assert close(recorded, plain)
    torch.manual_seed(0)
    waits = Waits(stages=2, width=0.125)
    train(waits, _views(images, tmp_path), _options(accelerator="cuda"), tmp_path / "c.ckpt")
    assert "steps are not recorded as a CUDA graph: this network waits" in capsys.readouterr().err
    assert close(recorded, waits)


@gpu
def test_a_shard_that_lies_on_a_gpu_teaches_what_one_on_disk_teaches(images, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr("pipeline.training.views.copied", lambda *given: moved.append(given) or copied(*given))
    there, _ = _train(images, tmp_path / "a.ckpt", accelerator="cuda", steps=40)
    assert len(moved) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 1))
    disk, _ = _train(images, tmp_path / "b.ckpt", accelerator="cuda", steps=40)
    assert len(moved) == 1
    assert close(there, disk)


@gpu
@pytest.mark.parametrize("how", ["group_lasso", "features", "labels"])
def test_everything_that_is_learnt_is_recorded_on_a_gpu(images, tmp_path, capsys, how):
    penalty = {"regularization_type": how, "kernel_regularization_factor": 0.1} if how == "group_lasso" else {}
    torch.manual_seed(7)
    teacher = LightweightOpenPose(stages=2, width=0.25) if not penalty else None
    taught = {"features": Distillation(features=1.0, layers=["features"]), "labels": Distillation()}.get(how)
    _, late = _train(images, tmp_path / "a.ckpt", teacher, taught, steps=40, accelerator="cuda", **penalty)
    assert "not recorded" not in capsys.readouterr().err
    assert late["curve"][-1][1] < late["curve"][0][1]


@gpu
def test_a_training_on_a_gpu_that_was_killed_goes_on_within_noise(images, tmp_path, monkeypatch):
    whole, _ = _train(images, tmp_path / "a.ckpt", steps=20, accelerator="cuda")
    targets, calls = HeatmapPafObjective.targets, 0

    def interrupted(self, labels, size, spec, source):
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return targets(self, labels, size, spec, source)

    monkeypatch.setattr(HeatmapPafObjective, "targets", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(images, tmp_path / "b.ckpt", steps=20, accelerator="cuda")
    monkeypatch.undo()
    resumed, _ = _train(images, tmp_path / "b.ckpt", steps=20, accelerator="cuda")
    assert close(whole, resumed)


def test_training_stops_early_and_keeps_the_best(images, tmp_path, capsys):
    tune = _views(images, tmp_path, ["tune"], augment=NONE)
    network, found = _train(images, tmp_path / "a.ckpt", steps=200, lr=0.05, patience=2, check_every=3, tune=tune)
    assert found["steps"] < 200
    assert "the loss on the tune images rises" in capsys.readouterr().err
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loss_on(network, tune, 4) == pytest.approx(state["best_loss"], rel=1e-4)
    with pytest.raises(UserError, match="stopping early needs tune images"):
        _train(images, tmp_path / "b.ckpt", patience=2)


def test_a_student_learns_its_teachers_fields(images, tmp_path):
    torch.manual_seed(7)
    teacher = LightweightOpenPose(stages=2, width=0.25)
    how = Distillation(fields=1.0, labels=0.0)
    _, early = _train(images, tmp_path / "a.ckpt", teacher, how, steps=1)
    _, late = _train(images, tmp_path / "b.ckpt", teacher, how, steps=60)
    assert set(late) & {"heatmaps", "pafs", "teacher", "features"} == {"teacher"}
    assert late["teacher"] < 0.5 * early["teacher"]
    how = Distillation(fields=1.0, features=1.0, layers=["features"])
    student, found = _train(images, tmp_path / "c.ckpt", teacher, how)
    assert {"heatmaps", "pafs", "teacher", "features"} <= set(found)
    assert list(student.state_dict()) == list(_network().state_dict()), "the adapters are thrown away"
    with pytest.raises(UserError, match=r"distillation.layers=featurs: matches no layer.*features"):
        _train(images, tmp_path / "d.ckpt", teacher, replace(how, layers=["featurs"]))


def test_images_without_labels_teach_through_the_teacher_alone(images, tmp_path):
    views = _views(images, tmp_path, ["train", "unlabelled"])
    labelled = np.asarray(views.shard.labels["labelled"])
    assert labelled.sum() == len(images.open("train"))
    assert (~labelled).sum() == len(images.open("unlabelled"))
    row = int(np.flatnonzero(~labelled)[0])
    place = next(n for n in range(len(labelled)) if _order(0, 0, len(labelled))[n] == row)
    _, targets = views.on(torch.device("cpu"), views.host(range(place, place + 1)))
    assert not targets["mask"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": -1}, "distillation.fields=-1"),
        ({"fields": 0}, "learn nothing from the teacher"),
        ({"features": 1}, "needs distillation.layers"),
    ],
)
def test_impossible_distillations_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Distillation(**options)


def test_zeros_of_sparse_weights_stay(images, tmp_path):
    network = _network()
    history = Sparse24().prune(network)
    train(network, _views(images, tmp_path), _options(), tmp_path / "a.ckpt")
    layers = dict(network.named_modules())
    assert all(is_sparse(layers[name].weight.detach().numpy()) for name, _, _ in history)
    assert not torch.equal(layers[history[0][0]].weight, dict(_network().named_modules())[history[0][0]].weight)


def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    _train(images, tmp_path / "a.ckpt", steps=4)
    before, save = (tmp_path / "a.ckpt").read_bytes(), torch.save

    def full(state, file):
        save(state, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"a\.ckpt: cannot write the checkpoint .*No space left.*The last one is kept"):
        _train(images, tmp_path / "a.ckpt", steps=8)
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_shard_without_room_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"shards: 20 training images of .* GB are free; free some"):
        _views(images, tmp_path)
    assert not [file for file in (tmp_path / "shards").iterdir() if file.suffix != ".lock"]


def test_a_disk_that_fills_while_a_shard_is_written_is_an_error(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"shards: no room for .* GB of training images there \(No space left on device\); free"
    ):
        _views(images, tmp_path)
    assert not [file for file in (tmp_path / "shards").iterdir() if file.suffix != ".lock"]


def test_a_shard_is_read_again_by_other_code(images, tmp_path, monkeypatch):
    first = _views(images, tmp_path).shard.folder
    (tmp_path / "reader.py").write_text("reads them in another way")
    monkeypatch.setattr("pipeline.training.shard.closure", lambda modules: [*closure(modules), tmp_path / "reader.py"])
    assert _views(images, tmp_path).shard.folder != first


def test_a_shard_follows_the_code_of_its_reader_and_its_objective():
    names = {
        file.stem
        for file in closure(["pipeline.training.shard", "pipeline.objectives.heatmap_paf", "pipeline.datasets.synthetic"])
    }
    assert {"coco_split", "images", "annotations", "keypoints", "shard", "truth", "geometry"} <= names


def test_a_shard_is_written_once_and_travels_as_its_folder(images, tmp_path, monkeypatch):
    first = _views(images, tmp_path).shard
    monkeypatch.setattr(Material, "_write", None)
    again = _views(images, tmp_path).shard
    assert np.array_equal(first.images, again.images)
    packed = pickle.dumps(again)
    assert len(packed) < 1000
    assert np.array_equal(pickle.loads(packed).labels["keypoints"], first.labels["keypoints"])


@pytest.mark.parametrize("option", ["steps", "batch_size", "warmup", "checkpoint_every", "accumulate", "devices", "patience"])
def test_impossible_trainings_are_refused(option):
    with pytest.raises(UserError, match=f"training.{option}=-1"):
        Training(**{option: -1})
    with pytest.raises(UserError, match="training.patience=2.5: must be"):
        Training(patience=2.5)
    with pytest.raises(UserError, match="training.lr=abc: must be a number"):
        Training(lr="abc")
    with pytest.raises(UserError, match="training.clip=0: would make every gradient 0; choose more, or null"):
        Training(clip=0)
    with pytest.raises(
        UserError, match=r"batch_size=10: cannot be shared by devices=2 x num_nodes=1 x accumulate=2.*multiple of 4"
    ):
        Training(batch_size=10, devices=2, accumulate=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [0, 1.4]}, r"augment.scale=\[0, 1.4\]: give the least and the greatest size, above 0"),
        ({"scale": [1.4, 0.6]}, r"augment.scale=\[1.4, 0.6\]"),
        ({"scale": ["a", 1]}, r"augment.scale=\['a', 1\]: give the least"),
        ({"scale": 1.0}, "augment.scale=1.0: give the least"),
        ({"scale": None}, "augment.scale=None: give the least"),
        ({"flip": "abc"}, "augment.flip=abc: not a share"),
        ({"rotate": None}, "augment.rotate=None: choose 0 or more"),
        ({"flip": 50}, "augment.flip=50: not a share of the views; choose 0 to 1"),
        ({"rotate": -1}, "augment.rotate=-1: choose 0 or more"),
        ({"shift": float("nan")}, "augment.shift=nan"),
    ],
)
def test_impossible_views_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Augmentation(**options)


def test_features_alone_are_not_learnt_on_several_devices(images, tmp_path):
    how = Distillation(fields=0, labels=0, features=1, layers=["backbone.*"])
    with pytest.raises(UserError, match="features alone leave the heads without gradients, which devices=2 x num_nodes=1"):
        _train(images, tmp_path / "a.ckpt", devices=2, accelerator="cpu", teacher=_network(), distillation=how)
    with pytest.raises(UserError, match="distillation.layers are compared with a weight of 0"):
        Distillation(layers=["backbone.*"])


def test_a_gpu_that_is_not_there_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator=cuda: no GPU is found here; choose training.accelerator=cpu"):
        _train(images, tmp_path / "a.ckpt", accelerator="cuda")


@pytest.mark.parametrize("network", [LightweightOpenPose, MobileNetV2Paf])
def test_torch_makes_the_same_input_form(network):
    images = np.random.default_rng(0).integers(0, 255, (2, 9, 14, 3), np.uint8)
    ours = normalise_torch(images, network.spec.input, torch.device("cpu"))
    assert ours.shape == (2, 3, 9, 14)
    assert np.allclose(ours.numpy(), normalise(images, network.spec.input), rtol=1e-6, atol=1e-5)

import itertools

import numpy as np
import pytest
import torch

from evaluation.pixels import frame, normalise
from evaluation.pixels_torch import normalise as normalise_torch
from evaluation.skeletons import COCO_17, OPENPOSE_18
from evaluation.types import People, Resolution, View
from evaluation.views import WholeImage, resized
from pipeline.errors import UserError
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.training.augment import Augmentation
from pipeline.training.heatmap_paf import HeatmapPafObjective, named_keypoints
from pipeline.training.loop import Training, learning_rate, train

SPEC = LightweightOpenPose.spec
SIZE = Resolution(64, 80)


def person(x=40.0, crowd=False, labelled=True):
    keypoints = np.zeros((1, 17, 3))
    if labelled:
        keypoints[0, :, 0] = x + 3 * np.array([0, 1, -1, 2, -2, 4, -4, 5, -5, 6, -6, 3, -3, 3, -3, 3, -3])
        keypoints[0, :, 1] = np.array([8, 6, 6, 7, 7, 16, 16, 24, 24, 32, 32, 34, 34, 44, 44, 54, 54])
        keypoints[0, :, 2] = 2
    return People(keypoints, np.array([[x - 20, 4, 40, 54]]), np.array([900.0]), np.array([crowd]), (None,))


def whole(size=SIZE):
    (view,) = WholeImage(None).views(size, size, SPEC.input)
    return view


def test_heatmaps_peak_at_the_keypoints_and_pafs_point_along_the_limbs():
    targets = HeatmapPafObjective().targets(person(), whole(), SPEC)
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


def test_a_mirrored_view_swaps_left_and_right():
    matrix = np.array([[-1.0, 0, 79], [0, 1, 0]])
    mirrored = View(matrix, SIZE, None, flipped=True)
    plain, seen = named_keypoints(person(), whole(), OPENPOSE_18)
    flipped, also = named_keypoints(person(), mirrored, OPENPOSE_18)
    flip = list(OPENPOSE_18.flip)
    assert np.allclose(flipped[0, flip, 0], 79 - plain[0, :, 0])
    assert (seen == also).all()
    right, left = OPENPOSE_18.names.index("right_wrist"), OPENPOSE_18.names.index("left_wrist")
    assert plain[0, right, 0] < plain[0, left, 0]
    assert flipped[0, right, 0] < flipped[0, left, 0], "in a mirrored image the person's right is still on the image's left"


def test_crowds_and_people_without_labels_do_not_count():
    objective = HeatmapPafObjective()
    for truth in (person(crowd=True, labelled=False), person(labelled=False)):
        mask = objective.targets(truth, whole(), SPEC)["mask"]
        assert mask[0, 3, 4] == 0
        assert mask[0, 3, 9] == 1
    assert objective.targets(person(), whole(), SPEC)["mask"].all()
    targets = {k: torch.from_numpy(v[None]) for k, v in objective.targets(person(labelled=False), whole(), SPEC).items()}
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
        found.append(HeatmapPafObjective().targets(truth, whole(), SPEC)["mask"][0])
    assert found[0][3:5, 3:5].sum() == found[1][3:5, 3:5].sum() == 0
    assert found[0][:, 7:].all()
    assert found[1][:, 7:].all()


def test_losses_of_all_stages_are_added():
    objective = HeatmapPafObjective()
    targets = {k: torch.from_numpy(v[None]) for k, v in objective.targets(person(), whole(), SPEC).items()}
    final = {"heatmaps": torch.zeros(1, 19, 8, 10), "pafs": torch.zeros(1, 38, 8, 10)}
    twice = {**final, "heatmaps.0": final["heatmaps"], "pafs.0": final["pafs"]}
    one, two = objective.loss(final, targets), objective.loss(twice, targets)
    assert two["pafs"] == pytest.approx(2 * float(one["pafs"]))


def test_views_stay_the_same_for_a_seed_and_vary_otherwise():
    augment = Augmentation()
    views = [augment.view(np.random.default_rng(n), Resolution(120, 160), SIZE, person()) for n in (0, 0, 1, 2, 3, 4, 5)]
    assert np.array_equal(views[0].matrix, views[1].matrix)
    assert len({v.matrix.tobytes() for v in views}) == 6
    assert {v.flipped for v in views} == {True, False}
    for view in views:
        assert (np.linalg.det(view.matrix[:, :2]) < 0) == view.flipped


def test_no_augmentation_is_a_centred_letterbox():
    augment = Augmentation(0.0, (1.0, 1.0), 0.0, 0.0, 0.0)
    view = augment.view(np.random.default_rng(0), Resolution(128, 160), SIZE, person())
    assert np.allclose(view.matrix, resized(Resolution(128, 160), (64, 80)))


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
            "workers": 0,
            "checkpoint_every": 4,
            "lr": 5e-3,
            "precision": "32-true",
            **changes,
        }
    )


def _train(images, checkpoint, **changes):
    torch.manual_seed(0)
    network = LightweightOpenPose(stages=2, width=0.125)
    found = train(network, images.open("train"), HeatmapPafObjective(), SIZE, Augmentation(), _options(**changes), checkpoint)
    return network, found


def test_training_learns(images, tmp_path):
    _, early = _train(images, tmp_path / "a.ckpt", steps=1)
    network, late = _train(images, tmp_path / "b.ckpt", steps=40)
    assert late["loss"] < 0.8 * early["loss"]
    assert not network.training


def test_an_interrupted_training_ends_as_an_uninterrupted_one(images, tmp_path, monkeypatch):
    whole_run, expected = _train(images, tmp_path / "whole.ckpt")
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
        _train(images, tmp_path / "cut.ckpt")
    monkeypatch.undo()
    resumed, found = _train(images, tmp_path / "cut.ckpt")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for name, value in whole_run.state_dict().items():
        assert torch.allclose(value.float(), resumed.state_dict()[name].float(), atol=1e-5), name


def test_a_finished_training_is_not_repeated(images, tmp_path):
    first, _ = _train(images, tmp_path / "a.ckpt")
    again, _ = _train(images, tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_l1_makes_judged_weights_smaller(images, tmp_path):
    def size(network):
        from pipeline.pruning import folded_weights, normalised

        return float(sum(w.abs().sum() for w in folded_weights(network, normalised(network))))

    plain, _ = _train(images, tmp_path / "a.ckpt", steps=20)
    sparse, _ = _train(images, tmp_path / "b.ckpt", steps=20, l1=1e-2)
    assert size(sparse) < 0.95 * size(plain)


def test_no_steps_keep_the_weights(images, tmp_path):
    network = LightweightOpenPose(stages=2, width=0.125)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    options = _options(steps=0)
    train(network, images.open("train"), HeatmapPafObjective(), SIZE, Augmentation(), options, tmp_path / "a.ckpt")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_loss_that_is_not_finite_is_reported(images, tmp_path):
    with pytest.raises(UserError, match=r"the loss is .*nan.*lower lr"):
        _train(images, tmp_path / "a.ckpt", lr=1e30, clip=1e30, steps=30)


@pytest.mark.parametrize("option", ["steps", "batch_size", "warmup", "checkpoint_every"])
def test_impossible_trainings_are_refused(option):
    with pytest.raises(UserError, match=f"{option}=-1"):
        Training(**{option: -1})


@pytest.mark.parametrize("network", [LightweightOpenPose, MobileNetV2Paf])
def test_torch_makes_the_same_input_form(network):
    images = np.random.default_rng(0).integers(0, 255, (2, 9, 14, 3), np.uint8)
    ours = normalise_torch(images, network.spec.input, torch.device("cpu"))
    assert ours.shape == (2, 3, 9, 14)
    assert np.allclose(ours.numpy(), normalise(images, network.spec.input), rtol=1e-6, atol=1e-5)

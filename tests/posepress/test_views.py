import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posepress.framing.whole_image import WholeImage
from posepress.geometry import View, cells_to_input, input_to_cells, resized
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17, OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

SPEC = InputSpec("image", multiple=16)
sizes = st.builds(Resolution, st.integers(16, 4000), st.integers(16, 4000))


@given(sizes, sizes, st.floats(-np.pi, np.pi), st.booleans())
def test_a_view_maps_there_and_back(size, to, angle, flipped):
    matrix = resized(size, (to.height, to.width))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ matrix[:, :2] @ np.diag([-1.0 if flipped else 1.0, 1.0])
    view = View(np.concatenate((linear, matrix[:, 2:]), axis=1), to, None, flipped)
    points = np.array([[0.0, 0.0], [size.width - 1.0, size.height - 1.0], [3.25, 7.5]])
    assert np.abs(view.to_image(view.to_input(points)) - points).max() < 1e-4


def test_a_resize_keeps_the_edges_of_the_image_in_place():
    view = View(resized(Resolution(10, 20), (40, 60)), Resolution(40, 60))
    edges = np.array([[-0.5, -0.5], [19.5, 9.5]])
    assert np.allclose(view.to_input(edges), [[-0.5, -0.5], [59.5, 39.5]])


def test_cells_lie_in_the_middle_of_their_pixels():
    spec = OutputSpec("heatmaps", 8, 19)
    assert np.allclose(cells_to_input(np.array([[0.0, 0.0], [1.0, 2.0]]), spec), [[3.5, 3.5], [11.5, 19.5]])
    shifted = OutputSpec("pafs", 8, 38, shift=-0.25)
    points = np.array([[5.0, 77.0]])
    assert np.abs(cells_to_input(input_to_cells(points, shifted), shifted) - points).max() < 1e-9


@given(sizes)
def test_framing_shows_the_whole_image_and_fits_the_network(size):
    resolution = Resolution(96, 128)
    corners = np.array([[-0.5, -0.5], [size.width - 0.5, size.height - 0.5]])
    for mode in (None, "pad_image_input", "adjust_network_input"):
        (view,) = WholeImage(mode).views(size, resolution, SPEC)
        assert SPEC.fits(view.size)
        found = view.to_input(corners)
        assert found.min() > -0.51
        assert found[1, 0] <= view.size.width
        assert found[1, 1] <= view.size.height
        if mode == "adjust_network_input":
            assert view.size.height == 96
        else:
            assert view.size == resolution


def test_letterbox_keeps_the_aspect():
    (view,) = WholeImage("pad_image_input").views(Resolution(100, 400), Resolution(96, 128), SPEC)
    assert view.matrix[0, 0] == pytest.approx(view.matrix[1, 1])
    assert view.matrix[0, 0] == pytest.approx(128 / 400)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="keep_aspect_ratio_mode=squash"):
        WholeImage("squash")


@pytest.mark.parametrize("text", ["", "288", "0x10", "288x", "axb", "-1x5", "288 x 384", "1e3x5"])
def test_what_is_no_resolution_is_refused(text):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        Resolution.parse(text)


@given(st.integers(1, 99999), st.integers(1, 99999))
def test_a_resolution_reads_as_it_is_written(height, width):
    assert Resolution.parse(str(Resolution(height, width))) == Resolution(height, width)


def test_networks_of_16k_plus_1_fit():
    spec = InputSpec("image", multiple=16, offset=1)
    assert spec.fits(Resolution(161, 193))
    assert not spec.fits(Resolution(160, 192))
    assert spec.fit(162) == 177


@pytest.mark.parametrize("skeleton", [COCO_17, OPENPOSE_18])
def test_skeletons_are_their_own_mirror_twice(skeleton):
    flip = np.array(skeleton.flip)
    assert (flip[flip] == np.arange(len(flip))).all()
    assert len(skeleton.sigmas) == len(skeleton.names)


def test_limbs_mirror():
    flip, signs = OPENPOSE_18.limb_flip
    assert OPENPOSE_18.limbs[flip[7]] == (5, 6)  # the right upper arm's mirror is the left one
    assert set(signs) == {1}
    flip, signs = COCO_17.limb_flip
    shoulders = COCO_17.limbs.index((5, 6))
    assert (flip[shoulders], signs[shoulders]) == (shoulders, -1)
    with pytest.raises(ValueError, match="left_a - nose has no mirror image"):
        Skeleton(("nose", "left_a", "right_a"), ((1, 0),), (0.1,) * 3).limb_flip


def test_a_description_survives_json():
    spec = NetworkSpec(SPEC, (OutputSpec("heatmaps", 8, 19),), OPENPOSE_18, frozenset({"batch"}))
    assert NetworkSpec.from_json(spec.to_json()) == spec
    for broken in ("{}", "[]", '{"input": 3}', '{"input": {"nam": 1}, "fields": [], "labels": {}}'):
        with pytest.raises(ValueError, match="not a network description"):
            NetworkSpec.from_json(broken)

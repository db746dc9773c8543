import numpy as np
import pytest

from posepress.decoders.landmarks import LandmarkDecoder
from posepress.framing.person_crops import PersonCrops
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

SIZE = Resolution(256, 256)
LABELS = Skeleton(("a", "b", "c"), (), (0.05,) * 3)
FIELDS = (
    OutputSpec("landmarks", 1, 5, -0.5, "NC"), OutputSpec("heatmaps", 4, 4, -0.5), OutputSpec("presence", 1, 1, axes="NC")
)  # fmt: skip
SPEC = NetworkSpec(InputSpec("image"), FIELDS, LABELS)


@pytest.fixture
def seen():
    """Outputs for one view whose pixels are those of the image; a fourth entry is no keypoint."""
    (view,) = PersonCrops(padding=1.0).views(SIZE, SIZE, SPEC.input, Boxes(np.array([[0.0, 0, 256, 256]])))
    landmarks = np.zeros((1, 4, 5), np.float32)
    landmarks[0, :, :2] = [[40.5, 80.5], [100, 60], [200, 220], [1, 1]]
    landmarks[0, :, 3] = [2, 0, -2, 9]
    maps = np.zeros((1, 4, 64, 64), np.float32)
    maps[0, 0, 20, 11] = maps[0, 0, 20, 12] = 0.6
    maps[0, 1, 15, 25] = 0.4
    return {"landmarks": landmarks, "heatmaps": maps, "presence": np.array([[[0.5]]], np.float32)}, [view]


def test_landmarks_are_keypoints_and_presence_is_a_factor(seen):
    fields, views = seen
    (found,) = LandmarkDecoder(SPEC, visibility=3).decode(fields, views)
    assert found.keypoints[0, :, :2] == pytest.approx(np.array([[40, 80], [99.5, 59.5], [199.5, 219.5]]), abs=1e-3)
    scores = 1 / (1 + np.exp(-np.array([2, 0, -2])))
    assert found.keypoints[0, :, 2] == pytest.approx(scores, abs=1e-6)
    assert found.scores == pytest.approx([0.5 * scores.mean()])
    (plain,) = LandmarkDecoder(SPEC).decode(fields, views)
    assert plain.keypoints[0, :, 2].tolist() == [1, 1, 1]


def test_sure_heatmaps_refine_landmarks_and_others_do_not(seen):
    fields, views = seen
    (found,) = LandmarkDecoder(SPEC, refine=7).decode(fields, views)
    assert found.keypoints[0, 0, :2] == pytest.approx([11.5 * 4 - 0.5, 20 * 4 - 0.5], abs=1e-3)
    assert found.keypoints[0, 1, :2] == pytest.approx([99.5, 59.5], abs=1e-3), "the map's greatest value is below .5"
    assert found.keypoints[0, 2, :2] == pytest.approx([199.5, 219.5], abs=1e-3)


def test_windows_at_the_edge_stay_in_the_map(seen):
    fields, views = seen
    fields["landmarks"][0, :, :2] = [[-90, 0], [0, 900], [255, 255], [1, 1]]
    fields["heatmaps"][0, 2, 63, 63] = 1
    (found,) = LandmarkDecoder(SPEC, refine=7).decode(fields, views)
    assert np.isfinite(found.keypoints).all()
    assert found.keypoints[0, 2, :2] == pytest.approx([63 * 4 - 0.5] * 2, abs=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 1, 3])
@pytest.mark.parametrize("refine", [0, 7])
def test_a_landmark_or_visibility_that_is_not_finite_costs_its_keypoint_alone(seen, value, column, refine):
    fields, views = seen
    fields["landmarks"][0, 0, column] = value
    decoder = LandmarkDecoder(SPEC, visibility=3, refine=refine)
    (found,) = decoder.decode(fields, views)
    assert found.keypoints[0, 0].tolist() == [0, 0, 0]
    assert (found.keypoints[0, 1:, 2] > 0).all()
    assert np.isfinite(found.keypoints).all()
    assert found.scores == pytest.approx([0.5 * found.keypoints[0, 1:, 2].mean()])
    assert decoder.merge([found], views).counts == {"images_not_finite": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_person_whose_presence_is_not_finite_is_left_out(seen, value):
    fields, views = seen
    fields["presence"][:] = value
    (found,) = LandmarkDecoder(SPEC).decode(fields, views)
    assert len(found.scores) == len(found.keypoints) == 0
    assert found.counts == {"images_not_finite": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_heatmaps_that_are_not_finite_leave_the_landmark_and_are_counted(seen, value):
    fields, views = seen
    decoder = LandmarkDecoder(SPEC, refine=7)
    assert decoder.decode(fields, views)[0].counts == {"images_not_finite": 0}
    fields["heatmaps"][0, 0, 20, 11] = value
    (found,) = decoder.decode(fields, views)
    assert found.keypoints[0, 0, :2] == pytest.approx([40, 80], abs=1e-3)
    assert found.counts == {"images_not_finite": 1}


def test_an_even_window_has_no_middle_and_is_refused():
    with pytest.raises(ValueError, match=r"decoder\.refine=6: a window with a middle has an odd side; choose 7, or 0 to keep"):
        LandmarkDecoder(SPEC, refine=6)
    with pytest.raises(ValueError, match=r"decoder\.refine=64: choose a whole number from 0 to 63"):
        LandmarkDecoder(SPEC, refine=64)


def test_what_does_not_fit_is_refused(seen):
    fields, views = seen
    with pytest.raises(ValueError, match="'landmarks' has 5 values an entry; x, y; decoder.visibility lies from 2 to 4"):
        LandmarkDecoder(SPEC, visibility=5)
    with pytest.raises(ValueError, match="'landmarks' has 2 entries for 3 keypoints"):
        LandmarkDecoder(SPEC).decode({**fields, "landmarks": fields["landmarks"][:, :2]}, views)
    with pytest.raises(ValueError, match="has no output 'heatmaps'"):
        LandmarkDecoder(NetworkSpec(InputSpec("image"), FIELDS[:1], LABELS), refine=7)

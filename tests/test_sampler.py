import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib_samplers.stratified import Stratified, allocate, strata


def table(persons, areas=None, keypoints=None):
    n = len(persons)
    return {
        "id": np.array([str(i) for i in range(n)]),
        "file_name": np.array([f"{i}.jpg" for i in range(n)]),
        "persons": np.array(persons),
        "area": np.array(areas if areas is not None else [5000.0] * n),
        "keypoints": np.array(keypoints if keypoints is not None else [17.0] * n),
    }


def test_strata_of_a_table_made_by_hand():
    found = strata(table([1, 2, 4, 5, 9], [100.0, 1024.0, 9215.0, 9216.0, 1e6], [1.0, 5.9, 6.0, 12.0, 17.0]))
    expected = ["1/small/few", "2-4/medium/few", "2-4/medium/some", "5+/large/most", "5+/large/most"]
    assert found.tolist() == expected


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 40), min_size=1), st.data())
def test_quotas_add_up_and_are_never_more_than_there_is(sizes, data):
    count = data.draw(st.integers(1, sum(sizes.values())))
    quota = allocate(sizes, count)
    assert sum(quota.values()) == count
    for name, size in sizes.items():
        exact = count * size / sum(sizes.values())
        assert np.floor(exact) <= quota[name] <= min(np.ceil(exact), size)


def test_quotas_are_met_and_a_seed_gives_one_choice():
    data = table([1] * 50 + [3] * 30 + [7] * 20)
    chosen = Stratified(20, seed=3).sample(data)
    assert {n.split("/")[0]: q["met"] for n, q in chosen.quotas.items()} == {"1": 10, "2-4": 6, "5+": 4}
    assert all(q["asked"] == q["met"] for q in chosen.quotas.values())
    assert len(set(chosen.ids)) == 20
    assert chosen.digest == Stratified(20, seed=3).sample(data).digest
    assert chosen.ids != Stratified(20, seed=4).sample(data).ids


def test_images_with_few_people_or_keypoints_are_not_eligible():
    data = table([0, 1, 2, 3], keypoints=[0.0, 3.0, 17.0, 17.0])
    assert Stratified(3).sample(data).ids == ("1", "2", "3")
    assert Stratified(2, min_kpts_per_person=5).sample(data).ids == ("2", "3")
    assert Stratified(1, min_persons_per_image=3).sample(data).ids == ("3",)


def test_too_few_images_are_an_error_that_lists_the_strata():
    with pytest.raises(ValueError, match=r"num_images=9: only 3 images are eligible \(1/medium/most: 2, 2-4/medium/most: 1\)"):
        Stratified(9).sample(table([1, 1, 3, 0], keypoints=[17.0, 17.0, 17.0, 0.0]))
    with pytest.raises(ValueError, match="num_images=0"):
        Stratified(0)

"""results.zip with members of any name, size and content, and any bytes: taken in, or refused by one plain error."""

import io
import zipfile
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.deploy import results_zip
from posepress.errors import UserError
from tests.device_results import BUILD, EVALUATE, local, packed

PARTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["build", "evaluate", "benchmark", "..", ".", "", "/", "a", "manifest.json", "C:", "\\", "package.json"]),
)
NAMES = st.one_of(st.lists(PARTS, max_size=5).map("/".join), st.sampled_from([f"{BUILD}/x", f"{EVALUATE}/pictures/2.jpg"]))
BLOBS = st.one_of(st.binary(max_size=50), st.integers(0, 1 << 22).map(bytes), st.sampled_from([b"[" * 10_000, b"{}", b"null"]))
MEMBERS = st.lists(
    st.tuples(NAMES, BLOBS, st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])), max_size=4
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "inside"
    folder.mkdir()
    return folder, local(folder)


def tried(home, file):
    """Unpack a file: everything that appears lies in the folder for it; refused or not, there is no other error."""
    folder, results = home
    before = {path for path in folder.parent.rglob("*") if not path.is_relative_to(folder / "unpacked")}
    try:
        found = results_zip.unpack(file, results, folder / "unpacked")
    except UserError as error:
        assert str(error).startswith(f"results={file}: ")
        found = None
    after = {path for path in folder.parent.rglob("*") if not path.is_relative_to(folder / "unpacked")}
    assert after == before
    unpacked = sum(path.stat().st_size for path in (folder / "unpacked").rglob("*") if path.is_file())
    assert unpacked <= 1 << 24
    return found


@settings(deadline=None)
@given(MEMBERS, st.booleans())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members(home, members, listed):
    folder, results = home
    file = folder / "results.zip"

    def listing(about):
        about["files"].update({name: sha256(blob).hexdigest() for name, blob, _ in members})

    packed(results, file, **({"listing": listing} if listed else {}))
    with zipfile.ZipFile(file, "a") as archive:
        for name, blob, kind in members:
            archive.writestr(zipfile.ZipInfo(name) if name else "x", blob, kind)
    found = tried(home, file)
    assert found is None or len(found.manifests) == 3


@settings(deadline=None)
@given(st.data())
def test_bytes(home, data):
    folder, results = home
    file = folder / "results.zip"
    blob = bytearray(packed(results, file).read_bytes())
    ends = [at for at in range(len(blob) - 3) if blob[at : at + 2] == b"PK"]  # the headers, where sizes and offsets are
    at = st.one_of(
        st.integers(0, len(blob) - 1), st.sampled_from(ends).flatmap(lambda n: st.integers(n, min(n + 45, len(blob) - 1)))
    )
    for place, value in data.draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=6)):
        blob[place] = value
    cut = data.draw(st.one_of(st.just(len(blob)), st.integers(0, len(blob))))
    file.write_bytes(bytes(blob[:cut]) + data.draw(st.binary(max_size=30)))
    tried(home, file)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(home, blob):
    file = home[0] / "results.zip"
    for content in (blob, b"PK\5\6" + blob, b"PK\3\4" + blob + b"PK\5\6" + bytes(18)):
        file.write_bytes(content)
        assert tried(home, file) is None


def test_the_untouched_one_is_taken_in(home):
    folder, results = home
    assert tried(home, packed(results, folder / "results.zip")) is not None
    assert zipfile.is_zipfile(io.BytesIO((folder / "results.zip").read_bytes()))

"""An audit names what is wrong, the first ten of a kind and how many there are; features are audited where a network
takes features.
"""

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("h5py")

from benchmarks.tal import features
from benchmarks.tal.annotations import Annotations, Fault, Segment, Video
from benchmarks.tal.audit import Audit, audit_features, of_annotations
from benchmarks.tal.features import Extraction


def annotated(*names, fps=None):
    return Annotations(tuple(Video(name, "test", 40.0, (Segment(0.0, 1.0, 0),), fps) for name in names), ("a", "b"))


def test_of_each_kind_ten_are_named_and_all_are_counted():
    missing = tuple(f"m{i}" for i in range(25))
    faulty = {f"f{i}": f"f{i}.mp4: no" for i in range(12)}
    lengths = {f"l{i}": (1.0, 9.0) for i in range(11)}
    said = str(Audit({}, missing, faulty, lengths, dict.fromkeys(faulty, "corrupt"))).splitlines()
    assert said[0] == "0 videos can be read, 25 are missing, 12 are corrupt or truncated"
    assert said[1:12] == [*(f"  missing: m{i}" for i in range(10)), "  missing: and 15 more"]
    assert said[12:23] == [*(f"  corrupt: f{i}.mp4: no" for i in range(10)), "  corrupt: and 2 more"]
    assert said[23:] == [
        *(f"  length: l{i}: the file has 1.00 s, the annotation 9.00 s" for i in range(10)),
        "  length: and 1 more",
    ]


def test_features_are_held_against_what_a_network_takes(tmp_path):
    good = np.zeros((247, 5), np.float32)  # (40 s x 25 frames - 16) / 4 + 1
    bad = good.copy()
    bad[3, 2] = np.inf
    arrays = {"good": good, "v_nan": bad, "wide": np.zeros((247, 6)), "transposed": good.T, "short": good[:200]}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    (tmp_path / "broken.npy").write_bytes(b"no")
    source = features.Source(tmp_path, features.find(tmp_path).entries, channels=5)
    videos = annotated("good", "nan", "wide", "v_transposed", "short", "broken", "absent", fps=25.0)
    found = audit_features(videos, source, Extraction(stride=4, snippet=16), progress=False)
    assert sorted(found.found) == ["good", "short"]
    assert found.missing == ("absent",)
    assert found.kinds == {"nan": "not finite", "wide": "width", "v_transposed": "transposed", "broken": "unreadable"}
    assert found.lengths == {"short": (pytest.approx(32.48), 40.0)}
    said = str(found)
    assert "2 videos can be read, 1 are missing, 4 are not as they should be" in said
    assert "transposed.npy: it is transposed: it has shape (5, 247); expected (rows, 5)" in said
    assert audit_features(videos, source, None, progress=False).lengths == {}


def test_faults_of_annotations_are_counted_by_kind_and_classes_of_one_subset_are_named():
    faults = [Fault("outside", f"video {i}", "x") for i in range(12)] + [Fault("duration", "video y", "z")]
    training, test = annotated("a"), Annotations((Video("b", "test", 9.0, (Segment(0, 1, 1),)),), ("a", "b"))
    said = of_annotations(faults, training, test)
    assert said[0] == "annotations: 12 x outside"
    assert said[11:14] == ["  and 2 more", "annotations: 1 x duration", "  video y: z"]
    assert said[14:] == [
        "annotations: 1 classes of test videos have no action in training videos",
        "  'b'",
        "annotations: 1 classes of training videos have no action in test videos",
        "  'a'",
    ]
    assert of_annotations([], training, training) == ["annotations: no fault"]

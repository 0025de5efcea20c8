"""Annotations: what is read, and every fault by file, video and place."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tal import annotations
from benchmarks.tal.annotations import AnnotationError, AnnotationWarning, Segment, read

DATA = os.environ.get("REVWIRE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs published annotations: set REVWIRE_DATA")


def video(subset="training", duration=10.0, annotations=()):
    return {"subset": subset, "duration": duration, "annotations": list(annotations)}


def action(label="jump", start=1.0, end=2.0):
    return {"label": label, "segment": [start, end]}


def write(folder, database):
    path = folder / "a.json"
    path.write_text(json.dumps({"database": database}))
    return path


def test_videos_segments_and_classes_are_read(tmp_path):
    path = write(
        tmp_path, {"b": video(annotations=[action("run", 0, 3), action("jump", "4.5", "10")]), "a": video("Validation")}
    )
    found = read(path)
    assert found.classes == ("jump", "run")
    assert [v.id for v in found.videos] == ["b", "a"]
    assert found.videos[0].segments == (Segment(0.0, 3.0, 1), Segment(4.5, 10.0, 0))
    assert found.subsets == ("training", "validation")
    assert [v.id for v in found.subset("Validation").videos] == ["a"]
    assert [v.id for v in found.only({"b"}).videos] == ["b"]
    assert found.by_id["b"] is found.videos[0]


def test_given_classes_order_the_labels(tmp_path):
    found = read(write(tmp_path, {"a": video(annotations=[action("jump")])}), classes=["run", "jump"])
    assert found.classes == ("run", "jump")
    assert found.videos[0].segments[0].label == 1


def test_class_agnostic_has_one_class(tmp_path):
    found = read(write(tmp_path, {"a": video(annotations=[action("jump"), action("run", 3, 4)])})).class_agnostic()
    assert found.classes == ("action",)
    assert found.videos[0].segments == (Segment(1, 2, 0), Segment(3, 4, 0))


def test_doubtful_moments_are_no_class(tmp_path):
    found = read(write(tmp_path, {"a": video(annotations=[action("Ambiguous"), action("run")])}))
    assert found.classes == ("run",)
    assert len(found.videos[0].segments) == 1


def test_an_empty_subset_is_said(tmp_path):
    with pytest.raises(ValueError, match="no video is in subset 'validation'; there are 'training'"):
        read(write(tmp_path, {"a": video()})).subset("validation")


FAULTS = {
    "unknown subset": (video("bogus"), r"video 'x': unknown subset 'bogus'; expected one of"),
    "unknown label": (video(annotations=[action(7)]), r"video 'x', annotation 0: unknown label 7"),
    "outside": (
        video(annotations=[action(), action(end=12.0)]),
        r"video 'x', annotation 1: \[1, 12\] s lies outside its video of 10 s",
    ),
    "before": (video(annotations=[action(start=-1.0)]), r"video 'x', annotation 0: \[-1, 2\] s lies outside"),
    "order": (video(annotations=[action(start=3.0)]), r"video 'x', annotation 0: it starts at 3 s and ends at 2 s"),
    "empty": (video(annotations=[action(start=2.0)]), r"annotation 0: it starts at 2 s and ends at 2 s"),
    "no duration": ({"subset": "training", "annotations": []}, r"video 'x': it has no 'duration'"),
    "two fields": ({"duration": 1}, r"video 'x': it has no 'subset' and no 'annotations'"),
    "no label": (
        video(annotations=[{"segment": [1, 2]}]),
        r"annotation 0: expected an object with 'label' and 'segment'",
    ),
    "no end": (
        video(annotations=[{"label": "a", "segment": [1]}]),
        r"annotation 0: its segment is \[1\]; expected \[start, end\]",
    ),
    "word": (video(annotations=[{"label": "a", "segment": [1, "two"]}]), r"its segment is \[1, 'two'\]"),
    "nan": (video(annotations=[{"label": "a", "segment": [1, float("nan")]}]), r"its segment is \[1, nan\]"),
    "duration": (video(duration=-3), r"video 'x': its duration is -3; expected seconds above 0"),
    "flag": (video(duration=True), r"video 'x': its duration is True"),
    "annotations": ({**video(), "annotations": {}}, r"video 'x': its annotations are {}; expected a list"),
    "entry": ([], r"video 'x': expected an object, got \[\]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_and_video(tmp_path, name):
    entry, message = FAULTS[name]
    path = write(tmp_path, {"good": video(annotations=[action()]), "x": entry})
    with pytest.raises(AnnotationError, match=re.escape(str(path)) + ".*" + message):
        read(path)


@pytest.mark.parametrize("name", FAULTS)
def test_lenient_counts_it_and_keeps_the_rest(tmp_path, name):
    path = write(tmp_path, {"x": FAULTS[name][0], "good": video(annotations=[action()])})
    with pytest.warns(AnnotationWarning, match=r"passed over 1 faults \(1 .*\); first: video 'x'"):
        found = read(path, lenient=True)
    assert found.by_id["good"].segments == (Segment(1.0, 2.0, found.classes.index("jump")),)


def test_an_unknown_label_of_given_classes(tmp_path):
    path = write(tmp_path, {"x": video(annotations=[action("swim")])})
    with pytest.raises(AnnotationError, match="video 'x', annotation 0: unknown label 'swim'"):
        read(path, classes=["jump"])


@pytest.mark.parametrize("lenient", [False, True])
def test_a_misspelt_label_is_no_new_class(tmp_path, lenient):
    path = write(tmp_path, {"x": video(annotations=[action("jmup"), action("run")])})
    with pytest.raises(AnnotationError, match="annotation 0: unknown label 'jmup'; did you mean 'jump'"):
        read(path, classes=["run", "jump"], lenient=lenient)
    assert read(path, lenient=lenient).classes == ("jmup", "run")


def test_frames_per_second_are_counted_or_said(tmp_path):
    entries = {"a": {"fps": 25}, "b": {"fps": 30, "frame": 299}, "c": {"frames": 100}, "d": {"fps": 0}, "e": {}}
    found = read(write(tmp_path, {name: {**video(), **entry} for name, entry in entries.items()}))
    assert [v.fps for v in found.videos] == [25, 29.9, 10, None, None]


def test_ids_are_the_same_with_and_without_their_prefix(tmp_path):
    found = read(write(tmp_path, {"v_a": video(), "b": video()}))
    assert [v.id for v in found.only({"a", "v_b"}).videos] == ["v_a", "b"]
    assert found.video("a") is found.videos[0]
    assert found.video("v_b") is found.videos[1]
    assert found.video("c") is None


def test_lenient_keeps_the_times_of_the_file(tmp_path):
    path = write(tmp_path, {"x": video(annotations=[action(start=8, end=12), action(start=11, end=12)])})
    with pytest.warns(AnnotationWarning, match=r"2 outside"):
        assert read(path, lenient=True).videos[0].segments == (Segment(8, 12, 0), Segment(11, 12, 0))


def test_rounding_is_no_fault(tmp_path):
    found = read(write(tmp_path, {"x": video(annotations=[action(end=10.008)])}))
    assert found.videos[0].segments[0].end == 10.008


@pytest.mark.parametrize("again", ["x", "v_x"])
def test_a_video_that_comes_twice(tmp_path, again):
    path = tmp_path / "a.json"
    first, second = (json.dumps({key: value})[1:-1] for key, value in (("x", video()), (again, video("validation"))))
    path.write_text(f'{{"database": {{{first}, {second}}}}}')
    with pytest.raises(AnnotationError, match=f"video '{again}': it is there already, as 'x'"):
        read(path)
    with pytest.warns(AnnotationWarning, match="1 duplicate video"):
        assert [v.subset for v in read(path, lenient=True).videos] == ["training"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is not JSON"),
        ("[]", "'database'"),
        ('{"database": []}', "'database'"),
        ('{"database": {}}', "holds no video"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_another_file_altogether(tmp_path, text, message, lenient):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read(path, lenient=lenient)


def test_many_faults_are_counted(tmp_path):
    path = write(tmp_path, {f"x{i}": video("bogus") for i in range(15)})
    with pytest.raises(AnnotationError, match=r"15 faults\n(.*\n)+  and 5 more") as raised:
        read(path)
    assert len(raised.value.faults) == 15


times = st.floats(-5, 30, allow_nan=False)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), times, times), max_size=6), st.floats(1, 20))
def test_what_has_length_is_read_and_what_lies_outside_is_counted(tmp_path_factory, items, duration):
    path = write(
        tmp_path_factory.mktemp("a"), {"x": video(duration=duration, annotations=[action(*item) for item in items])}
    )
    found, faults = annotations.parse(path)
    good = [item for item in items if item[1] < item[2]]
    assert [(found.classes[s.label], s.start, s.end) for s in found.videos[0].segments] == good
    outside = [item for item in good if item[1] < 0 or item[2] > duration + annotations.ROUNDING]
    assert [f.kind for f in faults].count("outside") == len(outside)
    assert len(faults) == len(outside) + len(items) - len(good)


def test_a_list_of_classes_may_have_a_heading(tmp_path):
    for text in ("action\nb\na\n", "b\na"):
        (tmp_path / "c.csv").write_text(text)
        assert annotations.read_classes(tmp_path / "c.csv") == ("b", "a")


@needs_data
def test_published_files():
    root = Path(DATA)
    anet, faults = annotations.parse(root / "activitynet13/activity_net.v1-3.rebuilt.json")
    assert {name: len(anet.subset(name).videos) for name in anet.subsets} == {
        "training": 10024,
        "validation": 4926,
        "testing": 5044,
    }
    assert sum(len(v.segments) for v in anet.videos) == 15410 + 7654 - sum(f.kind == "end before start" for f in faults)
    assert set(anet.classes) == set(annotations.read_classes(root / "activitynet13/action_name.csv"))
    thumos, faults = annotations.parse(root / "thumos14/thumos14.json")
    assert len(thumos.classes) == 20
    assert [len(thumos.subset(name).videos) for name in ("validation", "test")] == [200, 212]
    assert {f.kind for f in faults} == {"outside"}
    assert any("video_test_0000270" in f.where for f in faults)  # its duration is wrong in the published file

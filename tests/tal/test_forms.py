"""Annotations as data sets publish them: small files of each form, written by hand from their documentation."""

import json

import numpy as np
import pytest

from benchmarks.tal import loading
from benchmarks.tal.annotations import AnnotationError, Segment
from benchmarks.tal.evaluation import evaluate
from benchmarks.tal.forms import FORMS

pytest.importorskip("lightning")

EPIC = {
    "EPIC_100_train.csv": "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open door,open,1,door,0,\"['door']\",[0]\n"
    "P01_01_1,P01,P01_01,00:00:02.629,01:01:02.50,01:01:06.17,8,202,turn on tap,turn-on,0,tap,1,\"['tap']\",[1]\n",
    "EPIC_100_validation.csv": "narration_id,video_id,start_timestamp,stop_timestamp,verb,verb_class,noun,noun_class\n"
    "P02_01_0,P02_01,00:00:00.00,00:00:01.89,opens,1,door,0\n",
    "EPIC_100_test_timestamps.csv": "narration_id,video_id,start_timestamp,stop_timestamp\n"
    "P03_01_0,P03_01,00:00:00.00,00:00:01.89\n",
    "EPIC_100_video_info.csv": "video_id,duration,fps,resolution\nP01_01,4000.5,59.94,1920x1080\n"
    "P02_01,502.134967,50.0,1920x1080\nP03_01,9.0,50.0,1920x1080\n",
    "EPIC_100_verb_classes.csv": "id,key,category\n0,turn-on,access\n1,open,access\n",
    "EPIC_100_noun_classes.csv": "id,key,category\n0,door,furniture\n1,tap,appliances\n",
}


def _clip(name, labels, start=100.0):
    times = {"video_start_sec": start, "video_end_sec": start + 480.0, "clip_start_sec": 0.0}
    return {
        "clip_uid": name,
        **times,
        "video_start_frame": int(start * 30),
        "video_end_frame": int(start * 30) + 14400,
        "annotations": [{"annotator_uid": "a", "labels": labels}],
    }


def _moment(start, end, label, primary=True):
    own = {"start_time": start - 100.0, "end_time": end - 100.0}
    return {**own, "video_start_time": start, "video_end_time": end, "label": label, "primary": primary}


def _ego4d(subset, *clips):
    return json.dumps({"version": "1", "date": "d", "videos": [{"video_uid": "v", "split": subset, "clips": clips}]})


EGO4D = {
    "moments_train.json": _ego4d(
        "train",
        _clip("one", [_moment(110.5, 130.0, "wash_dishes"), _moment(120.0, 125.0, "other", primary=False)]),
        _clip("none", [_moment(110.0, 130.0, "other", primary=False)]),
    ),
    "moments_val.json": _ego4d("val", _clip("two", [_moment(100.0, 101.0, "read_a_book")])),
    "moments_test_unannotated.json": _ego4d(
        "test", {k: v for k, v in _clip("three", []).items() if k != "annotations"}
    ),
}

MULTITHUMOS = {
    "class_list.txt": "1 BaseballPitch\n2 BasketballDunk\n3 Walk\n",
    "annotations/BaseballPitch.txt": "video_validation_0000266 72.8 76.4\nvideo_test_0000004 1.0 2.0\n",
    "annotations/Walk.txt": "video_test_0000004 0.0 9.5\n",
    "readme.txt": "Annotations are provided in the same format as THUMOS.\n",
}

THUMOS = {
    "validation/BaseballPitch_val.txt": "video_validation_0000266 72.8 76.4\n",
    "test/BaseballPitch_test.txt": "video_test_0000004 1.0 2.0\n",
    "test/Ambiguous_test.txt": "video_test_0000004 3.0 4.0\n",
}

CHARADES = {
    "Charades_v1_classes.txt": "c000 Holding some clothes\nc001 Putting clothes somewhere\nc002 Sitting in a chair\n",
    "Charades_v1_train.csv": "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    '46GP8,HR43,Kitchen,6,7,Yes,"A person, standing",food,"d;e",c002 11.90 21.20;c000 0.00 12.60,24.83\n',
    "Charades_v1_test.csv": "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    "YSKX3,HR43,Kitchen,6,7,Yes,a,food,d,,30.00\nN11GT,HR43,Kitchen,6,7,Yes,a,food,d,c001 1.00 31.00,30.00\n",
}


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def truth(folder, configuration, files, *overrides):
    from benchmarks.tal.config import load

    written(folder, files)
    return loading.truth(load(configuration, [f"data.annotations={folder}", *overrides]), quietly=True)


def test_verbs_and_nouns_of_epic_kitchens(tmp_path):
    verbs = truth(tmp_path, "epic_kitchens_100", EPIC)
    assert verbs.classes == ("turn-on", "open")
    (video,) = verbs.training.videos
    assert (video.id, video.duration, video.fps) == ("P01_01", 4000.5, 59.94)
    assert video.segments == (Segment(0.14, 3.37, 1), Segment(3662.5, 3666.17, 0))
    assert [v.id for v in verbs.test.videos] == ["P02_01"]
    assert [v.id for v in verbs.whole.subset("testing").videos] == ["P03_01"]
    nouns = truth(tmp_path, "epic_kitchens_100_slowfast_noun_actionformer", EPIC)
    assert nouns.classes == ("door", "tap")
    assert nouns.training.videos[0].segments == (Segment(0.14, 3.37, 0), Segment(3662.5, 3666.17, 1))
    pairs = truth(tmp_path, "epic_kitchens_100", EPIC, "data.form=epic_action")
    assert pairs.classes == ("0,1", "1,0")


def test_primary_moments_of_ego4d_at_the_times_of_their_clips(tmp_path):
    found = truth(tmp_path, "ego4d_mq", EGO4D)
    (video,) = found.training.videos
    assert (video.id, video.duration, video.fps) == ("one", 480.0, 30.0)
    assert video.segments == (Segment(10.5, 30.0, found.classes.index("wash_dishes")),)
    assert found.classes == ("read_a_book", "wash_dishes")
    assert [v.id for v in found.test.videos] == ["two"]
    assert [v.id for v in found.whole.subset("testing").videos] == ["three"]


def test_multithumos_takes_its_lengths_from_thumos(tmp_path):
    video = {"subset": "validation", "duration": 120.0, "fps": 25, "annotations": []}
    (tmp_path / "lengths.json").write_text(json.dumps({"database": {"video_validation_0000266": video}}))
    folder = tmp_path / "multithumos"
    found = truth(folder, "multithumos", MULTITHUMOS, f"data.lengths={tmp_path / 'lengths.json'}")
    assert found.classes == ("BaseballPitch", "BasketballDunk", "Walk")
    (trained,) = found.training.videos
    assert (trained.duration, trained.fps, trained.segments) == (120.0, 25.0, (Segment(72.8, 76.4, 0),))
    (tested,) = found.test.videos
    assert np.isinf(tested.duration)
    assert tested.segments == (Segment(1.0, 2.0, 0), Segment(0.0, 9.5, 2))


def test_thumos_as_text_has_ambiguous_moments(tmp_path):
    found = truth(tmp_path, "thumos14", THUMOS, "data.form=thumos")
    (tested,) = found.test.videos
    assert (tested.segments, tested.doubtful) == ((Segment(1.0, 2.0, 1 - 1),), ((3.0, 4.0),))
    assert len(found.classes) == 20  # as the configuration has them


def test_actions_of_charades(tmp_path):
    found = truth(tmp_path, "charades", CHARADES)
    assert found.classes == ("Holding some clothes", "Putting clothes somewhere", "Sitting in a chair")
    (video,) = found.training.videos
    assert (video.id, video.duration) == ("46GP8", 24.83)
    assert video.segments == (Segment(11.9, 21.2, 2), Segment(0.0, 12.6, 0))
    assert [(v.id, len(v.segments)) for v in found.test.videos] == [("YSKX3", 0), ("N11GT", 1)]
    assert [fault.kind for fault in found.faults] == ["outside"]


@pytest.mark.parametrize("name", ["hacs", "fineaction"])
def test_hacs_and_fineaction_are_in_activitynets_form(tmp_path, name):
    database = {
        "a": {"subset": "training", "duration": "9.5", "annotations": [{"label": "Diving", "segment": [5.4, 9.5]}]},
        "v_00000001": {"subset": "validation", "duration": 8, "annotations": [{"label": "Diving", "segment": [0, 1]}]},
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"database": database}))
    found = loading.truth(_load(name, f"data.annotations={path}"))
    assert found.training.videos[0].segments == (Segment(5.4, 9.5, 0),)
    assert found.classes == ("Diving",)


def _load(*arguments):
    from benchmarks.tal.config import load

    return load(arguments[0], list(arguments[1:]))


PROTOCOLS = {
    "epic_kitchens_100": ((0.1, 0.5, 5), []),
    "ego4d_mq": ((0.1, 0.5, 5), [1, 5]),
    "hacs": ((0.5, 0.95, 10), []),
    "fineaction": ((0.5, 0.95, 10), []),
    "multithumos": ((0.1, 0.9, 9), []),
    "charades": ((0.1, 0.9, 9), []),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_data_set_is_scored_by_its_protocol(name):
    config = _load(name)
    assert (tuple(np.linspace(*PROTOCOLS[name][0]).round(2)), PROTOCOLS[name][1]) == (
        tuple(config.thresholds),
        config.recall,
    )


def test_what_the_data_set_says_is_right_scores_a_hundred(tmp_path):
    for name, files in (("epic_kitchens_100", EPIC), ("ego4d_mq", EGO4D), ("charades", CHARADES)):
        found = truth(tmp_path / name, name, files)
        results = {
            v.id: [{"label": found.classes[s.label], "segment": [s.start, s.end], "score": 0.5} for s in v.segments]
            for v in found.test.videos
        }
        assert evaluate(found.test, results, _load(name).thresholds).average == 1.0


WRONG = {
    "epic_verb": ({**EPIC, "EPIC_100_train.csv": "video_id,start_timestamp\nP01,0\n"}, "no column 'stop_timestamp', "),
    "epic_noun": ({k: v for k, v in EPIC.items() if "noun" not in k}, "EPIC_100_noun_classes.csv: it cannot be read"),
    "epic_action": ({**EPIC, "EPIC_100_video_info.csv": "a\n1\n"}, "no column 'video_id', 'duration'"),
    "ego4d_mq": ({**EGO4D, "moments_val.json": '{"videos": [{"clip": []}]}'}, "expected 'videos' that hold 'clips'"),
    "thumos": ({"Walk.txt": "video_test_0000004 1.0\n"}, "line 1: expected video_validation_N or video_test_N, and a"),
    "charades": (
        {**CHARADES, "Charades_v1_test.csv": "id,actions,length\nA,c009 1 2,3\n"},
        "video 'A': expected a class of Charades_v1_classes.txt, a start and an end in seconds; got 'c009 1 2'",
    ),
}


@pytest.mark.parametrize("form", WRONG)
def test_files_of_another_form_are_named(tmp_path, form):
    files, message = WRONG[form]
    with pytest.raises(AnnotationError) as error:
        FORMS[form](written(tmp_path, files))
    assert message in str(error.value)


def test_every_form_of_the_schema_has_a_reader():
    from typing import get_args

    from benchmarks.tal.schema import Form

    assert {*FORMS, "activitynet"} == set(get_args(Form))
    assert {*WRONG} == {*FORMS}

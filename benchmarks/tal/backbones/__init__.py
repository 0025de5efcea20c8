"""Video backbones, written or taken as ordinary modules; `revwire.convert` makes them reversible."""

from benchmarks.tal.backbones.backbone import Backbone as Backbone
from benchmarks.tal.backbones.published import load_published as load_published
from benchmarks.tal.backbones.published import network_of as network_of
from benchmarks.tal.backbones.slowfast import SlowFast as SlowFast
from benchmarks.tal.backbones.video_mae import VideoMAE as VideoMAE
from benchmarks.tal.backbones.video_swin import VideoSwin as VideoSwin
from benchmarks.tal.backbones.zoo import NETWORKS as NETWORKS

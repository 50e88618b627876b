"""Small networks in the layouts of TSM, mmaction2 and TSAM, written anew, and ours for their weights."""

import functools

import torch
import torchvision
from torch import nn

import tsm_jit
from tsm_jit import checkpoints

FRAMES, SEGMENTS = 8, 4


class Around(nn.Module):
    """A shift in PyTorch around a module of any name."""

    def __init__(self, name, module, segments=SEGMENTS, keep=False):
        super().__init__()
        self.add_module(name, module)
        self.name, self.segments, self.keep = name, segments, keep

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.segments))
        fold = clips.shape[2] // 8
        out = clips.clone() if self.keep else torch.zeros_like(clips)
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        return getattr(self, self.name)(out.flatten(0, 1))


class Pool(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        clips = x.unflatten(0, (-1, SEGMENTS)).transpose(1, 2)
        clips = nn.functional.max_pool3d(clips, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        return self.net(clips.transpose(1, 2).flatten(0, 1))


class TSN(nn.Module):
    """TSM's: `base_model`, its `fc` a dropout, and `new_fc`."""

    def __init__(self, base_model, head):
        super().__init__()
        features = getattr(base_model, head).in_features if head == "fc" else base_model.classifier[-1].in_features
        setattr(base_model, head, nn.Dropout(0.5))
        self.base_model = base_model
        self.new_fc = nn.Linear(features, 5)

    def forward(self, x):
        return self.new_fc(self.base_model(x))


def stages(net):
    return [getattr(net, f"layer{i}") for i in (1, 2, 3, 4)]


def tsm(name="resnet18", place="blockres", pool=False):
    net = getattr(torchvision.models, name)(num_classes=5)
    every = 2 if name == "resnet101" else 1
    for number, stage in enumerate(stages(net)):
        segments = SEGMENTS // 2 if pool and number else SEGMENTS
        for i, block in enumerate(stage):
            if place == "block":
                stage[i] = Around("net", block, segments)
            elif i % every == 0:
                block.conv1 = Around("net", block.conv1, segments)
    if pool:
        net.layer2 = Pool(net.layer2)
    return TSN(net, "fc")


class ConvModule(nn.Sequential):
    """mmaction2's: a convolution and its normalisation, `conv` and `bn`."""

    def __init__(self, conv, bn):
        super().__init__()
        self.add_module("conv", conv)
        self.add_module("bn", bn)


class RecognizerBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv1 = ConvModule(Around("net", block.conv1), block.bn1)
        self.conv2 = ConvModule(block.conv2, block.bn2)
        if block.downsample is not None:
            self.downsample = ConvModule(*block.downsample)

    def forward(self, x):
        skip = self.downsample(x) if hasattr(self, "downsample") else x
        return (self.conv2(self.conv1(x).relu()) + skip).relu()


class Recognizer(nn.Module):
    """mmaction2's, of a ResNet of basic blocks."""

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet18()
        self.backbone = nn.Module()
        self.backbone.conv1 = ConvModule(net.conv1, net.bn1)
        for i, stage in enumerate(stages(net), 1):
            self.backbone.add_module(f"layer{i}", nn.Sequential(*map(RecognizerBlock, stage)))
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(512, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.backbone.conv1(x).relu(), 3, 2, 1)
        for stage in stages(self.backbone):
            x = stage(x)
        return self.cls_head.fc_cls(x.mean((2, 3)))


class TSAM(nn.Module):
    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet18()
        for stage in stages(net):
            for block in stage:
                block.conv1 = Around("layer", block.conv1, keep=True)
        net.fc = nn.Identity()
        self.nn_backbone = nn.Module()
        self.nn_backbone.base_model = net
        self.last_fc = nn.Linear(512, 5)

    def forward(self, x):
        return self.last_fc(self.nn_backbone.base_model(x))


def flat_mobilenet():
    """TSM's MobileNetV2: the layers of a block in one list."""
    net = torchvision.models.mobilenet_v2(num_classes=5)
    for block in list(net.features)[1:-1]:
        flat = nn.Sequential(
            *(inner for layer in block.conv for inner in (layer if len(list(layer.children())) else [layer]))
        )
        if len(flat) == 8 and block.use_res_connect:
            flat[0] = Around("net", flat[0])
        block.conv = flat
    return net


def mobilenet_of_tsm():
    return TSN(flat_mobilenet(), "classifier")


def online_demo():
    """TSM's demo: the last layer alone, and all at the top of the names. Its shifts leave no trace in the names."""
    net = flat_mobilenet()
    net.classifier = net.classifier[1]
    return net


class MobileRecognizer(nn.Module):
    """mmaction2's, of a MobileNetV2: blocks by stage, shifts around a convolution and its normalisation."""

    def __init__(self):
        super().__init__()
        first, *blocks, last = torchvision.models.mobilenet_v2().features
        self.backbone = nn.Module()
        self.backbone.conv1 = ConvModule(first[0], first[1])
        for number, length in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
            stage, blocks = blocks[:length], blocks[length:]
            for block in stage:
                *lists, conv, norm = block.conv
                modules = [ConvModule(each[0], each[1]) for each in lists] + [ConvModule(conv, norm)]
                if len(modules) == 3 and block.use_res_connect:
                    modules[0] = Around("net", modules[0])
                block.conv = nn.Sequential(*modules)
            self.backbone.add_module(f"layer{number}", nn.Sequential(*stage))
        self.backbone.conv2 = ConvModule(last[0], last[1])
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(1280, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.backbone.conv1(x))
        for number in range(1, 8):
            for block in getattr(self.backbone, f"layer{number}"):
                out = x
                for i, module in enumerate(block.conv, 1):
                    out = module(out) if i == len(block.conv) else nn.functional.relu6(module(out))
                x = x + out if block.use_res_connect else out
        x = nn.functional.relu6(self.backbone.conv2(x))
        return self.cls_head.fc_cls(x.mean((2, 3)))


def ours(name="resnet18", clips=False, **arguments):
    net = getattr(torchvision.models, name)(num_classes=5)
    tsm_jit.make_temporal_shift(net, SEGMENTS, inplace=True, **arguments)
    if arguments.get("temporal_pool"):
        tsm_jit.make_temporal_pool(net, SEGMENTS)
    if clips:
        net.fc = nn.Identity()
        return tsm_jit.VideoModel(net, nn.Linear(512, 5))
    return net


def ours_tsam():
    net = torchvision.models.resnet18(num_classes=5)
    tsm_jit.tsam.make_Shift(net, SEGMENTS, SEGMENTS, 8, 1, 1, 0)
    return net


def randomised(net):
    """Statistics as if it had been trained."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.double().eval()


CASES = {
    "tsm": ("tsm", tsm, ours),
    "tsm, before the block": ("tsm", lambda: tsm(place="block"), lambda: ours(place="block")),
    "tsm, pooled": ("tsm", lambda: tsm(pool=True), lambda: ours(temporal_pool=True)),
    "tsm, ResNet-101": ("tsm", lambda: tsm("resnet101"), lambda: ours("resnet101")),
    "tsm, MobileNetV2": ("tsm", mobilenet_of_tsm, lambda: ours("mobilenet_v2")),
    "tsm, online demo": ("tsm", online_demo, lambda: ours("mobilenet_v2")),
    "mmaction2": ("mmaction2", Recognizer, ours),
    "mmaction2, MobileNetV2": ("mmaction2", MobileRecognizer, lambda: ours("mobilenet_v2")),
    "tsam": ("tsam", TSAM, ours_tsam),
}


MOBILENETS = ("tsm, MobileNetV2", "tsm, online demo", "mmaction2, MobileNetV2")


def on_meta(make):
    with torch.device("meta"):
        return make()


LAYOUTS = {  # a network with the names of each layout, and of each kind of names within it
    "torchvision": ours,
    "torchvision, no shifts": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision, MobileNetV2": lambda: ours("mobilenet_v2"),
    "torchvision, MobileNetV2, blocks": lambda: ours("mobilenet_v2", place="block"),
    "video_model": lambda: ours(clips=True),
    **{case: theirs for case, (_, theirs, _) in CASES.items()},
}
RESNETS = [name for name in LAYOUTS if "Mobile" not in name and "demo" not in name and "101" not in name]


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


@functools.cache
def networks(name):
    """The one with the names of the layout, one of ours for its weights, and these."""
    depth = "mobilenet_v2" if name in MOBILENETS or "Mobile" in name else "resnet101" if "101" in name else "resnet18"
    theirs = on_meta(LAYOUTS[name])
    return theirs, on_meta(lambda: ours(depth)), theirs.state_dict()


@functools.cache
def expected(name, target):
    return checkpoints.convert(networks(name)[2], target=target)

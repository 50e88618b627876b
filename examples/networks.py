"""Networks for labelled videos, from a name to a trained file and back. Not a script."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from training import WrongInputError, save

import tsm_jit

MMACTION2 = "mmaction2/"  # how names of its networks begin


@dataclass(frozen=True)
class Recipe:
    """Everything that is needed to build a network and to prepare its input."""

    network: str  # of torchvision, else of timm; ``timm/name`` is always timm's, ``mmaction2/resnet50`` is mmaction2's
    classes: list[str]
    n_segment: int
    side: int  # of the frames, in pixels
    direction: str  # of the shifts: "both", or "past" for streams
    interval: float | None = None  # seconds between the frames of a clip in training; None if unknown


def image_network(name: str, num_classes: int | None = None) -> nn.Module:
    """Builds an image network: with random weights for ``num_classes``, or as trained on ImageNet, downloaded."""
    package, _, short = name.rpartition("/")
    if package not in ("", "timm"):
        raise WrongInputError(
            f"the network must be a name of torchvision or timm, timm/name or mmaction2/resnet50, got {name}"
        )
    if not package and name in torchvision.models.list_models(torchvision.models):
        options = {"weights": "DEFAULT"} if num_classes is None else {"num_classes": num_classes}
        return torchvision.models.get_model(name, **options)
    try:
        import timm
    except ImportError:
        raise WrongInputError(f"{name} is no network of torchvision, and timm is missing: pip install timm") from None
    if not timm.is_model(short):
        raise WrongInputError(f"{name} is neither a network of torchvision nor of timm")
    return (
        timm.create_model(short, pretrained=True)
        if num_classes is None
        else timm.create_model(short, num_classes=num_classes)
    )


def mmaction2_resnet(name: str) -> tuple[nn.Module, int]:
    """Builds mmaction2's ResNet with random weights: features ``[N*T, F]`` of frames. Returns it and F."""
    depth = name.removeprefix(MMACTION2 + "resnet")
    if depth not in ("18", "34", "50", "101", "152"):
        raise WrongInputError(f"the depth of mmaction2's ResNet must be 18, 34, 50, 101 or 152, got {name}")
    try:
        from mmaction.models.backbones.resnet import ResNet
    except ImportError as error:
        raise WrongInputError(f"{name} needs mmaction2, which cannot be imported: {error}") from None

    class Backbone(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((2, 3))

    net = Backbone(int(depth))
    logging.disable(logging.INFO)  # a line for every tensor
    net.init_weights()
    logging.disable(logging.NOTSET)
    return net, 512 if int(depth) < 50 else 2048


def make(recipe: Recipe, dropout: float = 0.0) -> tsm_jit.VideoModel:
    """Builds the video network of a recipe, with dropout before its last linear layer as in TSM."""
    last = None
    if recipe.network.startswith(MMACTION2):
        net, features = mmaction2_resnet(recipe.network)
        last = nn.Linear(features, len(recipe.classes))
    else:
        net = image_network(recipe.network, len(recipe.classes))
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)  # of a ViT, whose positions are fixed
    if size is not None and tuple(size) != (recipe.side, recipe.side):
        raise WrongInputError(f"the side of frames must be {size[0]} for {recipe.network}, got {recipe.side}")
    try:
        tsm_jit.make_temporal_shift(net, recipe.n_segment, inplace=True, direction=recipe.direction)
    except TypeError as error:
        raise WrongInputError(f"{recipe.network} cannot be converted: {error}") from None
    if dropout:
        linear = last or [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        linear.register_forward_pre_hook(lambda module, x: F.dropout(x[0], dropout, module.training))
    return tsm_jit.VideoModel(net, last)


def start_from(model: tsm_jit.VideoModel, recipe: Recipe, weights: str) -> str:
    """Loads weights of TSM, mmaction2, torchvision or timm and returns one line about it.

    Args:
        model: the network. Its last layer keeps random weights if the classes are others.
        recipe: of the network.
        weights: the path of a checkpoint, or ``imagenet`` to download weights of torchvision or timm.
    """
    try:
        if weights == "imagenet":
            state = image_network(recipe.network.removeprefix(MMACTION2)).state_dict()
        else:
            state = tsm_jit.checkpoints.load(weights)
        converted = tsm_jit.checkpoints.convert(state, target=model)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise WrongInputError(f"--weights {weights} cannot be used: {error}") from None
    model.load_state_dict(converted.state_dict, strict=False)
    random = f", random: {', '.join(converted.missing)}" if converted.missing else ""
    return f"{len(converted.state_dict)} tensors from {weights} ({converted.source}){random}"


def save_trained(model: nn.Module, recipe: Recipe, path: Path) -> None:
    """Writes a file for :func:`load_trained`, which :func:`tsm_jit.checkpoints.load` reads as well."""
    save({"state_dict": model.state_dict(), "recipe": asdict(recipe)}, path)


def load_trained(path: Path) -> tuple[tsm_jit.VideoModel, Recipe]:
    """Reads a network of :func:`save_trained`."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        recipe = Recipe(**saved["recipe"])
        model = make(recipe)
        model.load_state_dict(saved["state_dict"])
    except WrongInputError:  # such as a missing timm
        raise
    except FileNotFoundError:
        raise WrongInputError(f"{path} does not exist") from None
    except Exception:  # of a damaged file, any
        raise WrongInputError(f"{path} is no network that finetune.py has written") from None
    return model.eval(), recipe


def normalize(frames: Tensor) -> Tensor:
    """The input of networks trained on ImageNet: RGB frames, uint8 ``[..., 3, H, W]``, to float32 of that shape."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=frames.device)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], device=frames.device)[:, None, None]
    return (frames.float() / 255 - mean) / deviation


class FromBytes(nn.Module):
    """Scores ``[N, K]`` of clips uint8 ``[N, T, 3, H, W]``: normalization included, for export."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        return self.model(normalize(clips))

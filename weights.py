"""Models from checkpoints, and the released files they start from.

    python weights.py                  lists every file: missing, present, damaged or unpacked
    python weights.py dcris_b refcoco  fetches what these need; after a cut, run it again

First loading and saving a model, then the encoders' files and the authors' checkpoints, then how a
file that nobody vouches for is read, and last the table of released files and how they are fetched.
Nothing inside any file is ever run as code.
"""

import argparse
import hashlib
import io
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from torch import Tensor, nn

from adapters import adapter_keys
from data import Tokenizer, lock, progress, run_as_program, write_whole
from model import DCRIS, PRESETS, Config

FORMAT = "dcris 1"  # of our checkpoints; to be counted up when old files no longer fit
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's


# ---- a model ----


def load_model(path_or_name: str | Path, device: str = "cpu", weights: str = "") -> DCRIS:
    """The model of a checkpoint, in eval mode, with its tokenizer.

    path_or_name: a checkpoint, ours or the authors', or the name of a release such as
    detris_b_refcoco, which is fetched. weights: the folder of the released files, if it is another
    than the checkpoint says. A model that needs none of them does not look there. Raises OSError or
    ValueError, which name the file.
    """
    saved = read_checkpoint(path_or_name, weights or "weights")
    config = Config(**saved["config"])
    if weights and are_released(config.weights):
        if not are_released(weights):
            raise ValueError(
                f"{saved['path']} needs CLIP's files; --weights {weights} is no folder"
            )
        config = replace(config, weights=weights)
    return restore_model(saved, config).to(device).eval()


def new_model(config):
    """A model to be trained: the encoders that config.weights names, all else at random."""
    model = DCRIS(config)
    load_encoders(model)
    model.tokenizer = tokenizer_for(config)
    return model


def restore_model(saved, config):
    """The model of a checkpoint. saved: what read_checkpoint gave. config: its own, or changed."""
    model = DCRIS(config)
    encoders = encoder_keys(model)
    left_out = set()
    if encoders.isdisjoint(saved["model"]):  # the file holds no encoders: they are released ones
        if config.weights == "none":
            raise ValueError(f"{saved['path']} holds no encoders: name their folder with --weights")
        load_encoders(model)
        left_out = encoders
    load_checked(model, saved["model"], new=left_out, source=saved["path"])
    model.tokenizer = tokenizer_for(config)
    return model


def tokenizer_for(config):
    """CLIP's for the released encoders. All others read ids made from checksums, without a file."""
    vocabulary = None
    if are_released(config.weights):
        vocabulary = find_file(VOCABULARY, config.weights)
    return Tokenizer(vocabulary, config.vocab_size)


def are_released(weights):
    """Whether --weights names a folder of released files, and not "none" or a .pt file of ours."""
    return weights != "none" and not weights.endswith(".pt")


def encoder_keys(model):
    """State-dict names of both encoders, without what a method added to them."""
    inside = {name for name in model.state_dict() if name.startswith(("vision.", "text."))}
    return inside - adapter_keys(model)


# ---- checkpoints ----


def save_checkpoint(
    path: str | Path,
    model: DCRIS,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    best: float = 0.0,
    validated: int = 0,
) -> None:
    """Write all that is needed to use the model and to go on training it, as one dict.

    The frozen encoders are left out where they are released files, which everyone can fetch. The
    file is never half written: a kill or a full disk leaves the old one as it was.
    """
    state = dict(model.state_dict())  # parameters, and the running averages of BatchNorm
    if not model.keeps_encoders:
        for name in encoder_keys(model):
            del state[name]

    saved = {
        "format": FORMAT,
        "config": vars(model.config),
        "model": state,
        "optimizer": optimizer.state_dict()["state"] if optimizer else None,  # Adam's averages
        "step": step,  # steps done
        "best": best,  # the best mIoU on val so far
        "validated": validated,  # the step of the last score on val
    }
    with write_whole(path) as file:
        torch.save(saved, file)


def read_checkpoint(path_or_name, weights="weights"):
    """What save_checkpoint wrote, on the CPU and checked, with the file's "path" added.

    The authors' file, or the name of one of their releases, comes in the same form. weights: the
    folder that releases are fetched into. Raises OSError or ValueError; both name the file.
    """
    path = fetch_release(path_or_name, weights)
    if not os.path.isfile(path):
        releases = " ".join(RELEASES)
        raise FileNotFoundError(f"{path} is missing; run python train.py or name one of {releases}")
    saved = read_tensors(path)
    if "state_dict" in saved:
        saved = read_detris(saved["state_dict"], path)
    if saved.get("format") != FORMAT:
        entries = str(list(saved))[:200]
        raise ValueError(f"{path} is no checkpoint of ours or the authors: it holds {entries}")

    check_fields(saved, path)
    return saved | {"path": str(path)}


FIELDS = {  # of a checkpoint, and their types
    "config": dict,
    "model": dict,
    "optimizer": dict | None,
    "step": int,
    "best": float | int,
    "validated": int,
}


def check_fields(saved, path):
    """Raise ValueError where a field is missing or wrong, or a setting is unknown or impossible.

    A setting that the config lacks takes its default.
    """
    for name, kind in FIELDS.items():
        value = saved.get(name)
        if not isinstance(value, kind):
            raise ValueError(f"{path} is damaged: its {name} is {str(value)[:80]!r}")

    types = Config.__annotations__
    for name, value in saved["config"].items():
        if name not in types:
            raise ValueError(f"{path} is of another version: Config has no {name}")
        if not has_type(value, types[name]):
            raise ValueError(f"{path} is damaged: its config has {name} {value!r}")
    try:
        Config(**saved["config"])
    except ValueError as why:
        raise ValueError(f"{path}: its config is impossible: {why}") from None


def has_type(value, kind):
    """Whether a setting has its type; whole numbers are good enough for float.

    A tuple holds numbers of blocks or epochs.
    """
    if kind is tuple and type(value) is tuple:
        return all(type(number) is int for number in value)
    return type(value) is kind or (kind is float and type(value) is int)


def save_image(image, path):
    """A Pillow image, as PNG whatever the path's ending; never half written."""
    with write_whole(path) as file:
        image.save(file, "PNG")


# ---- encoders from files ----


def load_encoders(model):
    """Load both encoders from what model.config.weights names; with "none" they stay at random.

    Sets model.keeps_encoders: whether the model's checkpoints hold the encoders. They need not
    where the encoders stay as they were released.
    """
    weights = model.config.weights
    model.keeps_encoders = not are_released(weights) or model.config.method == "full"
    if weights.endswith(".pt"):
        load_own_encoders(model, weights)
    elif weights != "none":
        size = {384: "s", 1024: "l"}.get(model.config.vision_width, "b")
        load_dinov2(model.vision, find_file(f"dinov2_vit{size}14_reg4_pretrain.pth", weights))
        load_clip_text(model.text, find_file("ViT-B-16.pt", weights))


def load_dinov2(vision: nn.Module, path: str | Path) -> None:
    """DINOv2's released file into our VisionTransformer; adapters stay as they are."""
    load_checked(vision, read_tensors(path), new=adapter_keys(vision), source=path)


def load_clip_text(text: nn.Module, path: str | Path) -> None:
    """The text half of CLIP ViT-B/16 into our TextTransformer; adapters stay as they are.

    The file holds half precision, which loading widens to float32.
    """
    state = read_tensors(path)
    patches = shape_of(state.get("visual.conv1.weight"))
    if patches != (768, 3, 16, 16):  # the text halves of other CLIPs would fit as well
        raise ValueError(f"{path} is another CLIP than ViT-B/16: visual.conv1.weight is {patches}")

    image_half = ("visual.", "input_resolution", "context_length", "vocab_size")
    text_half = {name: state[name] for name in state if not name.startswith(image_half)}
    load_checked(text, text_half, new=adapter_keys(text), source=path)


def load_own_encoders(model, path):
    """The encoders of another model of ours, without what its method added to them."""
    other = load_model(path)
    if are_released(other.config.weights):  # then its text encoder reads CLIP's ids
        raise ValueError(f"{path} has the released encoders: name their folder with --weights")
    for name in ("vision_heads", "text_heads"):  # no shape tells them
        heads = getattr(other.config, name)
        if getattr(model.config, name) != heads:
            raise ValueError(f"{path} has --{name} {heads}, not {getattr(model.config, name)}")
    state = other.state_dict()
    for name in state.keys() - encoder_keys(other):
        del state[name]
    not_there = model.state_dict().keys() - encoder_keys(model)
    load_checked(model, state, new=not_there, source=path)


def load_checked(module, state, new=frozenset(), source="the state"):
    """Load a state dict after checking every name, shape and number in it.

    new: names that the file may leave out, since another source gives them. source: the file, for
    the message. Raises ValueError and loads nothing where a name is missing or not ours, a shape
    differs, or a number is not finite.
    """
    ours = module.state_dict()
    faults = [f"{name} missing" for name in ours if name not in state and name not in new]
    for name, value in state.items():
        if name not in ours:
            faults.append(f"{name} not ours")
        elif misfit(value, ours[name]):
            faults.append(f"{name} {misfit(value, ours[name])}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source}: weights do not fit: {', '.join(faults[:5])}{more}")
    module.load_state_dict(state, strict=False)


def misfit(value, ours):
    """Why a value of a file cannot take the place of our tensor; "" where it can."""
    if shape_of(value) != shape_of(ours):
        return f"{shape_of(value)} instead of {shape_of(ours)}"
    if value.layout != ours.layout or value.is_floating_point() != ours.is_floating_point():
        return f"{value.dtype}, {value.layout} instead of {ours.dtype}, {ours.layout}"
    if not value.sum(dtype=torch.float64).isfinite():  # one NaN or infinity makes the sum so
        return "not finite"
    return ""


def load_optimizer(optimizer, state, source):
    """Adam's averages of a checkpoint, checked like its weights; the settings stay as they are."""
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        ours = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        entry = state.get(number)
        fits = isinstance(entry, dict) and entry.keys() == ours.keys()
        if not fits or any(misfit(entry[name], ours[name]) for name in ours):
            raise ValueError(f"{source} is damaged: its optimizer does not fit the model")

    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def shape_of(value):
    """Of a tensor its shape; of anything else, for a message, its type."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return type(value).__name__


# ---- the authors' checkpoints (DETRIS) ----


def load_detris(model: DCRIS, path: str | Path) -> None:
    """The authors' checkpoint into a model of its configuration; its optimizer is left out.

    This is for other programs; load_model makes the model, too.
    """
    load_checked(model, read_checkpoint(path)["model"], source=path)
    model.keeps_encoders = True


def read_detris(state, path):
    """The state dict of an authors' checkpoint in the form of our checkpoints."""
    try:
        ours = from_detris(state)
        config = detris_config(ours)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(
            f"{path} is no checkpoint of the authors: its state_dict is foreign"
        ) from None
    stem = Path(path).stem
    config["text_length"] = 22 if "refcocog_u" in stem else 17  # as they trained
    config["dataset"] = DETRIS_DATASETS.get(stem, "refcoco")
    saved = {"format": FORMAT, "config": config, "model": ours}
    return saved | {"optimizer": None, "step": 0, "best": 0.0, "validated": 0}


DETRIS_DATASETS = {  # name of an authors' file -> the data set that it was trained on
    "base_refcoco": "refcoco",
    "base_refcoco+": "refcoco+",
    "base_refcocog_u": "refcocog_umd",
    "base_refcocog_g": "refcocog_google",
}
NUMBER = r"(?<=blocks\.|layers\.)\d+"  # of a block or layer, in a layer's name


def from_detris(state):
    """The authors' state dict under our names.

    A name that DETRIS lacks stays as it is, and load_checked refuses it.
    """
    ours = {}
    for theirs, value in state.items():
        layer, _, last = theirs.removeprefix("module.").rpartition(".")
        pattern = re.sub(NUMBER, "{}", layer)
        name = DETRIS.get(pattern, pattern)
        for number in re.findall(NUMBER, layer):  # none or one
            name = name.replace("{}", number)
        ours[f"{name}.{last}"] = value

    turned = "neck.levels.2.conv.weight"
    if turned in ours:  # theirs is a transposed 1x1 convolution: the same map, axes swapped
        ours[turned] = ours[turned].transpose(0, 1)
    return ours


def detris_config(state):
    """The configuration of an authors' checkpoint, read off its names and shapes (in our names).

    Text encoder and head have the same size in all of them.
    """
    width = len(state["vision.norm.bias"])
    depth = len(sizes_in_blocks(state, "vision.blocks.{}.norm1.bias"))
    size = {
        "vision_width": width,
        "vision_depth": depth,
        "vision_heads": width // 64,
        "taps": (depth // 3, 2 * depth // 3),
    }
    visual_ranks = sizes_in_blocks(state, "vision.blocks.{}.adapter.down.bias")
    text_ranks = sizes_in_blocks(state, "text.transformer.resblocks.{}.adapter.down.bias")
    visual_layers = tuple(visual_ranks)
    text_layers = tuple(text_ranks)
    adapters = {
        "visual_layers": visual_layers,
        "visual_rank": visual_ranks[visual_layers[0]],  # the same in all blocks
        "text_layers": text_layers,
        "text_rank": text_ranks[text_layers[0]],
    }
    return PRESETS["detris_b"] | size | adapters


def sizes_in_blocks(state, name):
    """Number of a block -> length of the vector of that name, for all blocks that have one."""
    sizes = {}
    for number in range(100):
        vector = state.get(name.format(number))
        if vector is not None:
            sizes[number] = len(vector)
    return sizes


# The authors' name of a layer -> ours; {} is the number of a block or layer. What a name ends with
# (weight, bias, running_mean, ...) is the same on both sides. Encoders keep their released names.
DETRIS = {
    # text encoder: CLIP's own layers, then the authors' text adapter
    "txt_backbone": "text",
    "txt_backbone.transformer.resblocks.{}.attn": "text.transformer.resblocks.{}.attn",
    "txt_backbone.transformer.resblocks.{}.attn.out_proj": (
        "text.transformer.resblocks.{}.attn.out_proj"
    ),
    "txt_backbone.transformer.resblocks.{}.ln_1": "text.transformer.resblocks.{}.ln_1",
    "txt_backbone.transformer.resblocks.{}.mlp.c_fc": "text.transformer.resblocks.{}.mlp.c_fc",
    "txt_backbone.transformer.resblocks.{}.mlp.c_proj": "text.transformer.resblocks.{}.mlp.c_proj",
    "txt_backbone.transformer.resblocks.{}.ln_2": "text.transformer.resblocks.{}.ln_2",
    "txt_backbone.token_embedding": "text.token_embedding",
    "txt_backbone.ln_final": "text.ln_final",
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch1.conv": (
        "text.transformer.resblocks.{}.adapter.dense.branch1.conv"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch1.bn": (
        "text.transformer.resblocks.{}.adapter.dense.branch1.bn"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch2.0.conv": (
        "text.transformer.resblocks.{}.adapter.dense.branch2.0.conv"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch2.0.bn": (
        "text.transformer.resblocks.{}.adapter.dense.branch2.0.bn"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch2.1.conv": (
        "text.transformer.resblocks.{}.adapter.dense.branch2.1.conv"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch2.1.bn": (
        "text.transformer.resblocks.{}.adapter.dense.branch2.1.bn"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch3.0.conv": (
        "text.transformer.resblocks.{}.adapter.dense.branch3.0.conv"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch3.0.bn": (
        "text.transformer.resblocks.{}.adapter.dense.branch3.0.bn"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch3.1.conv": (
        "text.transformer.resblocks.{}.adapter.dense.branch3.1.conv"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.dense_branch3.1.bn": (
        "text.transformer.resblocks.{}.adapter.dense.branch3.1.bn"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.D_fc1": (
        "text.transformer.resblocks.{}.adapter.down"
    ),
    "txt_backbone.transformer.resblocks.{}.adapter.D_fc2": (
        "text.transformer.resblocks.{}.adapter.up"
    ),
    # image encoder: DINOv2's own layers, then the DenseCrossAdapter
    "dinov2": "vision",
    "dinov2.patch_embed.proj": "vision.patch_embed.proj",
    "dinov2.blocks.{}.norm1": "vision.blocks.{}.norm1",
    "dinov2.blocks.{}.attn.qkv": "vision.blocks.{}.attn.qkv",
    "dinov2.blocks.{}.attn.proj": "vision.blocks.{}.attn.proj",
    "dinov2.blocks.{}.ls1": "vision.blocks.{}.ls1",
    "dinov2.blocks.{}.norm2": "vision.blocks.{}.norm2",
    "dinov2.blocks.{}.mlp.fc1": "vision.blocks.{}.mlp.fc1",
    "dinov2.blocks.{}.mlp.fc2": "vision.blocks.{}.mlp.fc2",
    "dinov2.blocks.{}.ls2": "vision.blocks.{}.ls2",
    "dinov2.norm": "vision.norm",
    "dinov2.blocks.{}.adapter.dense_branch1.conv": "vision.blocks.{}.adapter.dense.branch1.conv",
    "dinov2.blocks.{}.adapter.dense_branch1.bn": "vision.blocks.{}.adapter.dense.branch1.bn",
    "dinov2.blocks.{}.adapter.dense_branch2.0.conv": (
        "vision.blocks.{}.adapter.dense.branch2.0.conv"
    ),
    "dinov2.blocks.{}.adapter.dense_branch2.0.bn": "vision.blocks.{}.adapter.dense.branch2.0.bn",
    "dinov2.blocks.{}.adapter.dense_branch2.1.conv": (
        "vision.blocks.{}.adapter.dense.branch2.1.conv"
    ),
    "dinov2.blocks.{}.adapter.dense_branch2.1.bn": "vision.blocks.{}.adapter.dense.branch2.1.bn",
    "dinov2.blocks.{}.adapter.dense_branch3.0.conv": (
        "vision.blocks.{}.adapter.dense.branch3.0.conv"
    ),
    "dinov2.blocks.{}.adapter.dense_branch3.0.bn": "vision.blocks.{}.adapter.dense.branch3.0.bn",
    "dinov2.blocks.{}.adapter.dense_branch3.1.conv": (
        "vision.blocks.{}.adapter.dense.branch3.1.conv"
    ),
    "dinov2.blocks.{}.adapter.dense_branch3.1.bn": "vision.blocks.{}.adapter.dense.branch3.1.bn",
    "dinov2.blocks.{}.adapter.D_fc1": "vision.blocks.{}.adapter.down",
    "dinov2.blocks.{}.adapter.D_fc2": "vision.blocks.{}.adapter.up",
    "dinov2.blocks.{}.adapter.cross.multihead_attn": "vision.blocks.{}.adapter.cross.attn",
    "dinov2.blocks.{}.adapter.cross.multihead_attn.out_proj": (
        "vision.blocks.{}.adapter.cross.attn.out_proj"
    ),
    "dinov2.blocks.{}.adapter.cross.image_proj": "vision.blocks.{}.adapter.cross.query_proj",
    "dinov2.blocks.{}.adapter.cross.text_proj": "vision.blocks.{}.adapter.cross.words_proj",
    "dinov2.blocks.{}.adapter.cross.back_proj": "vision.blocks.{}.adapter.cross.back",
    # neck
    "neck.fusion3.multihead_attn": "neck.fuse.0",
    "neck.fusion3.multihead_attn.out_proj": "neck.fuse.0.out_proj",
    "neck.fusion4.multihead_attn": "neck.fuse.1",
    "neck.fusion4.multihead_attn.out_proj": "neck.fuse.1.out_proj",
    "neck.fusion5.multihead_attn": "neck.fuse.2",
    "neck.fusion5.multihead_attn.out_proj": "neck.fuse.2.out_proj",
    "neck.txt_proj": "neck.sentence_proj",
    "neck.f3_proj.0": "neck.levels.0.conv",
    "neck.f3_proj.1": "neck.levels.0.bn",
    "neck.f4_proj.0": "neck.levels.1.conv",
    "neck.f4_proj.1": "neck.levels.1.bn",
    "neck.f5_proj.0": "neck.levels.2.conv",
    "neck.f5_proj.1": "neck.levels.2.bn",
    "neck.aggr.0": "neck.merge.conv",
    "neck.aggr.1": "neck.merge.bn",
    "neck.coordconv.0.conv1.0": "neck.place.0.conv",
    "neck.coordconv.0.conv1.1": "neck.place.0.bn",
    "neck.coordconv.1.0": "neck.place.1.conv",
    "neck.coordconv.1.1": "neck.place.1.bn",
    # decoder
    "decoder.layers.{}.self_attn_norm": "decoder.layers.{}.self_attn_norm",
    "decoder.layers.{}.cross_attn_norm": "decoder.layers.{}.cross_attn_norm",
    "decoder.layers.{}.self_attn": "decoder.layers.{}.self_attn",
    "decoder.layers.{}.self_attn.out_proj": "decoder.layers.{}.self_attn.out_proj",
    "decoder.layers.{}.multihead_attn": "decoder.layers.{}.cross_attn",
    "decoder.layers.{}.multihead_attn.out_proj": "decoder.layers.{}.cross_attn.out_proj",
    "decoder.layers.{}.ffn.0": "decoder.layers.{}.ffn.0",
    "decoder.layers.{}.ffn.3": "decoder.layers.{}.ffn.3",
    "decoder.layers.{}.ffn.4": "decoder.layers.{}.ffn.4",
    "decoder.layers.{}.norm1": "decoder.layers.{}.norm1",
    "decoder.layers.{}.norm2": "decoder.layers.{}.norm2",
    "decoder.layers.{}.norm3": "decoder.layers.{}.norm3",
    "decoder.norm": "decoder.norm",
    # projector
    "proj.vis.1.0": "projector.up.0.conv",
    "proj.vis.1.1": "projector.up.0.bn",
    "proj.vis.3.0": "projector.up.1.conv",
    "proj.vis.3.1": "projector.up.1.bn",
    "proj.vis.4": "projector.mix",
    "proj.txt": "projector.kernel",
}


# ---- files that nobody vouches for ----


def read_tensors(path):
    """The dict that torch.save or torch.jit.save wrote; nothing in the file is run.

    torch's weights-only reader makes tensors and plain values and refuses all else. But it trusts
    the bytes: torch 2.13 loads a file with a zeroed megabyte without a word. So we first compare
    every member of the archive with the checksum that torch.save stored beside it, at some 5 GB/s.
    We do not map the file into memory: with mmap, torch finds a tensor by an offset that the file
    states, and the bytes there need not be those that we compared.

    Raises FileNotFoundError, or ValueError for a file with any fault.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing, or not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            data = [m for m in members if not re.search(r"/code/|/constants\.pkl$", m.filename)]
            if any(member.compress_type for member in data):
                raise ValueError("it is compressed, which torch never does")
            if len(data) < len(members):  # torch.jit.save wrote it
                return read_torchscript(archive, data)
            broken = archive.testzip()
            if broken:
                raise ValueError(f"the checksum of {broken} is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as why:  # whatever a damaged or foreign file brings up
        # of torch's long message, the line that says what is wrong
        message = re.split(r"WeightsUnpickler error:|trusted source.", str(why))[-1]
        reason = message.strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged or no file of tensors: {reason}") from None


def read_torchscript(archive, data):
    """The tensors of a TorchScript archive such as CLIP's, by dotted name. data: its members.

    torch.jit.load would compile the code in the archive. So we copy its data without the code,
    which also compares the checksums, and read the copy with the weights-only reader. The copy
    still asks for the classes of its modules: Record stands in for each.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as without_code:
        for member in data:
            without_code.writestr(member.filename, archive.read(member))
    copy.seek(0)
    wanted = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
    copy.seek(0)

    stand_ins = []  # what is not here is refused
    for name in wanted:
        if name.startswith("__torch__."):
            stand_ins.append((Record, name))
        elif name.startswith("torch.jit._pickle.build_"):  # lists of numbers
            stand_ins.append((list, name))
    with torch.serialization.safe_globals(stand_ins):
        return dict(torch.load(copy, map_location="cpu", weights_only=True))


class Record(dict):
    """Stands in for any module class of a TorchScript archive: its tensors, by dotted name."""

    def __setstate__(self, attributes: dict) -> None:
        for name, value in attributes.items():
            if isinstance(value, Record):
                # pop: a hostile file may hold one Record twice, which holds another twice, and so
                # on; copied each time, they would fill the memory
                for inner in list(value):
                    self[f"{name}.{inner}"] = value.pop(inner)
            elif isinstance(value, Tensor):
                self[name] = value


# ---- the released files ----


class File(NamedTuple):
    """A released file. digest: sha256, or md5 if it has 32 digits."""

    bytes: int | None  # None: not known
    licence: str
    urls: tuple[str, ...]  # places, in the order in which they are asked
    digest: str


# path -> file; a *.zip lies below the folder --data_root, all else below --weights
FILES = {
    "dinov2_vits14_reg4_pretrain.pth": File(
        88_291_785,
        "Apache-2.0",
        ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",),
        "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "dinov2_vitb14_reg4_pretrain.pth": File(
        346_393_545,
        "Apache-2.0",
        ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",),
        "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    "dinov2_vitl14_reg4_pretrain.pth": File(
        1_217_607_321,
        "Apache-2.0",
        ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",),
        "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
    "ViT-B-16.pt": File(
        None,
        "MIT",
        (  # the first host is down at times; it only passes on the second's files
            "https://openaipublic.azureedge.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",  # noqa: E501 a whole address
            "https://openaipublic.blob.core.windows.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",  # noqa: E501 a whole address
        ),
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
    VOCABULARY: File(
        1_356_917,
        "MIT",
        (
            "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
            "https://openaipublic.blob.core.windows.net/clip/bpe_simple_vocab_16e6.txt.gz",
        ),
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    ),
    "base_refcoco.pth": File(
        None,
        "MIT",
        ("https://huggingface.co/thuteam/DETRIS/resolve/main/base/base_refcoco.pth",),
        "f52c5b00b713281c7c894d17003bd641b11e2a9a993f41e44a4a06ad2ca431d5",
    ),
    "base_refcoco+.pth": File(
        None,
        "MIT",
        ("https://huggingface.co/thuteam/DETRIS/resolve/main/base/base_refcoco+.pth",),
        "cdcc780f9ee49b561db0a6812dd5ec3879227d5e1aff049056c0ff170cf01899",
    ),
    "base_refcocog_u.pth": File(
        None,
        "MIT",
        ("https://huggingface.co/thuteam/DETRIS/resolve/main/base/base_refcocog_u.pth",),
        "afec3bca7f02abde52713b4b2de4a13aa1a9a72312dc959e238e8595a0fc7e79",
    ),
    "base_refcocog_g.pth": File(
        None,
        "MIT",
        ("https://huggingface.co/thuteam/DETRIS/resolve/main/base/base_refcocog_g.pth",),
        "c5ac5531fdb02df8caecde84329c48e77dd845f8063a6cd1a705f8ac2ccd4c5c",
    ),
    # the annotations' own host is gone since 2022; these are the Internet Archive's copies
    "refcoco.zip": File(
        53_993_993,
        "see source",
        (
            "https://web.archive.org/web/20220413011718id_/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip",  # noqa: E501 a whole address
        ),
        "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
    ),
    "refcoco+.zip": File(
        45_613_210,
        "see source",
        (
            "https://web.archive.org/web/20220413011656id_/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco+.zip",  # noqa: E501 a whole address
        ),
        "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
    ),
    "refcocog.zip": File(
        56_712_951,
        "see source",
        (
            "https://web.archive.org/web/20220413012904id_/https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcocog.zip",  # noqa: E501 a whole address
        ),
        "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
    ),
    "images/train2014.zip": File(
        13_510_573_713,
        "Flickr's terms",
        (
            "http://images.cocodataset.org/zips/train2014.zip",
            "https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip",
        ),
        "0da8c0bd3d6becc4dcb32757491aca88",
    ),
}

RELEASES = {  # the authors' checkpoints, by the names they have here
    "detris_b_refcoco": ("base_refcoco.pth", VOCABULARY),
    "detris_b_refcoco+": ("base_refcoco+.pth", VOCABULARY),
    "detris_b_refcocog_u": ("base_refcocog_u.pth", VOCABULARY),
    "detris_b_refcocog_g": ("base_refcocog_g.pth", VOCABULARY),
}

NEEDS = {  # what a person asks for -> its files
    "dcris_b": ("dinov2_vitb14_reg4_pretrain.pth", "ViT-B-16.pt", VOCABULARY),
    "dcris_s": ("dinov2_vits14_reg4_pretrain.pth", "ViT-B-16.pt", VOCABULARY),
    "dcris_l": ("dinov2_vitl14_reg4_pretrain.pth", "ViT-B-16.pt", VOCABULARY),
    **RELEASES,
    "refcoco": ("refcoco.zip",),
    "refcoco+": ("refcoco+.zip",),
    "refcocog": ("refcocog.zip",),
    "coco": ("images/train2014.zip",),
}


def find_file(name, root):
    """Where a file of the table is. FileNotFoundError says what to run if it is missing.

    The same if it has another size than the table says.
    """
    path = Path(root, name)
    fault = find_fault(path, FILES[name].bytes)
    if fault:
        wanted = next(wanted for wanted, names in NEEDS.items() if name in names)
        folder = "" if str(root) == "weights" else f" --weights {root}"
        raise FileNotFoundError(f"{path} is {fault}; run python weights.py {wanted}{folder}")
    return path


def find_fault(path, size, digest=""):
    """What is wrong with a file: missing, of another size, or, if one is given, another digest.

    size: its bytes, or None if they are not known. Returns "" if nothing is wrong. Only a digest
    makes it read the file.
    """
    if not os.path.isfile(path):
        return "missing"
    found = os.path.getsize(path)
    if size not in (None, found):
        return f"damaged: {found} bytes instead of {size}"
    if digest:
        computed = digest_of(path, "md5" if len(digest) == 32 else "sha256")
        if computed != digest:
            return f"damaged: hash {computed} instead of {digest}"
    return ""


def digest_of(path, kind="sha256"):
    """The file's digest, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


# ---- downloads ----

TIMEOUT = (15, 30)  # seconds to connect; seconds without a byte
TRIES = 6  # tries in a row that bring nothing new
PAUSE = 1.0  # seconds before the next try; doubled with each vain one, a minute at most


def fetch_release(name_or_path, weights):
    """The file of a release that is given by its name, fetched if need be; a path as it is.

    weights: the folder to fetch it into; "weights" where this is no folder.
    """
    if name_or_path not in RELEASES:
        return name_or_path
    folder = weights if are_released(weights) else "weights"
    paths = [download(name, folder) for name in RELEASES[name_or_path]]
    return paths[0]


def download(name: str, root: str | Path = "weights") -> Path:
    """A file of the table below root, verified; fetched if it is not there.

    What has come is kept in NAME.part, and any later try or call goes on from its end. Only when
    size and digest are right does the part get the file's name. Of two processes that want the
    same file the second waits for the first.

    The places are asked in the order of the table. A place that does not have the file (its answer
    is an error, a web page, a file of another size or with another digest) is not asked again. A
    place that fails in passing (no connection, silence, a cut, "too many requests", a fault of its
    server) is asked again after the other places. Between two tries we pause, longer after each
    vain one. We give up when no place is left, or after TRIES tries in a row that left the part
    no longer than it ever was. If a part from before turns out wrong at the end, it is thrown away,
    and its place is asked once more.

    Raises OSError, with every place's last answer and what to do by hand, or where the disk has too
    little space; ValueError if a file of this name is there but damaged.
    """
    file = FILES[name]
    path = Path(root, name)
    part = Path(root, f"{name}.part")
    if path.exists():
        fault = find_fault(path, file.bytes, file.digest)
        if fault:
            raise ValueError(f"{path} is {fault}; look at it, and move it away to fetch it again")
        return path

    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(part, "ab"):
        if not path.exists():
            fetch(file, path, part)
            return path
    return download(name, root)  # another process fetched it: verify it as any other file


def fetch(file, path, part):
    """Complete the part and give it its name, by the rule in download's docstring."""
    places = list(file.urls)
    answers = {}  # of each place the last one
    vain = 0
    most = part.stat().st_size  # bytes that were there at best
    while places and vain < TRIES:
        url = places.pop(0)
        try:
            fetch_from(url, file, part)
            os.replace(part, path)
            return
        except (requests.RequestException, ValueError) as why:
            answers[url] = f"  {url}: {str(why)[:150]}"
            print(answers[url], file=sys.stderr)
            if not isinstance(why, ValueError):
                places.append(url)

        vain += 1
        have = part.stat().st_size
        if have > most:
            vain = 0
            most = have
        if places and vain < TRIES:
            time.sleep(min(60, PAUSE * 2**vain))

    told = "\n".join(answers.values())
    raise OSError(
        f"{path} could not be fetched:\n{told}\nOpen {file.urls[0]} elsewhere, save it as "
        f"{path}, and run this again: it checks the hash, {file.digest}"
    )


def fetch_from(url, file, part):
    """Complete the part from one place and verify it.

    Raises ValueError if the place lacks the file, RequestException if a second try may help.
    """
    have = part.stat().st_size
    append_rest(url, part, file.bytes)
    fault = find_fault(part, file.bytes, file.digest)
    if fault:
        os.truncate(part, 0)
        if have:  # what was there before may be to blame
            raise requests.RequestException(fault)
        raise ValueError(fault)


def append_rest(url, part, size):
    """Append to the part what it lacks of the file at url. Errors as fetch_from."""
    have = part.stat().st_size
    # identity: a reply that is compressed on its way could not be continued at a byte of the file
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code == 416:  # there is nothing beyond what we have: the digest will judge
            return
        done = have if reply.status_code == 206 else 0  # 200: the server begins anew
        total = read_total(reply, done, size)
        if total - done > shutil.disk_usage(part.parent).free:
            raise OSError(f"{part}: {total - done:,} bytes are to come, the disk has less free")

        with open(part, "ab") as file:
            file.truncate(done)
            pieces = reply.iter_content(1 << 16)
            for piece in progress(pieces, total, f"bytes of {part.stem}", done, size=len):
                done += file.write(piece[: total - done])
                if done == total:
                    file.flush()
                    os.fsync(file.fileno())  # on the disk before it gets its name
                    return
    raise requests.ConnectionError(f"closed after {done} of {total} bytes")


def read_total(reply, done, size):
    """How many bytes the whole file has, by the reply, which sends all but the first `done`.

    Whether these are the right bytes is left to the digest. Errors as fetch_from.
    """
    status = reply.status_code
    kind = reply.headers.get("Content-Type", "")
    length = reply.headers.get("Content-Length", "")
    total = size
    if length.isdecimal():
        total = done + int(length)

    answer = f"answers {status} {kind}, {total} bytes; expected {size or 'all'} bytes from {done}"
    if status == 429 or status >= 500:
        raise requests.HTTPError(answer)
    if status not in (200, 206) or "text/html" in kind:
        raise ValueError(answer)
    if total is None or size not in (None, total):
        raise ValueError(answer)
    return total


def unpack(path):
    """data/refcoco.zip -> data/refcoco/refs(...).p and instances.json, and nothing else."""
    try:
        with lock(path, "rb"), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                # the last part of its name only, so that it cannot leave the folder
                name = member.filename.rpartition("/")[2]
                is_needed = re.fullmatch(r"refs\(\w+\)\.p|instances\.json", name)
                if is_needed and member.file_size < 1 << 30:
                    unpack_member(archive, member, path.with_suffix("") / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as why:
        raise ValueError(f"{path} cannot be unpacked: {why}") from why


def unpack_member(archive, member, target):
    """Write the member to the target, whole or not at all, unless it is there."""
    if find_fault(target, member.file_size):
        # reading ends at file_size and compares the checksum
        with archive.open(member) as packed, write_whole(target) as file:
            shutil.copyfileobj(packed, file)


# ---- command line ----


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="List, fetch and check the released files.")
    names = " ".join(NEEDS)
    parser.add_argument("names", nargs="*", help=f"what to fetch, of {names}; none: list all files")
    parser.add_argument("--weights", default="weights", help="folder of the weights (%(default)s)")
    parser.add_argument(
        "--data_root", default="data", help="folder of the data, *.zip (%(default)s)"
    )
    args = parser.parse_args(argv)

    unknown = [name for name in args.names if name not in NEEDS]
    if unknown:
        parser.error(f"no {' '.join(unknown)}; there are {names}")
    if not args.names:
        list_files(args)
    try:
        for wanted in args.names:
            fetch_all(NEEDS[wanted], args)
    except KeyboardInterrupt:
        sys.exit("weights.py: stopped; what came is kept, the same command goes on from there")


def list_files(args):
    """A line for each file. Those that are there are read through, to compare their digests."""
    for name, file in FILES.items():
        path = Path(folder_of(name, args), name)
        state = find_fault(path, file.bytes, file.digest) or "present"
        if state == "missing" and path.with_suffix("").is_dir():
            state = "unpacked"
        print(f"{file.bytes or '?':>11}  {file.licence:<14}  {path}: {state}")


def fetch_all(names, args):
    for name in names:
        path = download(name, folder_of(name, args))
        print(path)
        if name.startswith("refcoco"):  # train2014.zip is read as it is
            unpack(path)


def folder_of(name, args):
    return args.data_root if name.endswith(".zip") else args.weights


if __name__ == "__main__":
    run_as_program(main)

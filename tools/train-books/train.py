"""Trains a small LLaMA that reads books and looks things up, for tests of long contexts.

Nothing pretrained that can be had offline reaches beyond 512 tokens. This model is about 6 million
parameters: 6 layers, hidden size 256, 4 query and 2 key/value heads of 64 channels, a byte-level
BPE of 4,096 tokens of its own, context 8,192, tied head. It is trained in bf16 on plain text, mixed
with look-up documents: stretches of books in which "The pass key of NAME is DIGITS." is planted, and
asked for at the end.

    python train.py --books books_19.tar.xz --out books-6m            # one GPU, until it stops learning
    python train.py --books books_19.tar.xz --out smoke --smoke       # a few steps on a CPU

It needs torch, tokenizers and safetensors. The folder that it writes is a checkpoint in Hugging Face
layout in f16, with log.jsonl (one line for each evaluation) and README.md (a card).
"""

import argparse
import json
import math
import random
import tarfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

VOCAB, LAYERS, HIDDEN, INTERMEDIATE = 4096, 6, 256, 768
Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
CONTEXT, ROPE_THETA, EPSILON = 8192, 100_000.0, 1e-5
END = "<|end|>"
HELD_OUT = 2
LOOKUP_SHARE = 0.3
NAMES = ("Alice Brown Clara David Emma Frank Grace Henry Irene Jacob Kate Louis Mary Noah Olive "
         "Peter Quinn Rose Simon Tessa").split()


def read_books(path):
    """The texts of the archive by name, Project Gutenberg's frame taken off."""
    books = {}
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if not member.isfile() or not member.name.endswith(".txt"):
                continue
            text = archive.extractfile(member).read().decode("utf-8", errors="replace")
            text = text.replace("\r\n", "\n").lstrip("\ufeff")
            for mark, keep in (("*** START OF", 1), ("*** END OF", 0)):
                if mark in text:
                    before, after = text.split(mark, 1)
                    text = after.split("\n", 1)[-1] if keep else before
            books[Path(member.name).stem] = text.strip()
    if len(books) <= HELD_OUT:
        raise SystemExit(f"{path}: found {len(books)} .txt files, expected more than {HELD_OUT}")
    return books


def train_tokenizer(texts):
    """A byte-level BPE in which digits stand alone, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, Q_HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(Q_HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        heads = lambda y, n: y.view(batch, length, n, HEAD_DIM).transpose(1, 2)
        q, k = heads(self.q_proj(x), Q_HEADS), heads(self.k_proj(x), KV_HEADS)
        v = heads(self.v_proj(x), KV_HEADS)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(Q_HEADS // KV_HEADS, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def rotate(x, cos, sin):
    """Channel i turns with channel i + HEAD_DIM / 2, as LLaMA's checkpoints in HF layout have it."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=EPSILON)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=EPSILON)
        self.mlp = Mlp()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=EPSILON)
        half = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
        angles = torch.outer(torch.arange(CONTEXT, dtype=torch.float64), ROPE_THETA ** -half)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if deep else 1))

    def forward(self, tokens, targets):
        """Loss of each target, [batch, length]."""
        length = tokens.shape[1]
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return loss.view(targets.shape)


class Data:
    """Windows of books, some of them with pass keys planted and asked for."""

    def __init__(self, books, tokenizer, seed):
        self.books = [tokenizer.encode(text).ids for text in books]
        self.tokenizer, self.random = tokenizer, random.Random(seed)

    def stretch(self, length):
        """`length` tokens of one book, or of several if one is too short."""
        tokens = []
        while len(tokens) < length:
            book = self.random.choices(self.books, weights=[len(book) for book in self.books])[0]
            start = self.random.randrange(max(1, len(book) - (length - len(tokens))))
            tokens += book[start:start + length - len(tokens)]
        return tokens

    def lookup(self, length):
        """Tokens, and the places of the digits that can be known."""
        names = self.random.sample(NAMES, self.random.randint(1, 8))
        facts = {name: str(self.random.randrange(10_000, 100_000)) for name in names}
        encode = lambda text: self.tokenizer.encode(text).ids
        asked = self.random.sample(names, self.random.randint(1, len(names)))
        tail, known = [], []
        for name in asked:
            question = encode(f" The pass key of {name} is")
            answer = encode(f" {facts[name]}.")
            tail += question
            known += range(len(tail), len(tail) + len(answer) - 1)
            tail += answer
        planted = [encode(f" The pass key of {name} is {key}.") for name, key in facts.items()]
        filler = self.stretch(length - len(tail) - sum(map(len, planted)))
        cuts = sorted(self.random.randrange(len(filler) + 1) for _ in planted)
        tokens, before = [], 0
        for cut, fact in zip(cuts, planted):
            tokens += filler[before:cut] + fact
            before = cut
        tokens += filler[before:]
        return tokens + tail, [len(tokens) + place for place in known]

    def batch(self, rows, length, lookup_share, device):
        tokens, weights = [], []
        for _ in range(rows):
            weight = [1.0] * (length + 1)
            if self.random.random() < lookup_share:
                text, known = self.lookup(length + 1)
                for place in known:
                    # A handful of digits among thousands of tokens would hardly be heard.
                    weight[place] = 20.0
            else:
                text = self.stretch(length + 1)
            tokens.append(text)
            weights.append(weight)
        tokens = torch.tensor(tokens, device=device)
        weights = torch.tensor(weights, device=device)
        return tokens[:, :-1], tokens[:, 1:], weights[:, 1:]


def autocast(device):
    return torch.autocast(device_type=device.split(":")[0], dtype=torch.bfloat16)


@torch.no_grad()
def evaluate(model, data, device, rows, length):
    """Loss on plain text and on digits that can be looked up, nats; share of digits that are right."""
    model.eval()
    data.random.seed(0)
    with autocast(device):
        tokens, targets, _ = data.batch(rows, length, 0.0, device)
        text = model(tokens, targets).mean().item()
        tokens, targets, weights = data.batch(rows, length, 1.0, device)
        digits = model(tokens, targets)[weights > 1]
    model.train()
    # Below ln 2 the digit holds more than half of the probability: it is the most likely one.
    return text, digits.mean().item(), (digits < math.log(2)).float().mean().item()


def save(model, tokenizer, out, log, args):
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.detach().to("cpu", torch.float16).contiguous()
               for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": Q_HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_THETA, "tie_word_embeddings": True, "torch_dtype": "float16",
        "bos_token_id": end, "eos_token_id": end,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    last = log[-1]
    (out / "README.md").write_text(f"""# books-6m

A LLaMA of {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, trained by
`tools/train-books/train.py` (seed {args.seed}) on books of Project Gutenberg, mixed with look-up
documents. It is made for tests of long contexts, and good for nothing else.

Held out: {", ".join(log[0]["held_out"])}.
After {last["tokens"] / 1e6:.1f} M tokens: {last["text_loss"]:.3f} nats per token of held-out text,
{100 * last["digits_right"]:.1f} % of the digits of pass keys at a context of {last["length"]} tokens.
""")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="a .tar.xz of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10, help="longest training")
    parser.add_argument("--smoke", action="store_true", help="a few steps of short windows")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    books = read_books(args.books)
    held_out = sorted(books)[-HELD_OUT:]
    tokenizer = train_tokenizer(text for name, text in books.items() if name not in held_out)
    train = Data([books[name] for name in books if name not in held_out], tokenizer, args.seed)
    test = Data([books[name] for name in held_out], tokenizer, args.seed)
    model = Llama().to(args.device)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M parameters, "
          f"{sum(map(len, train.books)) / 1e6:.2f} M tokens, held out: {', '.join(held_out)}")

    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=args.device != "cpu")
    # Short windows first: copying is learned there, and then holds further away.
    stages = [(512, 128)] if args.smoke else [(1024, 64), (4096, 16), (8192, 8)]
    tokens_per_step = 2 * 512 if args.smoke else 65_536
    interval, patience = (2, 2) if args.smoke else (50, 6)
    most_steps = 6 if args.smoke else 10**9
    log, best, waited, seen, step = [], math.inf, 0, 0, 0
    start, stage = time.time(), 0
    while step < most_steps:
        # By the clock, so that the rate has fallen when the time is up; by steps where they are few,
        # so that they come out the same on a slow machine.
        spent = step / most_steps if args.smoke else (time.time() - start) / (60 * args.minutes)
        if spent >= 1:
            break
        if not args.smoke:
            stage = 0 if spent < 0.4 else 1 if spent < 0.7 else 2
        length = stages[stage][0]
        rows = max(1, tokens_per_step // length)
        rate = min(1.0, (step + 1) / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * rate
        tokens, targets, weights = train.batch(rows, length, LOOKUP_SHARE, args.device)
        with autocast(args.device):
            loss = (model(tokens, targets) * weights).sum() / weights.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step, seen = step + 1, seen + tokens.numel()
        if step % interval == 0:
            text, digits, right = evaluate(model, test, args.device, max(1, rows // 4), length)
            log.append({"step": step, "tokens": seen, "seconds": round(time.time() - start, 1),
                        "length": length, "train_loss": round(loss.item(), 4),
                        "text_loss": round(text, 4), "digit_loss": round(digits, 4),
                        "digits_right": round(right, 4), "held_out": held_out})
            print(json.dumps(log[-1]), flush=True)
            last_stage = stage == len(stages) - 1
            if text + digits < best - 1e-3:
                best, waited = text + digits, 0
                save(model, tokenizer, args.out, log, args)
            elif last_stage:
                waited += 1
                if waited >= patience:
                    break
            if not last_stage:
                # Another length has another loss: the best of the last one is what counts.
                best = math.inf
    print(f"{args.out}: {step} steps, {seen / 1e6:.1f} M tokens in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

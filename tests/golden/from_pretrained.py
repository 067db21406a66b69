"""Writes from_pretrained.json beside each expected.json whose checkpoint stores half precision.

expected.json was computed after `model.to(dtype).float()`, which leaves the rotary frequencies
rounded to that type. This is what `from_pretrained(dtype=torch.float32)` computes, with f32
frequencies, for the same prompts: python3 from_pretrained.py (transformers 5, torch 2)
"""

import json
import pathlib

import torch
import transformers

for name in ["llama-tied-rope-scaled-bf16", "llama-sharded-f16"]:
    folder = pathlib.Path(__file__).parent / name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for case in json.loads((folder / "expected.json").read_text())["cases"]:
        ids, margins = list(case["ids"]), []
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
            last = logits[-1]
            for _ in range(len(case["greedy"])):
                row = model(torch.tensor([ids])).logits[0, -1]
                best = row.topk(2)
                margins.append(float(best.values[0] - best.values[1]))
                ids.append(int(best.indices[0]))
        cases.append(
            {
                "text": case["text"],
                "ids": case["ids"],
                "last_logits": [round(float(x), 6) for x in last],
                "greedy": ids[len(case["ids"]) :],
                "greedy_text": "",
                "min_margin": min(margins),
                "nll_mean": float(nll),
            }
        )
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}"
    reference += ", from_pretrained(dtype=float32), eager"
    text = json.dumps({"reference": reference, "cases": cases}, ensure_ascii=False)
    (folder / "from_pretrained.json").write_text(text + "\n")

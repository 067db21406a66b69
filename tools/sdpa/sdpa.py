"""Times PyTorch's scaled_dot_product_attention for one query of each sequence, beside `bench attention --device cuda`."""

import json
import statistics

import torch
import torch.nn.functional as F

SEQUENCES, Q_HEADS, KV_HEADS, HEAD_DIM, TOKENS = 8, 32, 8, 128, 32768


def median_us(run, times=30):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return statistics.median(found)


source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
target = torch.empty_like(source)
copy_us = median_us(lambda: target.copy_(source))
q = torch.randn(SEQUENCES, Q_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.float16)
k = torch.randn(SEQUENCES, KV_HEADS, TOKENS, HEAD_DIM, device="cuda", dtype=torch.float16)
v = torch.randn_like(k)
sdpa_us = median_us(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
print(
    json.dumps(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_gb_s": 2e-3 * source.numel() / copy_us,
            "sdpa_us": sdpa_us,
        }
    )
)

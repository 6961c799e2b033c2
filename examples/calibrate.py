"""Calibrate projections on your own text, and compare the next-token distributions with the full model's.

python examples/calibrate.py MODEL_FOLDER TEXT_FILE
"""

import sys
from pathlib import Path

import pop_ext

folder, text = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
model = pop_ext.load(folder)
depth = model.resolve_prefill_depth(2 / 3)
middle = len(text) // 2

calibration = pop_ext.calibrate(model, depths=[depth], texts=[text[:middle]], tokens=16_384)
calibration.save("calibration.safetensors")

model = pop_ext.load(folder, calibration="calibration.safetensors")
for row in pop_ext.evaluate(model, [text[middle:]], depths=[depth], prompts=8):
    print(f"{row.method:18} KL {row.kl:.4f} nats a token, same likeliest token {row.top1_agreement:.0%}")

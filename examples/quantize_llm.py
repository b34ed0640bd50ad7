"""A language model in 4 bits, with codes that a text chooses: `python quantize_llm.py FOLDER|FILE.gguf TEXT OUT`."""

import sys

import torch

import lowbit
from lowbit.integrations.load import load_decoded, load_tokenizer

source, text, out = sys.argv[1:]
tokenizer, model = load_tokenizer(source), load_decoded(source, torch.float32)

with open(text, encoding="utf-8") as file:
    ids = torch.tensor(tokenizer(file.read())["input_ids"])
length = min(256, model.config.max_position_embeddings)
windows = [window[None] for window in ids.split(length)[:16]]

report = lowbit.quantize_model(model, "km4", method="gptq", calibration=windows)
print(report)
model.save_pretrained(out)
tokenizer.save_pretrained(out)

# Anywhere else: transformers' from_pretrained after `import lowbit`, `lowbit run`, `lowbit serve`.
again = lowbit.load_model(out)
made = again.generate(windows[0][:, :8], max_new_tokens=16, do_sample=False)
print(tokenizer.decode(made[0]))

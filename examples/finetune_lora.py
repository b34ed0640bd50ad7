"""LoRA over packed weights with PEFT: `python finetune_lora.py FOLDER|FILE.gguf TEXT OUT`."""

import sys

import peft
import torch

import lowbit
from lowbit.integrations.load import load_tokenizer

source, text, out = sys.argv[1:]
torch.manual_seed(0)
# GGUF files, GPTQ, AWQ, ... stay packed as they are; format="nf4" would quantize them anew.
model, tokenizer = lowbit.load_model(source, dtype=torch.float32), load_tokenizer(source)
model = peft.prepare_model_for_kbit_training(model)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
model.print_trainable_parameters()

with open(text, encoding="utf-8") as file:
    ids = torch.tensor(tokenizer(file.read())["input_ids"])
rows = ids[: len(ids) // 32 * 32].view(-1, 32)[:8]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for step in range(10):
    loss = model(rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
model.save_pretrained(out)  # the adapter alone

base = lowbit.load_model(source, dtype=torch.float32)
again = peft.PeftModel.from_pretrained(base, out).eval()
with torch.inference_mode():
    assert torch.equal(again(rows).logits, model.eval()(rows).logits)

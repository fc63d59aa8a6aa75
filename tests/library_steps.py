"""Some of the Trainer's steps, for several processes. Arguments: sequences per process, file for sums over weights."""

import json
import sys

import torch
import transformers

from velora_pretrain.library import add_velora, velora_adamw

batch, target = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = add_velora(transformers.LlamaForCausalLM(config), layers=("q_proj", "k_proj", "v_proj", "down_proj"))
rows = torch.randint(0, 128, (64, 12), generator=torch.Generator().manual_seed(1))
arguments = transformers.TrainingArguments(
    "out",
    max_steps=4,
    per_device_train_batch_size=batch,
    max_grad_norm=0.5,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    train_sampling_strategy="sequential",
)
trainer = transformers.Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    optimizers=(velora_adamw(model, lr=5e-3, eps=1e-6), None),
)
trainer.train()
if trainer.is_world_process_zero():
    with open(target, "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump({name: tensor.float().sum(-1).tolist() for name, tensor in model.state_dict().items()}, file)

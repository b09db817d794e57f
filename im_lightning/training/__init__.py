"""The Lightning parts: data module, module, callback. Only this room knows Lightning, peft and wandb."""

"""Floor 4: the Lightning parts: data module, module, callback. The only floor that knows Lightning, peft and wandb."""

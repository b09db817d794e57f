"""One finetune run: its inputs, its encoded pool, its folder, its record, its refits."""

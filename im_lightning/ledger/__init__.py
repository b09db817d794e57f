"""The accumulated finetune runs: one record per run, their regime, and the table a rule is fitted on."""

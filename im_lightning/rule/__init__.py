"""Floor 2: the rule from indicators to log evaluation loss, and the ledger of runs it is fitted on."""
